"""
Data set entries of the YAML file, and how a mixture of them is loaded.

TRL's data set schema and loader, with two additions: an entry may name a local file as its `path`,
and a `conversion` from the columns of a well-known data set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import concatenate_datasets
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from ogpsa_trl.conversions import CONVERSIONS, AnyDataset

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

    def check_file(self) -> None:
        """Raise where `path` names a file that is not there; on the Hub it would not be found."""
        if Path(self.path).suffix in _FILE_BUILDERS:
            raise ValueError(
                f"There is no file {self.path!r} in {Path.cwd()}. Correct the path, or make the "
                "file first."
            )


@dataclass
class GroupedDatasetConfig(ConvertibleDatasetConfig):
    """
    One entry of a list of groups: as in `datasets`, and the group it belongs to.

    Args:
        group (`str`): Name of the group. Entries of one group are mixed. The default is up to the
            list that the entry stands in.
    """

    group: str = "all"


@dataclass
class CapabilityDatasetConfig(GroupedDatasetConfig):
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
            for entry in self.datasets or []  # a key without entries
        ]


def load_mixture(mixture: ConvertibleMixtureConfig) -> Mapping[Any, AnyDataset]:
    """
    Load a mixture by TRL's `get_dataset`; entries with a conversion are loaded one by one.

    Raises:
        ValueError: `fraction` stands beside a conversion, which leaves rows out.
    """
    for entry in _entries(mixture):
        entry.check_file()
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


def load_groups(entries: Sequence[GroupedDatasetConfig]) -> dict[str, AnyDataset]:
    """Load the entries group by group, each group as one mixture."""
    groups: dict[str, list[DatasetConfig]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return {
        name: load_mixture(ConvertibleMixtureConfig(datasets=members))["train"]
        for name, members in groups.items()
    }


def _entries(mixture: ConvertibleMixtureConfig) -> list[ConvertibleDatasetConfig]:
    return cast(list[ConvertibleDatasetConfig], mixture.datasets)
