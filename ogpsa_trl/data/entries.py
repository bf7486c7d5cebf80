"""
Data set entries of the YAML file, and how a mixture of them is loaded.

TRL's data set schema, with two additions: an entry may name a local file as its `path`, and a
`conversion` from the columns of a well-known data set.
"""

import glob
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from inspect import isclass
from lzma import LZMAError
from pathlib import Path
from typing import Any, cast, get_args, get_origin
from zipfile import BadZipFile

from datasets import concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from datasets.load import infer_module_for_data_files_list
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig

from ogpsa_trl.data.conversions import CONVERSIONS, AnyDataset

# Beginnings of a `path` that is no name on the Hub.
_LOCAL = ("/", "./", "../", "~")


@dataclass
class ConvertibleDatasetConfig(DatasetConfig):
    """
    One entry of `datasets`: TRL's data set schema, and a conversion into TRL's formats.

    `path` may also name a file that `datasets` can read, by its ending: .jsonl, .csv, .parquet,
    .jsonl.gz and others.

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
        # Whether `path` named a file, and what its builder has to know of it.
        self._is_file, self._options = os.path.isfile(self.path), {}
        if self._is_file:
            builder, self._options = _builder_of(self.path)
            if builder is not None:
                self.data_files, self.path = self.path, builder

    def check_file(self) -> None:
        """
        Raise where `path` names a file or folder that is not there, or that cannot be read; the Hub
        would not know it.

        Raises:
            ValueError: it does, or it is a builder that has no files to build from.
        """
        if self._is_file and not self.data_files:
            raise ValueError(
                f"{self.path!r} is a file, but its ending does not say how to read it. Rename it, "
                "or name the builder of `datasets` that can: `path: json`, for example, with the "
                "file as `data_files`."
            )
        is_local = self.path.startswith(_LOCAL) or (
            not self.path.startswith("hf://") and _builder_of(self.path)[0] is not None
        )
        if is_local and not os.path.exists(self.path):
            is_name = self.path.count("/") == 1 and not self.path.startswith(_LOCAL)
            hub = f" If it is on the Hub, write `hf://datasets/{self.path}`." if is_name else ""
            raise ValueError(
                f"There is no file {self.path!r} in {Path.cwd()}. Correct the path, or make the "
                f"file first.{hub}"
            )
        if self.path in _PACKAGED_DATASETS_MODULES and not (self.data_files or self.data_dir):
            raise ValueError(
                f"`path: {self.path}` needs `data_files`, but there are none, and the files of the "
                "working directory are not meant. Name the file as `path`, or add `data_files`."
            )

    def load(self, split: str | None, *, streaming: bool) -> Any:
        """
        What `datasets` makes of the entry.

        Args:
            split: Which split. `None`: all, by their names.
            streaming: Whether to read it as a stream.
        """
        files: Any = self.data_files
        if self._is_file:
            files = glob.escape(files)  # a name, not a pattern
        return load_dataset(
            self.path,
            name=self.name,
            data_dir=self.data_dir,
            data_files=files,
            split=split,
            streaming=streaming,
            **self._options,
        )


def _builder_of(path: str) -> tuple[str | None, dict[str, Any]]:
    """The builder of `datasets` that reads files of this name, and its options; `None` if none."""
    try:
        return infer_module_for_data_files_list(cast(Any, [path]))
    except (OSError, *_DAMAGED):  # a missing or damaged archive may hold anything
        return "json", {}


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
        self.datasets = entries_of(ConvertibleDatasetConfig, self.datasets)


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
    if any(entry.fraction is not None for entry in entries):
        parts = _in_shares(parts, entries, where)
    with loading(f"The mixture in {where}"):
        mixed: Any = concatenate_datasets(cast(Any, parts))
        if mixture.test_split_size is None:
            return {"train": mixed}
        return mixed.train_test_split(test_size=mixture.test_split_size)


def _in_shares(
    parts: Sequence[Any], entries: Sequence[ConvertibleDatasetConfig], where: str
) -> list[Any]:
    """
    The first rows of each part, as many as make the `fraction`s their shares of the largest mixture
    that uses no row twice. As TRL's `get_dataset` does.
    """
    fractions = [entry.fraction for entry in entries if entry.fraction is not None]
    if len(fractions) < len(entries):
        without = next(entry for entry in entries if entry.fraction is None)
        raise ValueError(
            f"`fraction` must be a key of all entries of a mixture, but {describe(without)} in "
            f"{where} has none. Add it, or remove the others."
        )
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    return [
        part.select(range(round(weight * total)))
        for part, weight in zip(parts, weights, strict=True)
    ]


def load_entry(entry: ConvertibleDatasetConfig, where: str, *, streaming: bool) -> AnyDataset:
    """
    Load one entry, converted if it has a conversion.

    Raises:
        ValueError: it cannot be loaded, or has not the columns that its conversion reads.
    """
    with loading(f"{describe(entry)} in {where}"):
        loaded = entry.load(entry.split, streaming=streaming)
        if entry.columns is not None:
            loaded = loaded.select_columns(entry.columns)
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


def entry_types(hints: Mapping[str, Any]) -> dict[str, Any]:
    """The types of the entries, of the keys that are lists of data sets by their types."""
    kinds = {name: get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is list}
    return {n: k for n, k in kinds.items() if isclass(k) and issubclass(k, DatasetConfig)}


def entries_of(entry_type: type[Any], values: Sequence[Any] | None) -> list[Any]:
    """The entries of a list of data sets: mappings, or TRL's, made into those of the list."""
    return [
        value
        if isinstance(value, entry_type)
        else entry_type(**(value if isinstance(value, dict) else asdict(value)))
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
    # `StopIteration`: an empty file of JSON lines.
    except (StopIteration, ValueError, OSError, DatasetsError, *_DAMAGED) as error:
        # Its own text says only that there was an error, and the text of that can be long.
        reason = str(error.__cause__ or error) or "it is empty"
        reason = reason if len(reason) < 500 else f"{reason[:500]} ..."
        raise ValueError(
            f"{what} cannot be loaded: {reason.rstrip('.!')}. Check its path, name, split and "
            "columns."
        ) from error


# Of compressed files, beside `OSError`.
_DAMAGED = (EOFError, BadZipFile, LZMAError, zlib.error)


def describe(entry: DatasetConfig) -> str:
    """What a user knows an entry by."""
    return f"{entry.data_files or entry.path!r} (split {entry.split!r})"
