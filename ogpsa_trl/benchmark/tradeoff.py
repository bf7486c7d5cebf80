"""
At equal safety, how much capability does each method keep, and at what cost?

    ogpsa benchmark                          the toy world: SFT, 3 seeds
    ogpsa benchmark --stages sft dpo sft-dpo --steps 40 100
    ogpsa benchmark --model ../shared/data/checkpoints/stories260K \\
        --data ../shared/data                                     a real model and real data

Every method trains through TRL's trainers, on the same data, steps and seeds, at each learning rate
of a sweep. What it keeps is read off where its safety has a stated level. Finished runs are kept in
--output and not repeated, so a run that was cut off goes on, and seeds, methods or learning rates
can be added.
"""

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm.auto import tqdm

from ogpsa_trl.benchmark.methods import CHAINS, METHODS, Cost, Recipe, Run, is_applicable, train
from ogpsa_trl.benchmark.testbeds import StoriesTestbed, Testbed, ToyTestbed
from ogpsa_trl.benchmark.tradeoff_tables import report
from ogpsa_trl.evaluation.json_files import package_versions, read_json, write_json


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    make_testbed = (
        (ToyTestbed, ()) if args.model is None else (StoriesTestbed, (args.model, args.data))
    )
    try:
        testbed = _testbed(make_testbed, args.seeds[0])
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    factors = sorted(args.learning_rate_factors or testbed.learning_rate_factors)
    output = args.output / testbed.title.lower().replace(" ", "-")
    runs = [
        Run(chain, num_steps, method, factor, seed, share)
        for chain in args.stages
        for num_steps in args.steps
        for seed in args.seeds
        for factor in factors
        for method in args.methods
        for share in (args.shares if METHODS[method].has_share else [None])
        if is_applicable(METHODS[method], [stage for stage, _ in CHAINS[chain]])
    ]
    failed = run_all(runs, make_testbed, output / "runs", args.processes)
    results = {run: _read(output / "runs", run) for run in runs}
    report({run: r for run, r in results.items() if r}, testbed, args.seeds, factors, output)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(runs)} runs failed: " + "; ".join(failed))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "ogpsa benchmark",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder of a pretrained model; unset: toy world")
    add("--data", type=Path, default=Path("../shared/data"), help="folder of the data for --model")
    add("--stages", nargs="+", choices=CHAINS, default=["sft"])
    add("--steps", type=int, nargs="+", default=[40], help="steps of every stage")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    share = "capability tokens, as shares of the training tokens; unset: that of each method"
    add("--shares", type=float, nargs="+", default=[None], help=share)
    sweep = "the sweep, on the learning rates of the configurations; unset: three of them"
    add("--learning_rate_factors", type=float, nargs="+", help=sweep)
    add("--processes", type=int, default=cpu_count(), help="runs at a time")
    add("--output", type=Path, default=Path("runs/tradeoff"))
    args = parser.parse_args(argv)
    for name in ("steps", "shares", "learning_rate_factors"):
        for value in getattr(args, name) or []:
            if value is not None and value <= 0:
                parser.error(f"--{name} must be above 0, but got {value}")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, but got {args.processes}")
    return args


def run_all(runs: Sequence[Run], make_testbed: Any, folder: Path, num_processes: int) -> list[str]:
    """
    Make the runs that are not there yet, several at a time, with a bar that shows the time left.

    Returns:
        What failed, and why; the other runs are made all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if _read(folder, run) is None]
    seeds = dict.fromkeys(run.seed for run in todo)
    failed = []
    with (
        ProcessPoolExecutor(num_processes, get_context("spawn"), _prepare_process) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(todo), desc="runs", smoothing=0.05) as bar,
    ):
        # First the base models, which the runs share.
        for started in [pool.submit(start_seed, make_testbed, folder, s) for s in seeds]:
            started.result()
        running = {pool.submit(make_run, run, make_testbed, folder): run for run in todo}
        for future in as_completed(running):
            if error := future.exception():
                failed.append(f"{running[future].name} ({type(error).__name__}: {error})")
            bar.update()
    return failed


def start_seed(make_testbed: Any, folder: Path, seed: int) -> None:
    """Make the base model of a seed, and measure it."""
    file = folder / f"base-{seed}.json"
    testbed = _testbed(make_testbed, seed)
    base_model = testbed.base_model()
    if not file.exists():
        write_json(file, {"measures": testbed.measure(base_model)})


def make_run(run: Run, make_testbed: Any, folder: Path) -> None:
    """Train a method through its stages, measure the model, and keep the result as a file."""
    testbed = _testbed(make_testbed, run.seed)
    method = METHODS[run.method].at_share(run.share)
    cost = Cost()
    with tempfile.TemporaryDirectory() as models:
        model = testbed.base_model()
        for number, (stage, factor) in enumerate(CHAINS[run.chain]):
            recipe = Recipe(
                stage=stage,
                config=testbed.config(stage),
                training=testbed.training(stage),
                capability_groups=testbed.capability_groups(),
                learning_rate=testbed.learning_rate(stage) * factor * run.learning_rate_factor,
                num_steps=run.num_steps,
                seed=run.seed,
            )
            trained = Path(models) / str(number)
            train(method, recipe, model, trained, cost)
            model = trained
        measures = testbed.measure(model)
    result = {"run": _settings(run), "measures": measures, "cost": asdict(cost)}
    write_json(folder / f"{run.name}.json", result)


@cache
def _testbed(make_testbed: Any, seed: int) -> Testbed:
    make, arguments = make_testbed
    return make(*(arguments or (seed,)))


def _prepare_process() -> None:
    """One thread, because the runs go side by side; no messages but errors."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("ogpsa_trl").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _settings(run: Run) -> dict[str, Any]:
    """All that a result follows from, as JSON keeps it; one from other settings is not used."""
    settings = {**asdict(run), "settings": asdict(METHODS[run.method].at_share(run.share))}
    return json.loads(json.dumps({**settings, "versions": package_versions("accelerate")}))


def _read(folder: Path, run: Run) -> dict[str, Any] | None:
    """The result of a run; `None`: not there, or from other settings."""
    file = folder / f"{run.name}.json"
    if not file.exists():
        return None
    result = read_json(file)
    return result if result["run"] == _settings(run) else None
