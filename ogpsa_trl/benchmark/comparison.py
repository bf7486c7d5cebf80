"""Plain TRL against OGPSA, through scripts/train.py on the same data, seeds and steps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from threading import Lock
from typing import Any

import datasets
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ogpsa_trl.data.files import find_config
from ogpsa_trl.evaluation.report import comparison_figure, markdown_table

# What a method adds to the command line of a stage.
METHODS = {"plain TRL": ["--ogpsa", "false"], "OGPSA": []}

# Takes the measures of a model, given the model that its stage started from (the base model: none).
Measure = Callable[[Path, Path | None], dict[str, float]]
Results = Mapping[str, Mapping[str, float]]

# Where there is no terminal, rich takes a line of 80 characters for granted.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


# The bars of small files and small models hide what is going on.
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class StageRun:
    """One training stage: its name, its configuration file and more of its command line."""

    name: str
    config: Path
    options: Sequence[str] = ()


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


def compare(
    base_model: Path,
    stages: Sequence[StageRun],
    measure: Measure,
    output: Path,
    methods: Mapping[str, Sequence[str]] = METHODS,
) -> dict[str, dict[str, float]]:
    """
    Train every stage by every method, each stage from the output of the one before, and measure.

    The methods train side by side: much of a short training is the start of its process. A finished
    model (its folder holds measures.json) is kept and not trained again.

    Returns:
        The measures of the base model and of every stage and method, by a readable name.
    """
    results = {"base": _measured(base_model, None, output / "base", measure)}
    num_cores = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    num_threads = max(1, num_cores // len(methods))
    measuring = Lock()

    def run(method: str) -> None:
        model = base_model
        for stage in stages:
            name = f"{stage.name}, {method}"
            folder = output / name.replace(", ", "-").replace(" ", "-").lower()
            if not (folder / "measures.json").exists():
                console.print(f"Training: {name}")
                options = ["--model_name_or_path", str(model), "--output_dir", str(folder)]
                options += [*stage.options, *methods[method]]
                train(stage.config, options, folder / "log.txt", num_threads)
            with measuring:
                results[name] = _measured(folder, model, folder, measure)
            model = folder

    with ThreadPoolExecutor(len(methods)) as pool:
        list(pool.map(run, methods))  # raises what one of them did
    names = [f"{stage.name}, {method}" for stage in stages for method in methods]
    return {name: results[name] for name in ("base", *names)}


def _measured(model: Path, start: Path | None, folder: Path, measure: Measure) -> dict[str, float]:
    """The measures of a model, kept in a file, so that they are taken once."""
    file = folder / "measures.json"
    if not file.exists():
        measures = measure(model, start)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measures, indent=1), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def report(
    runs: Sequence[Results],
    output: Path,
    title: str,
    lower_is_better: Sequence[str],
    notes: str = "",
) -> None:
    """
    Print the table; write it as Markdown and as a picture beside the runs.

    Args:
        runs: What `compare` returned, once per seed. Of several the table shows mean +- standard
            deviation, and the picture the mean.
        output: Folder of the table and the picture.
        title: Heading of both.
        lower_is_better: The measures of which less is better.
        notes: Text below the table.
    """
    rows: list[dict[str, Any]] = []
    means: dict[str, dict[str, float]] = {}
    for model in runs[0]:
        values = {name: [run[model][name] for run in runs] for name in runs[0][model]}
        means[model] = {name: mean(seeds) for name, seeds in values.items()}
        rows.append({"model": model} | {name: _cell(seeds) for name, seeds in values.items()})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    # Measures down, models across: narrow enough for a terminal.
    table = Table(title=title, box=SIMPLE)
    for heading in ("", *(row["model"].replace(" ", "\n") for row in rows)):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for column in columns[1:]:
        table.add_row(column, *(row.get(column, "-").replace(" +- ", "\n+- ") for row in rows))
    console.print(table)
    seeds = f"Mean +- standard deviation over {len(runs)} seeds. " if len(runs) > 1 else ""
    markdown = [f"# {title}", markdown_table(rows, columns), notes, f"{seeds}{_versions()}"]
    (output / "results.md").write_text("\n\n".join(markdown) + "\n", encoding="utf-8")
    comparison_figure(means, output / "results.png", lower_is_better=lower_is_better, title=title)
    console.print(f"Table and picture: {output / 'results.md'}, {output / 'results.png'}")


def _cell(values: Sequence[float]) -> str:
    spread = f" +- {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file that appears complete or not at all."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.rename(file)


def package_versions() -> dict[str, str]:
    """The versions that a result belongs to."""
    packages = ("ogpsa_trl", "trl", "transformers", "accelerate", "torch")
    return {package: version(package) for package in packages}


def _versions() -> str:
    return ", ".join(f"{name} {number}" for name, number in package_versions().items()) + "."
