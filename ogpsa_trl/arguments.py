"""
The keys of a training run: TRL's own, OGPSA's, and what the scripts add, from one flat YAML file.

Every key is known by name. An unknown one is an error that names the nearest known key, because a
misspelt setting that is silently ignored costs a run.
"""

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset
from trl.scripts.utils import (
    DatasetConfig,
    DatasetMixtureConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
)
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.conversions import CONVERSIONS, AnyDataset

Stage = Literal["sft", "dpo"]

STAGE_CONFIGS: dict[str, type[SFTConfig] | type[DPOConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}

# Builders of `datasets` for local files, by suffix.
_FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class ConvertibleDatasetConfig(DatasetConfig):
    """
    One entry of `datasets`: TRL's data set schema, and a conversion into TRL's formats.

    `path` may also name a file (.json, .jsonl, .parquet, .csv).

    Args:
        conversion (`str`, *optional*): A name in `ogpsa_trl.conversions`. `None` leaves the columns
            as they are.
    """

    conversion: str | None = None

    def __post_init__(self) -> None:
        if self.conversion is not None and self.conversion not in CONVERSIONS:
            raise ValueError(
                f"`conversion` must be one of {', '.join(CONVERSIONS)}, but got "
                f"{self.conversion!r}. Leave it out for data in a format of TRL."
            )
        path = Path(self.path)
        if path.is_file() and path.suffix in _FILE_BUILDERS:
            self.data_files, self.path = str(path), _FILE_BUILDERS[path.suffix]


@dataclass
class CapabilityDatasetConfig(ConvertibleDatasetConfig):
    """
    One entry of `capability_datasets`: as in `datasets`, and the group it belongs to.

    Args:
        group (`str`, *optional*, defaults to `"capability"`): Name of the capability group. Entries
            of one group are mixed; every group protects directions of its own.
    """

    group: str = "capability"


@dataclass
class ConvertibleMixtureConfig(DatasetMixtureConfig):
    """TRL's data set mixture, of entries that may need a conversion."""

    def __post_init__(self) -> None:
        self.datasets = [
            entry if isinstance(entry, DatasetConfig) else ConvertibleDatasetConfig(**entry)
            for entry in self.datasets
        ]


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
    capability_datasets: list[CapabilityDatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Capability data, in the schema of `datasets` with a `group` name for each "
            "entry. Leave it out to train plain TRL."
        },
    )

    def __post_init__(self) -> None:
        self.capability_datasets = [
            entry if isinstance(entry, DatasetConfig) else CapabilityDatasetConfig(**entry)
            for entry in self.capability_datasets
        ]

    def capability_groups(self) -> dict[str, Dataset | IterableDataset] | None:
        """Load the capability data by group; `None` where the run is to be plain TRL."""
        if not self.ogpsa or not self.capability_datasets:
            return None
        groups: dict[str, list[DatasetConfig]] = {}
        for entry in self.capability_datasets:
            groups.setdefault(entry.group, []).append(entry)
        return {
            name: _load(ConvertibleMixtureConfig(datasets=entries))["train"]
            for name, entries in groups.items()
        }


@dataclass
class RunArguments:
    """All arguments of a run, parsed and checked."""

    train: TrainArguments
    script: ScriptArguments
    training: Any
    model: ModelConfig
    datasets: ConvertibleMixtureConfig
    ogpsa: OGPSAConfig

    def safety_datasets(self) -> Mapping[Any, Dataset | IterableDataset]:
        """Load the training data by split."""
        if self.datasets.datasets:
            return _load(self.datasets)
        if self.script.dataset_name is None:
            raise ValueError(
                "A run needs training data, but neither `datasets` nor `dataset_name` is set. Set "
                "`dataset_name` to a name on the Hub or a file, or list `datasets`."
            )
        entry = ConvertibleDatasetConfig(self.script.dataset_name, name=self.script.dataset_config)
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
    args = list(sys.argv[1:] if args is None else args)
    stage = _stage(args)
    parser = _parser(stage)
    _check_entries(args)
    *parsed, from_file, from_line = parser.parse_args_and_config(
        args, return_remaining_strings=True, separate_remaining_strings=True
    )
    _refuse_unknown(from_file, _config_path(args) or "", parser, stage)
    _refuse_unknown(from_line, "the command line", parser, stage)
    run = RunArguments(*parsed)
    if run.train.ogpsa and not run.train.capability_datasets and run.ogpsa != OGPSAConfig():
        changed = [f.name for f in fields(run.ogpsa) if getattr(run.ogpsa, f.name) != f.default]
        raise ValueError(
            f"`{changed[0]}` is a setting of OGPSA, but there is no capability data to use it on. "
            "Add `capability_datasets`, or set `ogpsa: false` to train plain TRL."
        )
    if run.model.model_name_or_path is None:
        raise ValueError(
            "A run needs a model, but `model_name_or_path` is not set. Set it to a name on the Hub "
            "or a folder."
        )
    return run


def _parser(stage: str) -> TrlParser:
    dataclass_types: Any = (
        TrainArguments,
        ScriptArguments,
        STAGE_CONFIGS[stage],
        ModelConfig,
        ConvertibleMixtureConfig,
        OGPSAConfig,
    )
    return TrlParser(
        dataclass_types,
        description="Safety training with TRL that keeps capabilities. Keys go into the YAML file "
        "that --config names, or on the command line, which wins.",
        allow_abbrev=False,
    )


def _stage(args: Sequence[str]) -> str:
    """The stage, which decides what the other keys are."""
    stage: Any = _config_values(args).get("stage", TrainArguments.stage)
    for index, word in enumerate(args):
        if word == "--stage" and index + 1 < len(args):
            stage = args[index + 1]
        elif word.startswith("--stage="):
            stage = word.removeprefix("--stage=")
    if stage not in STAGE_CONFIGS:
        choices = " or ".join(map(repr, STAGE_CONFIGS))
        raise ValueError(f"`stage` must be {choices}, but got {stage!r}.")
    return stage


def _config_path(args: Sequence[str]) -> str | None:
    if "--config" not in args:
        return None
    index = list(args).index("--config") + 1
    if index == len(args):
        raise ValueError("`--config` needs a file, but none follows it.")
    return args[index]


def _config_values(args: Sequence[str]) -> dict[str, Any]:
    """The mapping in the YAML file, empty where none is named."""
    path = _config_path(args)
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"`--config` must name a YAML file, but there is none at {path!r}.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The file {path!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"The file {path!r} must hold keys with values (`key: value`), but holds {values!r}."
        )
    return values


def _check_entries(args: Sequence[str]) -> None:
    """Check the keys of the entries of `datasets` and `capability_datasets` in the YAML file."""
    values = _config_values(args)
    for key, entry_type in (
        ("datasets", ConvertibleDatasetConfig),
        ("capability_datasets", CapabilityDatasetConfig),
    ):
        known = [entry.name for entry in fields(entry_type)]
        entries = values.get(key) or []
        if not isinstance(entries, list):
            raise ValueError(
                f"`{key}` must be a list (every entry begins with `-`), but got {entries!r}."
            )
        for number, entry in enumerate(entries, start=1):
            where = f"entry {number} of `{key}`"
            if not isinstance(entry, dict) or "path" not in entry:
                raise ValueError(
                    f"{where} must have a `path` (a name on the Hub, a file, or a builder such as "
                    f"`json` with `data_files`), but is {entry!r}."
                )
            for name in entry:
                if name not in known:
                    raise ValueError(_unknown(name, where, known))


def _refuse_unknown(strings: Iterable[str], where: str, parser: TrlParser, stage: str) -> None:
    """Raise at the first key that no dataclass took."""
    for word in strings:
        if not word.startswith("--"):
            continue
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        message = _unknown(key, where, _keys(parser))
        for other in STAGE_CONFIGS:
            if other != stage and key in _keys(_parser(other)):
                message = (
                    f"`{key}` in {where} is a key of the stage '{other}', but this run has the "
                    f"stage '{stage}'. Remove it, or set `stage: {other}`."
                )
        raise ValueError(message)
    leftover = list(strings)
    if leftover:
        raise ValueError(f"{leftover[0]!r} in {where} belongs to no key. Keys begin with `--`.")


def _keys(parser: TrlParser) -> list[str]:
    return [action.dest for action in parser._actions if action.dest != "help"]


def _unknown(key: str, where: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return f"Unknown key `{key}` in {where}. The nearest known key is `{nearest}`."


def _load(mixture: ConvertibleMixtureConfig) -> Mapping[Any, AnyDataset]:
    """
    Load a mixture by TRL's `get_dataset`; entries with a conversion are loaded one by one.

    Raises:
        ValueError: `fraction` stands beside a conversion, which leaves rows out.
    """
    if not any(entry.conversion for entry in _entries(mixture)):
        return get_dataset(mixture)
    parts = []
    for entry in _entries(mixture):
        if entry.fraction is not None:
            raise ValueError(
                "`fraction` cannot be used in a mixture with a `conversion`, but it is "
                f"{entry.fraction} for {entry.path!r}. Convert the data beforehand, or remove it."
            )
        single = DatasetMixtureConfig(datasets=[entry], streaming=mixture.streaming)
        loaded = get_dataset(single)["train"]
        parts.append(CONVERSIONS[entry.conversion](loaded) if entry.conversion else loaded)
    mixed = concatenate_datasets(parts)
    if mixture.test_split_size is None:
        return {"train": mixed}
    return mixed.train_test_split(test_size=mixture.test_split_size)


def _entries(mixture: ConvertibleMixtureConfig) -> list[ConvertibleDatasetConfig]:
    return cast(list[ConvertibleDatasetConfig], mixture.datasets)
