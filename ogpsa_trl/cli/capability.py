"""
Build capability groups for training from data of your own, and from your model itself.

    ogpsa capability --config configs/capability_set.yaml [--key value ...]

Samples each group, lets the starting model complete prompts, writes one JSON lines file for each
group and a report on them, and prints what to put into a training configuration. `--help` lists
every key; docs/capability_data.md says how to choose.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import transformers
from peft import get_peft_model
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from ogpsa_trl.capability_set.arguments import CapabilitySetArguments
from ogpsa_trl.capability_set.checks import warnings_of
from ogpsa_trl.capability_set.measures import gradient_cosines, measure_group
from ogpsa_trl.capability_set.report import (
    GROUP_COLUMNS,
    LEGEND,
    PAIR_COLUMNS,
    content,
    group_rows,
    left_out,
    markdown,
    pair_rows,
    training_entries,
)
from ogpsa_trl.capability_set.rows import choose_rows, complete_rows, known_prompts, write_group
from ogpsa_trl.cli.command_line import given_keys
from ogpsa_trl.cli.keys import KeyParser
from ogpsa_trl.cli.paths import check_model_path, check_output_folder
from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.evaluation.sets import length_for
from ogpsa_trl.training.model_kind import check_causal

PACKAGES = ("ogpsa_trl", "trl", "transformers", "peft", "datasets", "torch")

# Where there is no terminal, rich takes a line of 80 characters for granted.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)


def main(argv: Sequence[str] | None = None) -> None:
    """A capability set from its command line."""
    # The bars of small files and small models hide what is going on.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with user_errors():
        parsed = parse_capability_set(argv)
    build_capability_set(*parsed)


def build_capability_set(
    arguments: CapabilitySetArguments, model_config: ModelConfig
) -> dict[str, Any]:
    """
    Build, measure, write and report; everything ends up in `output_dir`.

    Raises:
        SystemExit: something that the user can mend is wrong.
    """
    logging.basicConfig(format="%(message)s")
    with user_errors():
        check_output_folder(arguments.output_dir)
        check_model_path(str(model_config.model_name_or_path))
        check_causal(
            str(model_config.model_name_or_path),
            revision=model_config.model_revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(model_config.model_name_or_path),
            revision=model_config.model_revision,
            trust_remote_code=arguments.trust_remote_code,
        )
        max_length = length_for(
            arguments.max_length,
            {str(model_config.model_name_or_path): model_config.model_revision},
            trust_remote_code=arguments.trust_remote_code,
        )
        arguments = replace(arguments, max_length=max_length)
        groups = choose_rows(arguments, tokenizer)
        safety_prompts = known_prompts(arguments.harmful_datasets)
        model = load_model(arguments, model_config)
    paths = {}
    for group in groups:
        console.print(f"Group {group.name}: {len(group.rows)} samples chosen")
        complete_rows(group, arguments, model, tokenizer)
        paths[group.name] = write_group(group, arguments.output_dir)
    measures = {group.name: measure_group(group, model, tokenizer, arguments) for group in groups}
    cosines = None
    if arguments.gradient_cosine:
        adapter = get_peft_config(model_config)
        transformers.set_seed(arguments.seed)
        measured = model if adapter is None else get_peft_model(model, adapter)
        cosines = gradient_cosines(groups, measured, tokenizer, arguments)
    warnings = warnings_of(groups, measures, cosines, arguments, safety_prompts)
    figures = content(groups, paths, measures, cosines, warnings)
    write_report(arguments, model_config, figures)
    print_report(figures, paths, Path(arguments.output_dir))
    return figures


def load_model(arguments: CapabilitySetArguments, config: ModelConfig) -> Any:
    """The model that training starts with, by TRL's settings."""
    return AutoModelForCausalLM.from_pretrained(
        str(config.model_name_or_path),
        revision=config.model_revision,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
        quantization_config=get_quantization_config(config),
        device_map=arguments.device_map,
    )


def write_report(
    arguments: CapabilitySetArguments, model_config: ModelConfig, figures: Mapping[str, Any]
) -> None:
    """Write report.json and report.md."""
    output = Path(arguments.output_dir)
    versions = {package: version(package) for package in PACKAGES}
    settings = asdict(arguments) | asdict(model_config)
    everything = {"settings": settings, "versions": versions, **figures}
    (output / "report.json").write_text(
        json.dumps(everything, indent=1, default=str, ensure_ascii=False), encoding="utf-8"
    )
    title = f"Capability groups for {model_config.model_name_or_path}"
    text = markdown(figures, title, versions, arguments.seed)
    (output / "report.md").write_text(text, encoding="utf-8")


def print_report(figures: Mapping[str, Any], paths: Mapping[str, Path], output: Path) -> None:
    """Print the tables, the warnings, and what to put into a training configuration."""
    print_table(group_rows(figures), GROUP_COLUMNS)
    if figures["cosines"]:
        print_table(pair_rows(figures), PAIR_COLUMNS)
    console.print(LEGEND)
    for name, text in left_out(figures).items():
        console.print(f"Left out of {name}: {text}.", markup=False)
    for warning in figures["warnings"]:
        console.print(f"Warning: {warning}", markup=False)
    console.print(f"In {output}: report.md, report.json, and the groups. For training:\n")
    console.print(training_entries(paths), markup=False)


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A table for the terminal."""
    table = Table(box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="left" if column.startswith("group") else "right")
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def parse_capability_set(
    args: Sequence[str] | None = None,
) -> tuple[CapabilitySetArguments, ModelConfig]:
    """
    Parse the command line and the YAML file that `--config` names; the command line wins.

    Raises:
        ValueError: a key is unknown, a value is not allowed, or there is no model or no data.
    """
    parser = KeyParser(
        (CapabilitySetArguments, ModelConfig),
        "Build capability groups for training, and measure them.",
        prog="ogpsa capability",
        types={"generate_completions": str | bool},
    )
    arguments, model = parser.parse(given_keys(args))
    if not model.model_name_or_path:
        raise ValueError(
            "A capability set needs the model that training starts with, but `model_name_or_path` "
            "is not set. Set it to a name on the Hub or a folder."
        )
    if not arguments.capability_datasets and not arguments.look_alike_datasets:
        raise ValueError(
            "There is nothing to build: `capability_datasets` and `look_alike_datasets` are empty. "
            "List the data of at least one group."
        )
    is_quantised = model.load_in_4bit or model.load_in_8bit
    if arguments.gradient_cosine and is_quantised and not model.use_peft:
        raise ValueError(
            "Quantised weights have no gradients, but `gradient_cosine` is on. Set `use_peft: true`"
            " to measure those of an adapter, or `gradient_cosine: false`."
        )
    return arguments, model
