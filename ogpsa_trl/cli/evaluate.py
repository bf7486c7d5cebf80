"""
Measure what safety training has done to a model: capabilities, refusals, preferences.

    ogpsa evaluate --config configs/evaluate.yaml [--key value ...]

`--help` lists every key; docs/benchmark.md says what the measures mean, and where they mislead.
"""

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoTokenizer
from trl.trainer.model_config import ModelConfig

from ogpsa_trl.cli.command_line import given_keys
from ogpsa_trl.cli.keys import KeyParser
from ogpsa_trl.cli.paths import check_model_path, check_output_folder
from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.data.entries import entry_types
from ogpsa_trl.evaluation.evaluation_keys import EvaluationArguments
from ogpsa_trl.evaluation.figures import change_figure
from ogpsa_trl.evaluation.harness import check_installed
from ogpsa_trl.evaluation.intervals import SampleValues
from ogpsa_trl.evaluation.json_files import in_words, package_versions, write_json, write_rows
from ogpsa_trl.evaluation.models import length_for, load_model
from ogpsa_trl.evaluation.results import Measured, Result, compare
from ogpsa_trl.evaluation.sets import EvaluationSets, load_sets
from ogpsa_trl.evaluation.suite import (
    MEASURES,
    ModelScores,
    score_model,
    with_preference_over_base,
)
from ogpsa_trl.evaluation.tables import markdown_table, result_rows
from ogpsa_trl.training.model_kind import check_causal

DIGITS = 4  # probabilities of whole refusals are small


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
    named = {
        "before": (arguments.base_model_name_or_path, arguments.base_model_revision),
        "after": (arguments.model_name_or_path, arguments.model_revision),
    }
    models = {when: (name, revision) for when, (name, revision) in named.items() if name}
    trusted: Any = {"trust_remote_code": arguments.trust_remote_code}
    with user_errors():
        check_output_folder(arguments.output_dir)
        for name, revision in models.values():
            check_model_path(name, "A model of an evaluation", adapter=True)
            check_causal(name, revision=revision, **trusted)
        own = arguments.tokenizer_name_or_path
        tokenizers = {
            when: AutoTokenizer.from_pretrained(
                own or name, revision="main" if own else revision, **trusted
            )
            for when, (name, revision) in models.items()
        }
        max_length = length_for(arguments.max_length, dict(models.values()), **trusted)
        arguments = replace(arguments, max_length=max_length)
        sets = load_sets(arguments, list(tokenizers.values()))
    scores: dict[str, ModelScores] = {}
    start_model = None
    for when, (name, revision) in models.items():
        print(f"Measuring {when} training: {name}")
        config = ModelConfig(
            model_name_or_path=name,
            model_revision=revision,
            dtype=arguments.dtype,
            attn_implementation=arguments.attn_implementation,
            load_in_8bit=arguments.load_in_8bit,
            load_in_4bit=arguments.load_in_4bit,
        )
        with user_errors():
            model = load_model(config, device_map=arguments.device_map, **trusted)
        scores[when] = score_model(model, tokenizers[when], sets, arguments, start_model)
        start_model = model if arguments.drift else None
        del model
        gc.collect()  # two large models may not fit beside each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    before = scores["before"].measures if "before" in scores else None
    after = scores["after"].measures
    if before is not None:
        after = with_preference_over_base(before, after)
    results = compare(
        before, after, num_bootstrap=arguments.num_bootstrap, confidence=arguments.confidence,
        seed=arguments.seed,
    )  # fmt: skip
    notes = list(notes_on(arguments, sets, before or {}, after))
    write(arguments, results, sets, scores, after, notes)
    return results


def notes_on(
    arguments: EvaluationArguments,
    sets: EvaluationSets,
    before: Mapping[str, Measured],
    after: Mapping[str, Measured],
) -> Iterator[str]:
    """What a reader of the results has to know of this run."""
    kinds = {
        "harmful": sets.harmful, "over-refusal": sets.over_refusal, "preference": sets.preference
    }  # fmt: skip
    for kind, groups in kinds.items():
        for group, rows in groups.items():
            if rows.num_left_out:
                yield (
                    f"{rows.num_left_out} rows of the {kind} group `{group}` are longer than "
                    f"`max_length` ({arguments.max_length}) and left out."
                )
    compared = [name for name in after if name in before]
    for name in compared:
        if after[name].values.form == "ratio":
            old, new = (float(m[name].values.columns[1].sum()) for m in (before, after))
            if old != new:
                yield (
                    f"`{name}` is over {old:.0f} tokens before and {new:.0f} after: the "
                    "tokenizers differ, so the two values do not compare."
                )
    if len(compared) > 1:
        by_chance = len(compared) * (1 - arguments.confidence)
        yield (
            f"If nothing had changed, {by_chance:.1f} of {len(compared)} independent measures "
            "would still be called better or worse, by chance."
        )


def write(
    arguments: EvaluationArguments,
    results: Sequence[Result],
    sets: EvaluationSets,
    scores: Mapping[str, ModelScores],
    after: Mapping[str, Measured],
    notes: Sequence[str],
) -> None:
    """Write all results; print the table."""
    output = Path(arguments.output_dir)
    has_before = "before" in scores
    before = scores["before"].measures if has_before else {}
    versions = package_versions("peft", "datasets", "scipy", "lm_eval")
    content = {
        "settings": asdict(arguments),
        "versions": versions,
        "notes": notes,
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
    write_json(output / "evaluation.json", content)
    write_rows(output / "answers.jsonl", answer_rows(sets, scores))

    title = arguments.model_name_or_path
    title += ", before and after safety training" if has_before else ""
    rows = result_rows(results, digits=DIGITS)
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    kinds = dict.fromkeys(result.name.partition("/")[0] for result in results)
    text = [
        f"# {title}",
        markdown_table(rows, columns, digits=DIGITS),
        f"Before: {arguments.base_model_name_or_path or 'not measured'}. Intervals: "
        f"{100 * arguments.confidence:g} %, of the {'change' if has_before else 'value'}, "
        f"bootstrap over the samples ({arguments.num_bootstrap} resamples).",
        "\n".join(f"* `{kind}`: {MEASURES[kind].meaning}." for kind in kinds if kind in MEASURES),
        "\n".join(f"* {note}" for note in notes),
        in_words(versions),
    ]
    markdown = "\n\n".join(part for part in text if part) + "\n"
    (output / "evaluation.md").write_text(markdown, encoding="utf-8")
    print(f"\n{title}\n\n{markdown_table(rows, columns, digits=DIGITS, style='simple')}\n")
    print(*notes, sep="\n")
    written = ["evaluation.json", "evaluation.md", "answers.jsonl"]
    if any(result.delta is not None for result in results):
        written.append("evaluation.png")
        change_figure(
            results, output / written[-1], title=title, confidence=arguments.confidence,
            digits=DIGITS,
        )  # fmt: skip
    print(f"In {output}: {', '.join(written)}")


def _values_json(values: SampleValues) -> dict[str, Any]:
    content: dict[str, Any] = {
        "ids": list(values.ids),
        "columns": [column.tolist() for column in values.columns],
    }
    return content if values.items is None else content | {"items": list(values.items)}


def answer_rows(
    sets: EvaluationSets, scores: Mapping[str, ModelScores]
) -> Iterator[dict[str, Any]]:
    """The prompts with the answers of all models, for reading: a keyword is no judge."""
    groups = {f"refusal_rate/{group}": rows for group, rows in sets.harmful.items()}
    groups |= {f"over_refusal_rate/{group}": rows for group, rows in sets.over_refusal.items()}
    for name, rows in groups.items():
        for index, key in enumerate(rows.ids):
            line = {"measure": name, "id": key, "prompt": rows.rows[index]["prompt"]}
            for when, scored in scores.items():
                if name in scored.answers:
                    refused = bool(scored.measures[name].values.columns[0][index])
                    line |= {when: scored.answers[name][index], f"{when}_refused": refused}
            yield line


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
    lists = entry_types(parser.hints)
    if not any(getattr(arguments, key) for key in (*lists, "lm_eval_tasks")):
        raise ValueError(
            f"There is nothing to measure: `{'`, `'.join(lists)}` and `lm_eval_tasks` are "
            "all empty. Set at least one."
        )
    if arguments.lm_eval_tasks:
        check_installed()
    return arguments
