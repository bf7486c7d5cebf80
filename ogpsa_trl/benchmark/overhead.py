"""
What does OGPSA cost over plain TRL, in time and in memory?

    ogpsa benchmark overhead                                  some minutes on a CPU
    ogpsa benchmark overhead --sizes 10M 100M --ranks 1 2 4 8
    ogpsa benchmark overhead --sizes 0.5B --accumulations 4 --engines single fsdp2

The first value of every option makes the first cell; each further value is measured with all
others as they are there, or with --grid in all combinations. A cell is measured in a process of its
own, in which the steps of plain TRL, of OGPSA, and of OGPSA as the published code does it take
turns, so that whatever else the machine does falls on all of them. Figures are medians; ratios are
medians of the ratios within a turn.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ogpsa_trl.benchmark.overhead_cell import LENGTH, SIZES, Cell
from ogpsa_trl.data.files import find_config, shipped_configs
from ogpsa_trl.evaluation.figures import new_figure, saved
from ogpsa_trl.evaluation.json_files import in_words, package_versions, read_json, write_json
from ogpsa_trl.evaluation.tables import markdown_table

# The option of each field of a cell, and what it may be.
OPTIONS = {
    "sizes": "size", "ranks": "rank", "targets": "target", "scopes": "scope", "metrics": "metric",
    "capability_losses": "capability_loss", "basis_dtypes": "basis_dtype",
    "accumulations": "accumulation",
    "capability_samples": "capability_samples", "engines": "engine",
}  # fmt: skip
CHOICES: dict[str, Sequence[str]] = {
    "sizes": list(SIZES), "targets": ["gradient", "update"], "scopes": ["model", "parameter"],
    "metrics": ["euclidean", "optimizer"], "capability_losses": ["nll", "kl"],
    "basis_dtypes": ["float32", "bfloat16"],
    "engines": ["single", *(e for e in shipped_configs("accelerate") if e != "single")],
}  # fmt: skip
# The default of OGPSA, whose refreshes see a quarter of the tokens of a step of 16 sequences.
DEFAULT = Cell(
    target="update", metric="optimizer", capability_loss="kl", basis_dtype="bfloat16",
    capability_samples=4,
)  # fmt: skip
# Settings that only mean something together: the default, and what lies on the way to it.
DEFAULT_CELLS = [
    Cell(),
    Cell(scope="parameter"),
    Cell(rank=8, capability_samples=64),
    Cell(accumulation=4),
    Cell(target="update"),
    DEFAULT,
    replace(DEFAULT, size="34M"),
    Cell(size="34M"),
]
# A run as published: a refresh of two groups of 200 samples every 30 steps of SFT.
PUBLISHED_INTERVAL, PUBLISHED_SAMPLES = 30, 400


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    versions = package_versions("accelerate")
    results = []
    with tqdm(total=len(args.cells) * 3, desc="measurements") as bar:
        for cell in args.cells:
            result = measure(cell)
            bar.update()
            for arm in ("plain", "ogpsa"):
                result[f"peak {arm}"] = measure(cell, arm)["peak"]
                bar.update()
            results.append(result)
            write_json(args.output / "results.json", {"cells": results, "versions": versions})
    imports = measure_imports(args.repeats)
    write_json(
        args.output / "results.json", {"cells": results, "versions": versions, "imports": imports}
    )
    rows = [row_of(result) for result in results]
    machine = results[0]["device"]
    if machine == "CPU":
        machine += f", {results[0]['threads']} threads"
    machine += f", {os.cpu_count()} cores"
    parts = [
        "# The overhead of OGPSA over plain TRL",
        f"{machine}. {in_words(versions)}",
        markdown_table(rows),
        f"Importing ogpsa_trl takes {imports['ogpsa_trl']:.2f} s, importing trl's trainers "
        f"{imports['trl']:.2f} s: ratio {imports['ratio']:.3f}.",
    ]
    (args.output / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    sizes = [result["basis_bytes"] / 1e6 for result in results]
    draw(rows, sizes, args.output / "overhead.png", f"OGPSA over plain TRL: {machine}")
    print(markdown_table(rows, style="simple"))
    print(f"\nTable, picture and all times: {args.output}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "ogpsa benchmark overhead",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, name in OPTIONS.items():
        default = getattr(Cell, name)
        parser.add_argument(
            f"--{option}", nargs="+", type=type(default), choices=CHOICES.get(option),
            help=f"{name.replace('_', ' ')} of a cell; default: {default}",
        )  # fmt: skip
    parser.add_argument("--grid", action="store_true", help="all combinations of the values")
    parser.add_argument("--tokens", type=int, default=Cell.tokens, help="of a step and process")
    parser.add_argument("--repeats", type=int, default=Cell.repeats)
    parser.add_argument("--output", type=Path, default=Path("runs/overhead"))
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, but got {args.repeats}")
    given = {name: getattr(args, option) for option, name in OPTIONS.items()}
    given = {name: values for name, values in given.items() if values}
    cells = DEFAULT_CELLS if not given else _cells(given, is_grid=args.grid)
    args.cells = [replace(cell, repeats=args.repeats, tokens=args.tokens) for cell in cells]
    for cell in args.cells:
        try:
            cell.config()
        except ValueError as error:
            parser.error(f"{_label(cell)}: {error}")
        least = LENGTH * max(cell.accumulation, 2)
        if args.tokens < least:
            parser.error(f"--tokens must be at least {least}, a sample a pass, got {args.tokens}")
        if cell.engine != "single" and not torch.cuda.is_available():
            parser.error(f"--engines {cell.engine} needs GPUs, but there is none: use single")
    return args


def _cells(given: dict[str, list[Any]], *, is_grid: bool) -> list[Cell]:
    if is_grid:
        combinations = itertools.product(*given.values())
        return [replace(Cell(), **dict(zip(given, values, strict=True))) for values in combinations]
    first = replace(Cell(), **{name: values[0] for name, values in given.items()})
    others = [replace(first, **{name: v}) for name, values in given.items() for v in values[1:]]
    return [first, *others]


def measure(cell: Cell, arm: str | None = None) -> dict[str, Any]:
    """
    Measure a cell in a process of its own, or in several that accelerate launches.

    Raises:
        RuntimeError: it failed; the message holds the end of what it said.
    """
    command = [sys.executable]
    if cell.engine != "single":
        config = find_config(cell.engine, "accelerate")
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command += ["-m", "ogpsa_trl.benchmark.overhead_cell", json.dumps(asdict(cell))]
        command += [str(output), *(["--memory", arm] if arm else [])]
        # The C library of Linux gives memory back at once, instead of keeping it.
        at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"} if arm else {}
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | at_once
        )
        if process.returncode != 0 or not output.exists():
            tail = "\n".join(process.stderr.splitlines()[-15:])
            raise RuntimeError(f"The cell {_label(cell)} failed:\n{tail}")
        return read_json(output)


def measure_imports(repeats: int) -> dict[str, float]:
    """Seconds of importing the package and TRL's trainers in new processes, turn by turn."""
    statements = {
        "trl": "from trl import DPOTrainer, SFTTrainer",
        "ogpsa_trl": "from ogpsa_trl import OGPSADPOTrainer, OGPSASFTTrainer",
    }
    code = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    for turn in range(repeats + 1):
        for name, statement in statements.items():
            process = subprocess.run(
                [sys.executable, "-c", code.format(statement)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            if turn > 0:  # the first finds the files on disk
                seconds[name].append(float(process.stdout.split()[-1]))
    ratio = _median_ratio(seconds["ogpsa_trl"], seconds["trl"])
    return {name: statistics.median(values) for name, values in seconds.items()} | {"ratio": ratio}


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """What a table says of a cell."""
    cell, seconds = Cell(**result["cell"]), result["seconds"]
    medians = {name: statistics.median(values) for name, values in seconds.items() if values}
    num_sequences = cell.batch_size * cell.accumulation
    # Plain training's passes over as many tokens as a refresh has, on as many processes.
    of_plain = cell.capability_samples / num_sequences / result["processes"]
    refresh = _median_ratio(seconds["refresh"], seconds["forward and backward"]) / of_plain
    # The published run: what it adds to the compute that it cannot do without.
    plain_run = PUBLISHED_INTERVAL * medians["plain"]
    of_sample = medians["forward and backward"] / num_sequences / result["processes"]
    needed = plain_run + PUBLISHED_SAMPLES * of_sample
    # Its passes grow with the samples, what makes a basis of them does not.
    passes = medians["refresh"] - medians["basis"]
    refresh_of_all = passes * PUBLISHED_SAMPLES / cell.capability_samples + medians["basis"]
    run = plain_run + PUBLISHED_INTERVAL * medians["projection"] + refresh_of_all
    row = {
        "cell": _label(cell),
        "parameters, M": round(result["parameters"] / 1e6, 1),
        "tokens/s": round(num_sequences * LENGTH * result["processes"] / medians["plain"]),
        "plain step, ms": round(1e3 * medians["plain"]),
        "step / plain": _median_ratio(seconds["ogpsa"], seconds["plain"]),
        "projection, ms": round(1e3 * medians["projection"], 1),
        "projection / plain": 1 + medians["projection"] / medians["plain"],
        "refresh, ms": round(1e3 * medians["refresh"]),
        "refresh / plain passes": refresh,
        "run, K = 1": _median_ratio(
            [sum(both) for both in zip(seconds["ogpsa"], seconds["refresh"], strict=True)],
            seconds["plain"],
        ),
        "run, K = 30": run / needed,
        "memory / basis": (result["peak ogpsa"] - result["peak plain"]) / result["basis_bytes"],
        "basis, MB": round(result["basis_bytes"] / 1e6),
    }
    if result["bytes_moved"]:
        row["moved / needed"] = result["bytes_moved"] / _needed_bytes(cell, result)
    if "hooks" in medians:
        row["official hooks / plain"] = _median_ratio(seconds["hooks"], seconds["plain"])
    return row


def _needed_bytes(cell: Cell, result: dict[str, Any]) -> int:
    """
    Bytes that a step has to read and write: the basis twice, and of the gradient, in float32, two
    reads and a write. Of an update: the weights before are copied, both are read, and the new ones
    once more and written; in the optimizer's metric its second moment is read three times.
    """
    num_vectors = 3 if cell.target == "gradient" else 6 + 3 * (cell.metric == "optimizer")
    return 2 * result["basis_bytes"] + num_vectors * 4 * result["parameters"]


def draw(rows: Sequence[dict[str, Any]], sizes: Sequence[float], path: Path, title: str) -> None:
    """The ratios of all cells, and how the projection grows with the basis, in MB."""
    figure = new_figure(12, 1.6 + 0.45 * len(rows))
    bars, growth = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [row["cell"] for row in rows]
    kinds = {
        "projection / plain": ("step without a refresh", 1.03, "#0072b2"),
        "refresh / plain passes": ("refresh", 1.10, "#e69f00"),
        "run, K = 30": ("published run", 1.03, "#009e73"),
    }
    for place, (key, (label, target, colour)) in enumerate(kinds.items()):
        heights = [number + 0.27 * (place - 1) for number in range(len(rows))]
        values = [row[key] for row in rows]
        bars.barh(heights, [v - 1 for v in values], 0.25, left=1, color=colour, label=label)
        bars.axvline(target, color=colour, linewidth=0.8, linestyle=":")
    bars.axvline(1, color="#333333", linewidth=0.8)
    bars.set_yticks(range(len(rows)), names)
    bars.yaxis.set_inverted(True)
    bars.set_xlabel("ratio to plain TRL (dotted: the target)")
    bars.legend(frameon=False, fontsize=8)
    growth.scatter(sizes, [row["projection, ms"] for row in rows], color="#0072b2")
    for size, row in zip(sizes, rows, strict=True):
        growth.annotate(
            row["cell"], (size, row["projection, ms"]), fontsize=6,
            xytext=(4, 3), textcoords="offset points",
        )  # fmt: skip
    growth.set(xlabel="basis, MB", ylabel="projection of a step, ms", xscale="log", yscale="log")
    for axes in (bars, growth):
        axes.spines[["top", "right"]].set_visible(False)
    saved(figure, path, title)


def _label(cell: Cell) -> str:
    """Size, rank and target, and what is not as in most cells."""
    words = [cell.size, f"rank {cell.rank}", cell.target]
    usual = {
        "scope": "model", "metric": "euclidean", "engine": "single", "capability_loss": "nll",
        "basis_dtype": "float32",
    }  # fmt: skip
    words += [getattr(cell, name) for name, value in usual.items() if getattr(cell, name) != value]
    if cell.accumulation > 1:
        words.append(f"{cell.accumulation} passes")
    if cell.capability_samples != Cell.capability_samples:
        words.append(f"{cell.capability_samples} samples")
    return ", ".join(words)


def _median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(v / other for v, other in zip(values, others, strict=True))
