"""
The keys of a training run: TRL's own, OGPSA's, and what the scripts add, from one flat YAML file.

Every key is known by name; see `ogpsa_trl.parsing`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from datasets import Dataset, IterableDataset, load_dataset
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.scripts.utils import ScriptArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig

from ogpsa_trl.checks import check_run
from ogpsa_trl.config import GateConfig, OGPSAConfig, Preset, preset_settings
from ogpsa_trl.mixture import (
    CapabilityDatasetConfig,
    ConvertibleDatasetConfig,
    ConvertibleMixtureConfig,
    load_groups,
    load_mixture,
    loading,
)
from ogpsa_trl.parsing import FlatParser, check_keys, config_values, split_config, unknown_key
from ogpsa_trl.ranges import TRAINING_RANGES
from ogpsa_trl.values import check_choice, shown

Stage = Literal["sft", "dpo"]

STAGE_CONFIGS: dict[str, type[SFTConfig] | type[DPOConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}

_ENTRY_TYPES: dict[str, type[ConvertibleDatasetConfig]] = {
    "datasets": ConvertibleDatasetConfig,
    "capability_datasets": CapabilityDatasetConfig,
    "gate_datasets": CapabilityDatasetConfig,
}


@dataclass
class TrainArguments:
    """What the training script adds to the arguments of TRL and of OGPSA."""

    stage: Stage = field(
        default="sft", metadata={"help": "Which trainer: 'sft' or 'dpo'. It decides the keys."}
    )
    ogpsa: bool = field(
        default=True,
        metadata={
            "help": "Whether to use the capability data. `--ogpsa false` trains plain TRL from the "
            "same file, for comparison."
        },
    )
    preset: Preset | None = field(
        default=None,
        metadata={
            "help": "Fills in OGPSA's settings; keys of your own replace them. 'preserve', the "
            "default: the constrained update. 'paper': the published form. 'paper-theorem': the "
            "same with one subspace. 'replay', 'kl': the baselines of these names."
        },
    )
    capability_datasets: list[CapabilityDatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Capability data, in the schema of `datasets` with a `group` name for each "
            "entry. Leave it out to train plain TRL."
        },
    )
    gate_datasets: list[CapabilityDatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Held-out capability data that the gate measures, in the schema of "
            "`capability_datasets`, with and without `ogpsa`. Leave it out to train without a gate."
        },
    )

    run_report: bool = field(
        default=True,
        metadata={
            "help": "Whether to write `report.html` into `output_dir` at the end: the run on one "
            "page (docs/reports.md). `scripts/report.py` makes it again later."
        },
    )

    def __post_init__(self) -> None:
        self.capability_datasets = _entries(self.capability_datasets)
        self.gate_datasets = _entries(self.gate_datasets)

    def capability_groups(self) -> dict[str, Dataset | IterableDataset] | None:
        """Load the capability data by group; `None` where the run is to be plain TRL."""
        if not self.ogpsa or not self.capability_datasets:
            return None
        return load_groups(self.capability_datasets, "`capability_datasets`")

    def gate_groups(self) -> dict[str, Dataset | IterableDataset] | None:
        """Load the gate's data by group; `None` where the run has no gate."""
        return load_groups(self.gate_datasets, "`gate_datasets`") if self.gate_datasets else None


def _entries(values: Sequence[Any] | None) -> list[CapabilityDatasetConfig]:
    return [
        value if isinstance(value, CapabilityDatasetConfig) else CapabilityDatasetConfig(**value)
        for value in values or []  # a key without entries
    ]


@dataclass
class RunArguments:
    """All arguments of a run, parsed and checked."""

    train: TrainArguments
    script: ScriptArguments
    training: Any
    model: ModelConfig
    datasets: ConvertibleMixtureConfig
    ogpsa: OGPSAConfig
    gate: GateConfig

    def keys(self) -> dict[str, Any]:
        """The keys that are neither training arguments nor settings of OGPSA or of the gate."""
        return {
            name: value
            for part in (self.train, self.script, self.model, self.datasets)
            for name, value in asdict(part).items()
        }

    def safety_datasets(self) -> Mapping[Any, Dataset | IterableDataset]:
        """Load the training data by split."""
        if self.datasets.datasets and self.script.dataset_name is not None:
            raise ValueError(
                "Training data must come from `datasets` or from `dataset_name`, but both are set "
                f"(`dataset_name` is {self.script.dataset_name!r}). Remove one."
            )
        if self.datasets.datasets:
            return load_mixture(self.datasets)
        if self.script.dataset_name is None:
            raise ValueError(
                "A run needs training data, but neither `datasets` nor `dataset_name` is set. Set "
                "`dataset_name` to a name on the Hub or a file, or list `datasets`."
            )
        entry = ConvertibleDatasetConfig(self.script.dataset_name, name=self.script.dataset_config)
        entry.check_file()
        with loading(f"`dataset_name` {self.script.dataset_name!r}"):
            return load_dataset(
                entry.path,
                name=entry.name,
                data_files=entry.data_files,
                streaming=self.script.dataset_streaming,
            )


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
