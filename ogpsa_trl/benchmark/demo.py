"""
Show OGPSA on a small world of its own: no downloads, minutes on two CPU cores.

    make demo          or          ogpsa demo [--seed 0] [--output runs/demo]

Pretrains a tiny base model (once, then cached), trains it with plain TRL and with OGPSA, SFT and
then DPO, as `ogpsa train` does, and prints what each of them can do before and after.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import datasets
import transformers

from ogpsa_trl.benchmark.data import write_world
from ogpsa_trl.benchmark.testbed import evaluation_of
from ogpsa_trl.benchmark.toy_pretrain import base_model_folder
from ogpsa_trl.benchmark.toy_world import ToyWorld
from ogpsa_trl.data.files import find_config
from ogpsa_trl.evaluation.figures import comparison_figure
from ogpsa_trl.evaluation.json_files import in_words, package_versions, read_json, write_json
from ogpsa_trl.evaluation.models import load_folder
from ogpsa_trl.evaluation.tables import markdown_table

STAGES = ("sft", "dpo")
# What a method adds to the command line of a stage.
METHODS = {"plain TRL": ["--ogpsa", "false"], "OGPSA": []}
TITLE = "OGPSA on the toy world"
SHOWN = ("exact_match/", "p_refuse/", "p_over_refuse/")  # beginnings of measures
NOTES = """\
`exact_match`: share of held-out prompts that are answered exactly; `sort` is in no capability
group. `p_refuse`: mean probability of the refusal to held-out harmful requests, with the verbs of
safety training and with new ones; `p_over_refuse`: to benign look-alikes.
One seed of a toy world: it shows how to use the library, not how good the method is."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("ogpsa demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of training")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    args = parser.parse_args(argv)

    # The bars of small files and small models hide what is going on.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    world = ToyWorld(args.seed)
    output = args.output / f"seed-{args.seed}"  # finished runs are kept: not those of another seed
    print("Base model of the toy world (about two minutes, once):")
    base_model = base_model_folder(args.seed)
    data = output / "data"
    write_world(world, data)
    num_cores = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    num_threads = max(1, num_cores // len(METHODS))
    measuring = Lock()
    results = {}

    def measure(name: str, model: Path, folder: Path) -> None:
        """Once: the measures are kept in a file, and say that a model is finished."""
        file = folder / "measures.json"
        with measuring:
            if not file.exists():
                evaluation = evaluation_of(str(data / "evaluate.yaml"), str(base_model))
                found = evaluation.scores(*load_folder(model)).measures
                shown = {n: m.values.value for n, m in found.items() if n.startswith(SHOWN)}
                write_json(file, shown)
            results[name] = read_json(file)

    def train_by(method: str) -> None:
        """Every stage by one method, each from the output of the one before."""
        model = base_model
        for stage in STAGES:
            name = f"{stage.upper()}, {method}"
            folder = output / name.replace(", ", "-").replace(" ", "-").lower()
            if not (folder / "measures.json").exists():
                print(f"Training: {name}")
                options = ["--model_name_or_path", str(model), "--output_dir", str(folder)]
                options += ["--seed", str(args.seed), *METHODS[method]]
                train(data / f"{stage}.yaml", options, folder / "log.txt", num_threads)
            measure(name, folder, folder)
            model = folder

    measure("base", base_model, output / "base")
    # Side by side: much of a short training is the start of its process.
    with ThreadPoolExecutor(len(METHODS)) as pool:
        list(pool.map(train_by, METHODS))  # raises what one of them did
    names = [f"{stage.upper()}, {method}" for stage in STAGES for method in METHODS]
    report({name: results[name] for name in ("base", *names)}, output)


def train(config: Path, options: Sequence[str], log: Path, num_threads: int) -> None:
    """
    Train as `ogpsa train` does, on one process; its output goes into a file.

    Raises:
        RuntimeError: training failed; the message holds the end of the output.
    """
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(find_config("single", "accelerate")),
        "-m", "ogpsa_trl.cli.train", "--config", str(config), *options,
    ]  # fmt: skip
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
        result = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if result.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise RuntimeError(f"{config.name} failed, see {log}:\n{tail}")


def report(results: dict[str, dict[str, float]], output: Path) -> None:
    """Print the table; write it as Markdown and as a picture beside the runs."""
    # Measures down, models across: narrow enough for a terminal.
    across = [
        {"": measure} | {model: values[measure] for model, values in results.items()}
        for measure in results["base"]
    ]
    print(f"\n{TITLE}\n\n{markdown_table(across, style='simple')}\n")
    table = markdown_table([{"model": model, **values} for model, values in results.items()])
    parts = [f"# {TITLE}", table, NOTES, in_words(package_versions("accelerate"))]
    (output / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    picture = comparison_figure(
        results, output / "results.png", lower_is_better=["p_over_refuse/howto"], title=TITLE
    )
    print(f"Table and picture: {output / 'results.md'}, {picture}")
