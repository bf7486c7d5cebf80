"""
Measure what safety training has done to a model: capabilities, refusals, preferences.

    ogpsa evaluate --config configs/evaluate.yaml [--key value ...]

`--help` lists every key; docs/evaluation.md says what the measures mean, and where they mislead.
"""

import gc
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_quantization_config

from ogpsa_trl.cli.command_line import given_keys
from ogpsa_trl.cli.keys import KeyParser
from ogpsa_trl.cli.paths import check_model_path, check_output_folder
from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.evaluation.arguments import ENTRY_TYPES, EvaluationArguments
from ogpsa_trl.evaluation.harness import check_installed
from ogpsa_trl.evaluation.intervals import SampleValues
from ogpsa_trl.evaluation.report import change_figure, markdown_table, result_rows
from ogpsa_trl.evaluation.results import Measured, Result, compare
from ogpsa_trl.evaluation.sets import EvaluationSets, length_for, load_sets
from ogpsa_trl.evaluation.suite import (
    MEASURES,
    ModelScores,
    score_model,
    with_preference_over_base,
)
from ogpsa_trl.training.model_kind import check_causal

PACKAGES = (
    "ogpsa_trl", "trl", "transformers", "peft", "datasets", "torch", "scipy", "lm_eval",
)  # fmt: skip
COLUMNS = [
    "measure", "unit", "good", "before", "after", "change", "interval", "verdict", "samples",
]  # fmt: skip

DIGITS = 4  # probabilities of whole refusals are small

# Where there is no terminal, rich takes a line of 80 characters for granted.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)


def main(argv: Sequence[str] | None = None) -> None:
    """An evaluation from its command line."""
    # The bars of small files and small models hide what is going on.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with user_errors():
        arguments = parse_evaluation(argv)
    run_evaluation(arguments)


def run_evaluation(arguments: EvaluationArguments) -> list[Result]:
    """
    Measure and report; all results end up in `output_dir`.

    Raises:
        SystemExit: something that the user can mend is wrong.
    """
    logging.basicConfig(format="%(message)s")
    models = {
        "before": (arguments.base_model_name_or_path, arguments.base_model_revision),
        "after": (arguments.model_name_or_path, arguments.model_revision),
    }
    models = {when: (name, revision) for when, (name, revision) in models.items() if name}
    with user_errors():
        check_output_folder(arguments.output_dir)
        for name, revision in models.values():
            check_model_path(str(name), "A model of an evaluation", adapter=True)
            check_causal(
                str(name), revision=revision, trust_remote_code=arguments.trust_remote_code
            )
        tokenizers = {
            when: load_tokenizer(arguments, str(name), revision)
            for when, (name, revision) in models.items()
        }
        max_length = length_for(
            arguments.max_length,
            {str(name): revision for name, revision in models.values()},
            trust_remote_code=arguments.trust_remote_code,
        )
        arguments = replace(arguments, max_length=max_length)
        sets = load_sets(arguments, list(tokenizers.values()))
    scores: dict[str, ModelScores] = {}
    for when, (name, revision) in models.items():
        console.print(f"Measuring {when} training: {name}")
        with user_errors():
            model = load_model(arguments, str(name), revision)
        scores[when] = score_model(model, tokenizers[when], sets, arguments)
        del model
        gc.collect()  # two large models may not fit beside each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    before = scores["before"].measures if "before" in scores else None
    after = scores["after"].measures
    if before is not None:
        after = with_preference_over_base(before, after)
    results = compare(
        before,
        after,
        num_bootstrap=arguments.num_bootstrap,
        confidence=arguments.confidence,
        seed=arguments.seed,
    )
    notes = notes_on(arguments, sets, before, after)
    write(arguments, results, sets, scores, before or {}, after, notes)
    return results


def load_tokenizer(arguments: EvaluationArguments, name: str, revision: str) -> Any:
    """The tokenizer of a model."""
    own = arguments.tokenizer_name_or_path
    return AutoTokenizer.from_pretrained(
        own or name,
        revision="main" if own else revision,
        trust_remote_code=arguments.trust_remote_code,
    )


def load_model(arguments: EvaluationArguments, name: str, revision: str) -> Any:
    """A model, by TRL's settings; of a PEFT adapter the base model with the adapter on it."""
    config = ModelConfig(
        model_name_or_path=name,
        dtype=arguments.dtype,
        load_in_8bit=arguments.load_in_8bit,
        load_in_4bit=arguments.load_in_4bit,
    )
    return AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=config.dtype,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
        quantization_config=get_quantization_config(config),
        device_map=arguments.device_map,
    )


def notes_on(
    arguments: EvaluationArguments,
    sets: EvaluationSets,
    before: Mapping[str, Measured] | None,
    after: Mapping[str, Measured],
) -> list[str]:
    """What a reader of the results has to know of this run."""
    notes = []
    for kind, groups in (
        ("harmful", sets.harmful),
        ("over-refusal", sets.over_refusal),
        ("preference", sets.preference),
    ):
        notes += [
            f"{rows.num_left_out} rows of the {kind} group `{group}` are longer than `max_length` "
            f"({arguments.max_length}) and left out."
            for group, rows in groups.items()
            if rows.num_left_out
        ]
    for name, measured in after.items():
        old = before.get(name) if before else None
        if old is None or measured.values.form != "ratio":
            continue
        counts = [float(values.columns[1].sum()) for values in (old.values, measured.values)]
        if counts[0] != counts[1]:
            notes.append(
                f"`{name}` is over {counts[0]:.0f} tokens before and {counts[1]:.0f} after: the "
                "tokenizers differ, so the two values do not compare."
            )
    num_changes = sum(name in before for name in after) if before else 0
    if num_changes > 1:
        by_chance = num_changes * (1 - arguments.confidence)
        notes.append(
            f"If nothing had changed, {by_chance:.1f} of {num_changes} independent measures would "
            "still be called better or worse, by chance."
        )
    return notes


def write(
    arguments: EvaluationArguments,
    results: Sequence[Result],
    sets: EvaluationSets,
    scores: Mapping[str, ModelScores],
    before: Mapping[str, Measured],
    after: Mapping[str, Measured],
    notes: Sequence[str],
) -> None:
    """Write all results; print the table."""
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    versions = {package: found for package in PACKAGES if (found := _version(package))}
    content = {
        "settings": asdict(arguments),
        "versions": versions,
        "notes": list(notes),
        "measures": {result.name: result.to_json() for result in results},
        "samples": {
            name: {
                "form": measured.values.form,
                "before": _values_json(before[name].values) if name in before else None,
                "after": _values_json(measured.values),
            }
            for name, measured in after.items()
        },
    }
    _write_text(output / "evaluation.json", json.dumps(content, indent=1, default=str))
    _write_text(output / "answers.jsonl", "".join(_answer_lines(sets, scores)))

    title = f"{arguments.model_name_or_path}, before and after safety training"
    if "before" not in scores:
        title = f"{arguments.model_name_or_path}"
    rows = result_rows(results, digits=DIGITS)
    columns = [c for c in COLUMNS if any(row[c] is not None for row in rows)]
    kinds = dict.fromkeys(result.name.partition("/")[0] for result in results)
    meanings = [f"* `{kind}`: {MEASURES[kind].meaning}." for kind in kinds if kind in MEASURES]
    compared = "of the change" if "before" in scores else "of the value"
    text = [
        f"# {title}",
        markdown_table(rows, columns, digits=DIGITS),
        f"Before: {arguments.base_model_name_or_path or 'not measured'}. Intervals: "
        f"{100 * arguments.confidence:g} %, {compared}, bootstrap over the samples "
        f"({arguments.num_bootstrap} resamples).",
        "\n".join(meanings),
        "\n".join(f"* {note}" for note in notes),
        ", ".join(f"{package} {found}" for package, found in versions.items()) + ".",
    ]
    _write_text(output / "evaluation.md", "\n\n".join(part for part in text if part) + "\n")

    table = Table(title=title, box=SIMPLE)
    for column in columns:
        is_number = column in ("before", "after", "change", "samples")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    console.print(table)
    for note in notes:
        console.print(note)
    written = ["evaluation.json", "evaluation.md", "answers.jsonl"]
    if any(result.delta is not None for result in results):
        change_figure(
            results,
            output / "evaluation.png",
            title=title,
            confidence=arguments.confidence,
            digits=DIGITS,
        )
        written.append("evaluation.png")
    console.print(f"In {output}: {', '.join(written)}")


def _values_json(values: SampleValues) -> dict[str, Any]:
    content: dict[str, Any] = {
        "ids": list(values.ids),
        "columns": [column.tolist() for column in values.columns],
    }
    return content if values.items is None else content | {"items": list(values.items)}


def _answer_lines(sets: EvaluationSets, scores: Mapping[str, ModelScores]) -> list[str]:
    """The prompts with the answers of all models, for reading: a keyword is no judge."""
    lines = []
    groups = {f"refusal_rate/{group}": rows for group, rows in sets.harmful.items()}
    groups |= {f"over_refusal_rate/{group}": rows for group, rows in sets.over_refusal.items()}
    for name, rows in groups.items():
        for index, key in enumerate(rows.ids):
            line = {"measure": name, "id": key, "prompt": rows.rows[index]["prompt"]}
            for when, scored in scores.items():
                if name in scored.answers:
                    refused = bool(scored.measures[name].values.columns[0][index])
                    line |= {when: scored.answers[name][index], f"{when}_refused": refused}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.{DIGITS}f}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def parse_evaluation(args: Sequence[str] | None = None) -> EvaluationArguments:
    """
    Parse the command line and the YAML file that `--config` names; the command line wins.

    Raises:
        ValueError: a key is unknown, a value is not allowed, there is nothing to measure, or
            tasks are asked for and lm-eval is not installed.
    """
    texts = list[str] | None  # `None`: without entries
    parser = KeyParser(
        EvaluationArguments,
        "Measure what safety training has done to a model.",
        prog="ogpsa evaluate",
        types={"refusals": texts, "lm_eval_tasks": texts},
    )
    [arguments] = parser.parse(given_keys(args))
    if not arguments.model_name_or_path:
        raise ValueError(
            "An evaluation needs a model, but `model_name_or_path` is not set. Set it to a name on "
            "the Hub or a folder."
        )
    if not any(getattr(arguments, key) for key in (*ENTRY_TYPES, "lm_eval_tasks")):
        raise ValueError(
            f"There is nothing to measure: `{'`, `'.join(ENTRY_TYPES)}` and `lm_eval_tasks` are "
            "all empty. Set at least one."
        )
    if arguments.lm_eval_tasks:
        check_installed()
    return arguments
