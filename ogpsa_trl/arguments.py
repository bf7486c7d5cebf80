"""
The keys of a training run: TRL's own, OGPSA's, and what the scripts add, from one flat YAML file.

Every key is known by name; see `ogpsa_trl.parsing`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from datasets import Dataset, IterableDataset, load_dataset
from trl.scripts.utils import DatasetConfig, ScriptArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig

from ogpsa_trl.config import GateConfig, OGPSAConfig, Preset, preset_settings
from ogpsa_trl.mixture import (
    CapabilityDatasetConfig,
    ConvertibleDatasetConfig,
    ConvertibleMixtureConfig,
    load_groups,
    load_mixture,
)
from ogpsa_trl.parsing import FlatParser, check_keys, config_values, split_config, unknown_key

Stage = Literal["sft", "dpo"]

STAGE_CONFIGS: dict[str, type[SFTConfig] | type[DPOConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}


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
        return load_groups(self.capability_datasets)

    def gate_groups(self) -> dict[str, Dataset | IterableDataset] | None:
        """Load the gate's data by group; `None` where the run has no gate."""
        return load_groups(self.gate_datasets) if self.gate_datasets else None


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
    run = RunArguments(*checked_parser(args).parse_args_and_config(args))
    preset = run.train.preset
    defaults = asdict(OGPSAConfig(**preset_settings(preset or "preserve", run.train.stage)))
    changed = ["preset"] * (preset is not None)
    changed += [name for name, value in asdict(run.ogpsa).items() if value != defaults[name]]
    if run.train.ogpsa and not run.train.capability_datasets and changed:
        raise ValueError(
            f"`{changed[0]}` is a setting of OGPSA, but there is no capability data to use it on. "
            "Add `capability_datasets`, or set `ogpsa: false` to train plain TRL."
        )
    _check_gate(run)
    if run.model.model_name_or_path is None:
        raise ValueError(
            "A run needs a model, but `model_name_or_path` is not set. Set it to a name on the Hub "
            "or a folder."
        )
    return run


def checked_parser(args: Sequence[str], **help_text: str) -> FlatParser:
    """
    The parser of the keys of a run, with the defaults of its preset, after a look at every key.

    Args:
        args: The command line, as `split_config` gives it.
        help_text: `prog` and `epilog` of argparse: the name of the program, and a last word.

    Raises:
        ValueError: a key is unknown, or a value is not of its type.
    """
    values = config_values(args)
    stage = _early(args, values, "stage", "sft")
    if not isinstance(stage, str) or stage not in STAGE_CONFIGS:
        choices = " or ".join(map(repr, STAGE_CONFIGS))
        raise ValueError(f"`stage` must be {choices}, but got {stage!r}.")
    preset = _early(args, values, "preset", None)
    parser = _parser(stage, **help_text)
    preset_values = preset_settings(preset or "preserve", stage)
    parser.set_defaults_with_config(**preset_values)
    check_keys(
        parser,
        args,
        values,
        {
            "datasets": ConvertibleDatasetConfig,
            "capability_datasets": CapabilityDatasetConfig,
            "gate_datasets": CapabilityDatasetConfig,
        },
        lambda key, where: _unknown_in_stage(key, where, parser, stage),
    )
    return parser


def training_options() -> set[str]:
    """All that may begin with `--` on the command line of a run, in any stage."""
    return set().union(*(_parser(stage).option_names() for stage in STAGE_CONFIGS))


def _check_gate(run: RunArguments) -> None:
    """
    Refuse a gate that cannot do what is asked of it, before a model is loaded.

    Raises:
        ValueError: it has settings but no data, or data that is trained on or protected.
    """
    if not run.train.gate_datasets:
        defaults = asdict(GateConfig())
        for name, value in asdict(run.gate).items():
            if value != defaults[name]:
                raise ValueError(
                    f"`{name}` ({value!r}) is a setting of the capability gate, but there is no "
                    "data to measure. Add `gate_datasets`, in the schema of `capability_datasets`,"
                    f" or leave `{name}` out."
                )
        return
    run.gate.check_saving(run.training)
    used = {"capability_datasets": run.train.capability_datasets, "datasets": run.datasets.datasets}
    for number, entry in enumerate(run.train.gate_datasets, start=1):
        for key, others in used.items():
            if any(_source(entry) == _source(other) for other in others):
                raise ValueError(
                    f"entry {number} of `gate_datasets` must be held out, but the same data "
                    f"({entry.data_files or entry.path!r}, split {entry.split!r}) is an entry of "
                    f"`{key}`. Name another split or file, such as `split: train[90%:]` here and "
                    "`split: train[:90%]` there."
                )


def _source(entry: DatasetConfig) -> dict[str, Any]:
    """What says which rows an entry reads."""
    names = ("path", "name", "data_dir", "data_files", "split")
    return {name: getattr(entry, name) for name in names}


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
