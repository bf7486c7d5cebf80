"""
The arguments of a training run from its command line and one flat YAML file, parsed and checked.

Every key is known by name; see `ogpsa_trl.parsing`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.scripts.utils import ScriptArguments
from trl.trainer.model_config import ModelConfig

from ogpsa_trl.cli.arguments import STAGE_CONFIGS, RunArguments, TrainArguments
from ogpsa_trl.cli.checks import check_run
from ogpsa_trl.cli.parsing import FlatParser, check_keys, config_values, split_config, unknown_key
from ogpsa_trl.cli.ranges import TRAINING_RANGES
from ogpsa_trl.cli.values import check_choice
from ogpsa_trl.config import GateConfig, OGPSAConfig, preset_settings
from ogpsa_trl.data.entries import (
    CapabilityDatasetConfig,
    ConvertibleDatasetConfig,
    ConvertibleMixtureConfig,
)
from ogpsa_trl.data.row_values import shown

_ENTRY_TYPES: dict[str, type[ConvertibleDatasetConfig]] = {
    "datasets": ConvertibleDatasetConfig,
    "capability_datasets": CapabilityDatasetConfig,
    "gate_datasets": CapabilityDatasetConfig,
}


def parse_run(args: Sequence[str] | None = None) -> RunArguments:
    """
    Parse the command line and the YAML file that `--config` names; the command line wins.

    Raises:
        ValueError: a key is unknown, or a value is not allowed.
    """
    args = split_config(sys.argv[1:] if args is None else args)
    run = RunArguments(*checked_parser(args).parse(args))
    preset = run.train.preset
    defaults = asdict(OGPSAConfig(**preset_settings(preset or "preserve", run.train.stage)))
    changed = ["preset"] * (preset is not None)
    changed += [name for name, value in asdict(run.ogpsa).items() if value != defaults[name]]
    if run.train.ogpsa and not run.train.capability_datasets and changed:
        raise ValueError(
            f"`{changed[0]}` is a setting of OGPSA, but there is no capability data to use it on. "
            "Add `capability_datasets`, or set `ogpsa: false` to train plain TRL."
        )
    check_run(run)
    return run


def checked_parser(args: Sequence[str], **help_text: str) -> FlatParser:
    """
    The parser of the keys of a run, with the defaults of its preset, after a look at every key
    and its value.

    Args:
        args: The command line, as `split_config` gives it.
        help_text: `prog` and `epilog` of argparse: the name of the program, and a last word.

    Raises:
        ValueError: a key is unknown, or a value is not of its type, or out of range.
    """
    values = config_values(args)
    stage = _early(args, values, "stage", "sft")
    if not isinstance(stage, str) or stage not in STAGE_CONFIGS:
        choices = " or ".join(map(repr, STAGE_CONFIGS))
        raise ValueError(f"`stage` must be {choices}, but got {shown(stage)}.")
    preset = _early(args, values, "preset", None)
    parser = _parser(stage, **help_text)
    preset_values = preset_settings(preset or "preserve", stage)
    parser.set_defaults_with_config(**preset_values)
    check_keys(
        parser,
        args,
        values,
        _ENTRY_TYPES,
        lambda key, where: _unknown_in_stage(key, where, parser, stage),
    )
    _check_values(parser, args, values)
    return parser


def training_options() -> set[str]:
    """All that may begin with `--` on the command line of a run, in any stage."""
    return set().union(*(_parser(stage).option_names() for stage in STAGE_CONFIGS))


# Types of keys that TRL annotates in another way than it reads them.
_TYPES = {"fsdp": str | bool | None, "resume_from_checkpoint": str | bool | None}


def _check_values(parser: FlatParser, args: Sequence[str], values: Mapping[str, Any]) -> None:
    """Look at the keys of TRL: ours are checked in their own classes, entries with their keys."""
    if values.get("parallelism_config") is not None:
        raise ValueError(
            "`parallelism_config` cannot be set in a file of keys. Set it in the file that "
            "`accelerate launch --config_file` names, as configs/accelerate/hsdp.yaml does."
        )
    own = [*(f.name for kind in (OGPSAConfig, GateConfig) for f in fields(kind)), *_ENTRY_TYPES]
    parser.check_values(args, values, TRAINING_RANGES, types=_TYPES, left_out=own)
    known = [setting.name for setting in fields(AcceleratorConfig)]
    accelerator_config = values.get("accelerator_config")
    for name in accelerator_config if isinstance(accelerator_config, dict) else ():
        if name not in known:
            raise ValueError(unknown_key(name, "`accelerator_config`", known))
    report_to = values.get("report_to")
    for name in report_to if isinstance(report_to, list) else [report_to or "none"]:
        check_choice("`report_to`", name, ["none", "all", *INTEGRATION_TO_CALLBACK])


def _parser(stage: str, **help_text: str) -> FlatParser:
    dataclass_types: Any = (
        TrainArguments,
        ScriptArguments,
        STAGE_CONFIGS[stage],
        ModelConfig,
        ConvertibleMixtureConfig,
        OGPSAConfig,
        GateConfig,
    )
    return FlatParser(
        dataclass_types,
        "Safety training with TRL that keeps capabilities. Keys go into the YAML file that "
        "--config names, or on the command line, which wins.",
        **help_text,
    )


def _early(args: Sequence[str], values: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key that decides what the other keys are."""
    value = values.get(key, default)
    for index, word in enumerate(args):
        if word == f"--{key}" and index + 1 < len(args):
            value = args[index + 1]
        elif word.startswith(f"--{key}="):
            value = word.removeprefix(f"--{key}=")
    return value


def _unknown_in_stage(key: str, where: str, parser: FlatParser, stage: str) -> str:
    for other in STAGE_CONFIGS:
        if other != stage and key in _parser(other).key_names() and key not in parser.key_names():
            return (
                f"`{key}` in {where} is a key of the stage '{other}', but this run has the "
                f"stage '{stage}'. Remove it, or set `stage: {other}`."
            )
    return unknown_key(key, where, parser.key_names())
