"""
Build capability groups for training from data of your own, and from your model itself.

    ogpsa capability --config configs/capability_set.yaml [--key value ...]

Samples each group, lets the starting model complete prompts, writes one JSON lines file for each
group and a report on them, and prints what to put into a training configuration. `--help` lists
every key; docs/capability_data.md says how to choose.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import datasets
import transformers
from peft import get_peft_model
from transformers import AutoTokenizer
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config

from ogpsa_trl.capability_set.group_measures import gradient_cosines, measure_group
from ogpsa_trl.capability_set.set_keys import CapabilitySetArguments
from ogpsa_trl.capability_set.set_report import content, report, training_entries, warnings_of
from ogpsa_trl.capability_set.set_rows import choose_rows, complete_rows, known_prompts, write_group
from ogpsa_trl.cli.command_line import given_keys
from ogpsa_trl.cli.keys import KeyParser
from ogpsa_trl.cli.paths import check_model_path, check_output_folder
from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.evaluation.json_files import in_words, package_versions, write_json
from ogpsa_trl.evaluation.models import length_for, load_model
from ogpsa_trl.training.model_kind import check_causal


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
    name, revision = str(model_config.model_name_or_path), model_config.model_revision
    trusted: Any = {"trust_remote_code": arguments.trust_remote_code}
    output = Path(arguments.output_dir)
    with user_errors():
        check_output_folder(arguments.output_dir)
        check_model_path(name)
        check_causal(name, revision=revision, **trusted)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **trusted)
        max_length = length_for(arguments.max_length, {name: revision}, **trusted)
        arguments = replace(arguments, max_length=max_length)
        groups = choose_rows(arguments, tokenizer)
        safety_prompts = known_prompts(arguments.harmful_datasets)
        model = load_model(model_config, device_map=arguments.device_map, **trusted)
    paths = {}
    for group in groups:
        print(f"Group {group.name}: {len(group.rows)} samples chosen")
        complete_rows(group, arguments, model, tokenizer)
        paths[group.name] = write_group(group, output)
    measures = {group.name: measure_group(group, model, tokenizer, arguments) for group in groups}
    cosines = None
    if arguments.gradient_cosine:
        adapter = get_peft_config(model_config)
        transformers.set_seed(arguments.seed)
        measured = model if adapter is None else get_peft_model(model, adapter)
        cosines = gradient_cosines(groups, measured, tokenizer, arguments)
    warnings = warnings_of(groups, measures, cosines, arguments, safety_prompts)
    figures = content(groups, paths, measures, cosines, warnings)

    versions = package_versions("peft", "datasets")
    settings = asdict(arguments) | asdict(model_config)
    write_json(output / "report.json", {"settings": settings, "versions": versions, **figures})
    parts = [f"# Capability groups for {name}", *report(figures)]
    parts.append(f"{in_words(versions)} Seed {arguments.seed}.")
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("", *report(figures, "simple", "Warning:"), sep="\n\n")
    print(f"\nIn {output}: report.md, report.json, and the groups. For training:\n")
    print(training_entries(paths))
    return figures


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
