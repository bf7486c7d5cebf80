"""
Capability groups: named samples of general capability, divided into parts and batches.

`preparation` makes them of data sets.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor

from ogpsa_trl.data.columns import IGNORED, AnyDataset

logger = logging.getLogger(__name__)

Features = dict[str, Any]

# Largest number of samples in a group, relative to the smallest one, that goes without a warning.
_UNEVEN = 10
# Rows of the safety data that are compared with the capability samples: of a stream only those that
# are read at once.
_ROWS_COMPARED = 5000
_STREAMED_ROWS_COMPARED = 64


@dataclass(frozen=True)
class Sample:
    """
    A tokenised sample.

    Attributes:
        name: Group and place in it: the same in every run with the same data and seed.
        features: `input_ids` and `labels`, as TRL's collator takes them.
        num_tokens: Tokens that count in the loss, at least 1.
    """

    name: str
    features: Features
    num_tokens: int

    @property
    def number(self) -> int:
        """The place in its group."""
        return int(self.name.rpartition("/")[2])

    @property
    def has_prompt(self) -> bool:
        """Whether it begins with tokens that do not count in the loss."""
        return IGNORED in self.features["labels"][:2]


def beginning(sample: Sample, num_tokens: int) -> Sample:
    """A sample with its prompt and so many tokens that count in the loss, or all it has."""
    if sample.num_tokens <= num_tokens:
        return sample
    # The first token of all is predicted by nothing.
    trained = (i for i, label in enumerate(sample.features["labels"]) if i and label != IGNORED)
    end = 1 + next(itertools.islice(trained, num_tokens - 1, None))
    features = {name: values[:end] for name, values in sample.features.items()}
    return Sample(sample.name, features, num_tokens)


@dataclass(frozen=True)
class Batch:
    """
    Samples of one forward pass.

    Attributes:
        inputs: What the model is called with. Positions without a label to learn have label -100.
        samples: The samples in the order of the rows; none where nothing is to be learned, and the
            pass only keeps a process in step with the others.
    """

    inputs: dict[str, Tensor]
    samples: list[Sample]


def trained_labels(labels: Tensor) -> Tensor:
    """Where the next token is one to learn, bool, shape [rows, length - 1]."""
    return labels[:, 1:] != IGNORED


@dataclass(frozen=True)
class Part:
    """
    Disjoint share of a group's samples that gives one capability gradient.

    Attributes:
        group: Name of the group.
        samples: Sorted by length, so that little padding is computed.
        batch_size: Largest number of samples in a batch.
        collate: Makes tensors of features.
    """

    group: str
    samples: list[Sample]
    batch_size: int
    collate: Callable[[list[Features]], dict[str, Tensor]]

    @property
    def num_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(sample.num_tokens for sample in self.samples)

    def sample(self, name: str, features: Features) -> Sample:
        """A sample of these tokens."""
        labels = self.collate([features])["labels"]
        return Sample(name, features, int(trained_labels(labels).sum()))

    def num_batches_of(self, num_processes: int) -> int:
        """Batches of each process."""
        return math.ceil(len(self.samples) / (num_processes * self.batch_size))

    def batches_of(self, process_index: int, num_processes: int) -> list[Batch]:
        """
        The batches of one process, equally many on all of them and of nearly one size.

        Every process has to take part in every forward and backward pass of the engine, so a
        process that runs out of samples gets batches without trainable tokens.
        """
        num_batches = self.num_batches_of(num_processes) * num_processes
        size = math.ceil(len(self.samples) / num_batches)
        starts = range(process_index * size, num_batches * size, num_processes * size)
        return [self._batch(self.samples[start : start + size]) for start in starts]

    def _batch(self, samples: list[Sample]) -> Batch:
        inputs = self.collate([sample.features for sample in samples or self.samples[:1]])
        if not samples:
            inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
        return Batch(inputs, samples)


@dataclass(frozen=True)
class CapabilityGroup:
    """A named group of capability samples, ready for the model."""

    name: str
    samples: list[Sample]
    num_parts: int
    batch_size: int
    collate: Callable[[list[Features]], dict[str, Tensor]]

    @property
    def num_tokens(self) -> int:
        """Tokens that count in the loss."""
        return self.whole().num_tokens

    def parts(self, samples: list[Sample] | None = None) -> list[Part]:
        """Some of the samples, or all, in `num_parts` parts."""
        samples = self.samples if samples is None else samples
        return [self.part(samples[index :: self.num_parts]) for index in range(self.num_parts)]

    def whole(self) -> Part:
        """All samples as one part."""
        return self.part(self.samples)

    def part(self, samples: list[Sample]) -> Part:
        """Some of the samples as one part."""
        by_length = sorted(samples, key=lambda sample: len(sample.features["input_ids"]))
        return Part(self.name, by_length, self.batch_size, self.collate)


def named_groups(data: Any, argument: str = "capability_dataset") -> dict[str, AnyDataset]:
    """
    Bring the user's data into the form {group name: data set}.

    Args:
        data: A data set, or a dict of groups.
        argument: What the user knows it as.

    Raises:
        ValueError: it is neither a data set nor a dict of them, or it is empty.
    """
    if isinstance(data, AnyDataset):
        return {"capability": data}
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"`{argument}` must be a data set or a dict of groups, but got splits "
            f"({', '.join(map(str, data))}). Choose one: `{argument}[split]`."
        )
    if not isinstance(data, Mapping) or not data:
        got = "an empty dict" if data == {} else type(data).__name__
        raise ValueError(
            f"`{argument}` must be a `Dataset`, an `IterableDataset` or a dict of at least one "
            f"group of them, but got {got}. Make one with `Dataset.from_list(rows)`, or leave it "
            "out."
        )
    for name, dataset in data.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(
                f"A capability group's name must be a text on one line, but got {name!r}. It stands"
                " in logs and tables: choose another."
            )
        if not isinstance(dataset, AnyDataset):
            raise ValueError(
                f"Capability group {name!r} must be a `Dataset` or an `IterableDataset`, but got "
                f"{type(dataset).__name__}. Make one with `Dataset.from_list(rows)`."
            )
    return dict(data)


def warn_of_uneven_groups(groups: Sequence[CapabilityGroup]) -> None:
    """Every group counts alike, however few samples it has."""
    smallest = min(groups, key=lambda group: len(group.samples))
    largest = max(groups, key=lambda group: len(group.samples))
    if len(largest.samples) > _UNEVEN * len(smallest.samples):
        logger.warning(
            "Capability groups differ much in size: %r has %d samples, and %r has %d. Each counts "
            "alike, so that the gradient of a few samples counts as much as that of many. Add "
            "samples to %r, or put it into another group.",
            largest.name, len(largest.samples), smallest.name, len(smallest.samples), smallest.name,
        )  # fmt: skip


def warn_of_samples_in_training(
    groups: Sequence[CapabilityGroup], dataset: AnyDataset | None
) -> None:
    """
    Warn of capability samples that are safety samples too: training would oppose itself.

    Args:
        groups: The capability groups.
        dataset: The safety data as TRL has tokenised it. Some thousand rows are compared, spread
            over it; of a stream the first ones. Packed sequences are never equal.
    """
    rows: Any = ()
    if isinstance(dataset, Dataset):
        step = math.ceil(len(dataset) / _ROWS_COMPARED) or 1
        columns = {"input_ids", "prompt_ids", "chosen_ids"} & set(dataset.column_names)
        rows = dataset.select_columns(sorted(columns)).select(range(0, len(dataset), step))
    elif isinstance(dataset, IterableDataset):
        rows = itertools.islice(dataset, _STREAMED_ROWS_COMPARED)
    trained = {  # tokens of SFT, or of the chosen sides of DPO
        tuple(row["input_ids"])
        if "input_ids" in row
        else (*row.get("prompt_ids", ()), *row.get("chosen_ids", ()))
        for row in rows
    }
    for group in groups:
        num = sum(tuple(sample.features["input_ids"]) in trained for sample in group.samples)
        if num:
            logger.warning(
                "Capability group %r: %d of its %d samples are among the training data. Protecting "
                "what is to change makes training oppose itself. Take other data for the group.",
                group.name, num, len(group.samples),
            )  # fmt: skip
