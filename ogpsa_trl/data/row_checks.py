"""Training data held against the stage and the tokenizer, before a model is loaded."""

from typing import Any

from datasets import Dataset

from ogpsa_trl.data.columns import AnyDataset, Row, Source
from ogpsa_trl.data.entries import loading
from ogpsa_trl.data.rendering import check_rendering
from ogpsa_trl.data.rows import readable

# Rows that are rendered before the model is loaded: a second. TRL renders the others.
_ROWS_RENDERED = 1000


def first_row(dataset: AnyDataset, where: str) -> Row:
    """
    The first row; of a stream it is read for this.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    name = where[0].upper() + where[1:]
    with loading(name):
        row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            f"{name} must have at least one row, but is empty. Check its file and split."
        )
    return row


def check_data(
    dataset: AnyDataset, source: Source, processing_class: Any, *, is_rendered: bool = True
) -> AnyDataset:
    """
    Refuse data that cannot be made into tokens.

    Args:
        dataset: The data, not tokenised.
        source: What they are.
        processing_class: The tokenizer or processor that TRL will use.
        is_rendered: Whether its chat template is the one that TRL will use.

    Returns:
        The data to train on: without columns of nulls that TRL would read. Rows of a stream are
        looked at when they are read.

    Raises:
        ValueError: they are empty, in no known format, or a row cannot be read or does not go with
            the chat template.
    """
    first_row(dataset, source.where)
    dataset = readable(dataset, source)
    if not is_rendered:
        return dataset
    return check_rendering(dataset, source, processing_class, num_rows=_ROWS_RENDERED)


def check_tokens(dataset: AnyDataset | None, max_length: int | None) -> None:
    """
    Refuse training data that TRL has tokenised, and of which nothing is left to learn from.

    Args:
        dataset: The trainer's data. Streams are not read.
        max_length: Tokens kept of a sample.

    Raises:
        ValueError: no sample has a token that is trained on.
    """
    if not isinstance(dataset, Dataset):
        return
    is_left = len(dataset) > 0
    if is_left and "labels" in dataset.column_names:  # it ends at the first sample that is trained
        rows: Any = dataset
        is_left = any(any(label != -100 for label in row["labels"]) for row in rows)
    if not is_left:
        raise ValueError(
            "The training data must have a token to learn from, but no sample has one within "
            f"`max_length` {max_length}. Raise `max_length`, or look for empty completions and for "
            "labels that are all -100."
        )
