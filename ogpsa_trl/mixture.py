"""
Data set entries of the YAML file, and how a mixture of them is loaded.

TRL's data set schema and loader, with two additions: an entry may name a local file as its `path`,
and a `conversion` from the columns of a well-known data set.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from datasets import concatenate_datasets
from datasets.exceptions import DatasetsError
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from ogpsa_trl.conversions import CONVERSIONS, AnyDataset

# Builders of `datasets` for local files, by suffix.
_FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

# Beginnings of a `path` that is no name on the Hub.
_LOCAL = ("/", "./", "../", "~")


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
        if self.fraction is not None and not self.fraction > 0:
            raise ValueError(
                f"`fraction` must be a number above 0, but got {self.fraction!r}. Leave the entry "
                "out if none of it is to be used."
            )
        suffix = Path(self.path).suffix
        if suffix in _FILE_BUILDERS and os.path.isfile(self.path):
            self.data_files, self.path = self.path, _FILE_BUILDERS[suffix]

    def check_file(self) -> None:
        """
        Raise where `path` names a file or folder that is not there; the Hub would not know it.

        Raises:
            ValueError: it does, or it is a builder that has no files to build from.
        """
        is_local = Path(self.path).suffix in _FILE_BUILDERS or self.path.startswith(_LOCAL)
        if is_local and not os.path.exists(self.path):
            raise ValueError(
                f"There is no file {self.path!r} in {Path.cwd()}. Correct the path, or make the "
                "file first."
            )
        if self.path in _FILE_BUILDERS.values() and not (self.data_files or self.data_dir):
            raise ValueError(
                f"`path: {self.path}` needs `data_files`, but there are none, and the files of the "
                "working directory are not meant. Name the file as `path`, or add `data_files`."
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
        self.datasets = [_convertible(entry) for entry in self.datasets or []]  # or no entries


def _convertible(entry: DatasetConfig | dict[str, Any]) -> ConvertibleDatasetConfig:
    """An entry from the file, from Python, or from the command line, where TRL makes its own."""
    if isinstance(entry, ConvertibleDatasetConfig):
        return entry
    return ConvertibleDatasetConfig(**(entry if isinstance(entry, dict) else asdict(entry)))


def load_mixture(
    mixture: ConvertibleMixtureConfig, where: str = "`datasets`"
) -> Mapping[Any, AnyDataset]:
    """
    Load a mixture, entry by entry, as TRL's `get_dataset` does.

    Args:
        mixture: The entries.
        where: The list that they stand in, for messages.

    Raises:
        ValueError: an entry cannot be loaded, entries do not go together, or `fraction` stands
            beside a conversion, which leaves rows out.
    """
    entries = cast(list[ConvertibleDatasetConfig], mixture.datasets)
    for entry in entries:
        entry.check_file()
        if entry.fraction is not None and any(other.conversion for other in entries):
            raise ValueError(
                "`fraction` cannot be used in a mixture with a `conversion`, but it is "
                f"{entry.fraction} for {entry.path!r}. Convert the data beforehand, or remove it."
            )
    parts = [load_entry(entry, where, streaming=mixture.streaming) for entry in entries]
    with loading(f"The mixture in {where}"):
        if any(entry.fraction is not None for entry in entries):
            return get_dataset(mixture)  # its arithmetic; what it loads is in the cache
        mixed: Any = concatenate_datasets(cast(Any, parts))
        if mixture.test_split_size is None:
            return {"train": mixed}
        return mixed.train_test_split(test_size=mixture.test_split_size)


def load_entry(entry: ConvertibleDatasetConfig, where: str, *, streaming: bool) -> AnyDataset:
    """
    Load one entry, converted if it has a conversion.

    Raises:
        ValueError: it cannot be loaded, or has not the columns that its conversion reads.
    """
    whole: Any = {"fraction": None}
    single = DatasetMixtureConfig(
        datasets=[DatasetConfig(**_of_trl(entry) | whole)], streaming=streaming
    )
    with loading(f"{describe(entry)} in {where}"):
        loaded = get_dataset(single)["train"]
    if entry.conversion is None:
        return loaded
    try:
        return CONVERSIONS[entry.conversion](loaded)
    except KeyError as error:
        raise ValueError(
            f"`conversion: {entry.conversion}` needs a column {error}, but {describe(entry)} in "
            f"{where} has {loaded.column_names}. Name the conversion of this data set, or leave it "
            "out."
        ) from error


def entries_of(entry_type: type[Any], values: Sequence[Any] | None) -> list[Any]:
    """The entries of a list of data sets, as its key holds them: mappings, or made already."""
    return [
        value if isinstance(value, DatasetConfig) else entry_type(**value)
        for value in values or []  # a key without entries
    ]


def load_groups(entries: Sequence[GroupedDatasetConfig], where: str) -> dict[str, AnyDataset]:
    """
    Load the entries group by group, each group as one mixture.

    Args:
        entries: The entries.
        where: The list that they stand in, for messages.

    Raises:
        ValueError: see `load_mixture`.
    """
    groups: dict[str, list[DatasetConfig]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return {
        name: load_mixture(ConvertibleMixtureConfig(datasets=members), where)["train"]
        for name, members in groups.items()
    }


@contextmanager
def loading(what: str) -> Iterator[None]:
    """
    Name the data where `datasets` refuses it.

    Raises:
        ValueError: it does.
    """
    try:
        yield
    except StopIteration as error:  # an empty file of JSON lines
        raise ValueError(f"{what} cannot be loaded: it is empty. Check the file.") from error
    except (ValueError, OSError, DatasetsError) as error:
        # Its own text says only that there was an error, and the text of that can be long.
        reason = str(error.__cause__ or error)
        reason = reason if len(reason) < _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} ..."
        raise ValueError(
            f"{what} cannot be loaded: {reason.rstrip('.!')}. Check its path, name, split and "
            "columns."
        ) from error


_LONGEST_REASON = 500


def describe(entry: DatasetConfig) -> str:
    """What a user knows an entry by."""
    return f"{entry.data_files or entry.path!r} (split {entry.split!r})"


def _of_trl(entry: ConvertibleDatasetConfig) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in fields(DatasetConfig)}
