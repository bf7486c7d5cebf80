"""What is odd about capability groups, and may be meant: it is said, and no error."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from ogpsa_trl.data.groups import CapabilityGroup

logger = logging.getLogger(__name__)

# Largest number of samples in a group, relative to the smallest one, that goes without a warning.
_UNEVEN = 10

# Rows of the safety data that are compared with the capability samples: of a stream only those that
# are read at once.
_ROWS_COMPARED = 5000
_STREAMED_ROWS_COMPARED = 64


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
    groups: Sequence[CapabilityGroup], dataset: Dataset | IterableDataset | None
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
    trained = {_safety_tokens(row) for row in rows}
    for group in groups:
        num = sum(tuple(sample.features["input_ids"]) in trained for sample in group.samples)
        if num:
            logger.warning(
                "Capability group %r: %d of its %d samples are among the training data. Protecting "
                "what is to change makes training oppose itself. Take other data for the group.",
                group.name, num, len(group.samples),
            )  # fmt: skip


def _safety_tokens(row: Mapping[str, Any]) -> tuple[int, ...]:
    """Of a sample of SFT, or of the chosen side of one of DPO."""
    if "input_ids" in row:
        return tuple(row["input_ids"])
    return (*row.get("prompt_ids", ()), *row.get("chosen_ids", ()))
