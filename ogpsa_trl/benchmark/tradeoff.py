"""
At equal safety, how much capability does each method keep, and at what cost?

    ogpsa benchmark data toy
    ogpsa benchmark --config runs/toy/benchmark.yaml [--stages sft dpo sft-dpo]

Every method trains through TRL's trainers, on the same data, steps and seeds, at each learning rate
of a sweep. What it keeps is read off where its safety has a stated level. Finished runs are kept in
`output_dir` and not repeated, so a run that was cut off goes on, and seeds, methods or learning
rates can be added.
"""

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm

from ogpsa_trl.benchmark.methods import CHAINS, METHODS, Cost, Run, stage_run, train
from ogpsa_trl.benchmark.testbed import BenchmarkArguments, parse_benchmark
from ogpsa_trl.benchmark.tradeoff_tables import report
from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.evaluation.json_files import package_versions, read_json, write_json, write_rows


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors():
        bed = parse_benchmark(argv)
    runs = [
        Run(chain, num_steps, method, factor, seed, share)
        for chain in bed.stages
        for num_steps in bed.steps
        for seed in bed.seeds
        for factor in bed.learning_rate_factors
        for method in bed.methods
        for share in (bed.shares or [None] if METHODS[method].has_share else [None])
        if METHODS[method].can_train([stage for stage, _ in CHAINS[chain]])
    ]
    failed = run_all(runs, bed)
    results = {run: r for run in runs if (r := _read(bed, run))}
    if results and all(bed.result_file(f"start-{seed}").exists() for seed in bed.seeds):
        report(results, bed)
    if failed:
        sys.exit(f"error: {len(failed)} runs failed: " + "; ".join(failed))


def run_all(runs: Sequence[Run], bed: BenchmarkArguments) -> list[str]:
    """
    Make the runs that are not there yet, several at a time, with a bar that shows the time left.

    Returns:
        What failed, and why; the other runs are made all the same.
    """
    todo = [run for run in runs if _read(bed, run) is None]
    seeds = dict.fromkeys(run.seed for run in runs)
    failed = []
    with (
        ProcessPoolExecutor(bed.processes, get_context("spawn"), _prepare_process) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", smoothing=0.05) as bar,
    ):
        running = {pool.submit(measure_start, bed, seed): f"start-{seed}" for seed in seeds}
        running |= {pool.submit(make_run, run, bed): run.name for run in todo}
        for future in as_completed(running):
            name = running[future]
            if error := future.exception():
                failed.append(f"{name} ({type(error).__name__}: {error})")
            bar.update(not name.startswith("start"))
    return failed


def measure_start(bed: BenchmarkArguments, seed: int) -> None:
    """Measure the model that training with a seed starts from."""
    file = bed.result_file(f"start-{seed}")
    if not file.exists():
        values, higher_is_better, answers = bed.measure(bed.path("model_name_or_path", seed), seed)
        write_rows(file.with_suffix(".jsonl"), answers)
        write_json(file, {"measures": values, "higher_is_better": higher_is_better})


def make_run(run: Run, bed: BenchmarkArguments) -> None:
    """Train a method through its stages, measure the model, and keep the result as a file."""
    method = METHODS[run.method].at_share(run.share)
    cost = Cost()
    with tempfile.TemporaryDirectory() as models:
        model = Path(bed.path("model_name_or_path", run.seed))
        for number, (stage, factor) in enumerate(CHAINS[run.chain]):
            arguments = stage_run(
                bed.path(stage, run.seed), method, model=model, output=Path(models) / "trainer",
                learning_rate_factor=factor * run.learning_rate_factor, num_steps=run.num_steps,
                seed=run.seed,
            )  # fmt: skip
            trained = Path(models) / str(number)
            train(method, arguments, trained, cost)
            model = trained
        measures, _, answers = bed.measure(model, run.seed)
    file = bed.result_file(run.name)
    write_rows(file.with_suffix(".jsonl"), answers)
    write_json(file, {"run": _settings(bed, run), "measures": measures, "cost": asdict(cost)})


def _prepare_process() -> None:
    """One thread, because the runs go side by side; no messages but errors."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("ogpsa_trl").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _settings(bed: BenchmarkArguments, run: Run) -> dict[str, Any]:
    """All that a result follows from, as JSON keeps it; one from other settings is not used."""
    settings = {
        **asdict(run),
        "method_settings": asdict(METHODS[run.method].at_share(run.share)),
        "files": bed.settings(run.chain, run.seed),
        "versions": package_versions("accelerate"),
    }
    return json.loads(json.dumps(settings))


def _read(bed: BenchmarkArguments, run: Run) -> dict[str, Any] | None:
    """The result of a run; `None`: not there, or from other settings."""
    file = bed.result_file(run.name)
    if not file.exists():
        return None
    result = read_json(file)
    return result if result["run"] == _settings(bed, run) else None
