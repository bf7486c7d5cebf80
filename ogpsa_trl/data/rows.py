"""
All rows of data held against what may stand in them, before they become tokens.

Training, capability, gate and evaluation data are all read here. TRL itself looks at the first row,
and stops in the middle of a map at a value of another type, without a name.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from ogpsa_trl.data.columns import (
    IMAGES,
    AnyDataset,
    Row,
    Source,
    known_columns,
    used_columns,
    without_nulls,
)
from ogpsa_trl.data.row_values import RowCheck, RowError

_ROWS_AT_ONCE = 1000


def readable(
    dataset: AnyDataset, source: Source, numbers: Sequence[int] | None = None
) -> AnyDataset:
    """
    Refuse data with a row that cannot be read.

    Args:
        dataset: The data, not empty. Of a stream the first row is looked at now, each of the others
            when it is read.
        source: What they are.
        numbers: What the rows are known by; their places if `None`.

    Returns:
        The data without the columns that hold a null and are not in use: TRL would read them.

    Raises:
        RowError: a value of the columns in use is of another type.
        ValueError: the columns are those of no known format.
    """
    known, nulls = [], {}
    if isinstance(dataset, IterableDataset):
        row = without_nulls(next(iter(dataset)))
    else:
        known = known_columns(dataset, source)
        nulls = {column: _nulls(dataset, column) for column in known}
        columns = [column for column in dataset.column_names if nulls.get(column) != "all"]
        first = rows_of(dataset, [column for column in known if column in columns])
        row = {**dict.fromkeys(columns), **next(first, (0, {}))[1]}
    if source.use in ("sft", "dpo") and row.keys() & IMAGES:
        return dataset
    used = used_columns(row, source)
    unused = [column for column in known if nulls[column] and column not in used]
    dataset = checked(dataset, RowCheck(source, used), used, numbers)
    return dataset.remove_columns(unused) if unused else dataset


def check_rows(rows: Sequence[Row], source: Source) -> None:
    """Refuse rows as `readable` does. They need not fit into a table; the first has all columns."""
    if not rows:
        return
    held = {c: value for c, value in rows[0].items() if any(row.get(c) is not None for row in rows)}
    check = RowCheck(source, used_columns(held, source))
    for place, row in enumerate(rows):
        check(row, place)


def check_row(row: Row, number: int, source: Source) -> dict[str, Any]:
    """
    Refuse a row that cannot be read, by itself: rows of other columns stand beside it.

    Returns:
        What stands in the columns in use.

    Raises:
        RowError: a value is of another type, or there is none.
    """
    held = without_nulls(row)
    try:
        used = used_columns(held, replace(source, where=f"row {number} of {source.where}"))
    except ValueError as error:
        raise RowError(str(error)) from error
    RowCheck(source, used)(held, number)
    return {column: held[column] for column in used}


def rows_of(dataset: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """The rows with their places; other columns, such as pictures, are not read."""
    if not columns:
        return
    batches: Any = dataset.with_format(None).select_columns(list(columns)).iter(_ROWS_AT_ONCE)
    places = itertools.count()
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            yield next(places), dict(zip(batch, values, strict=True))


def _nulls(dataset: Dataset, column: str) -> Literal["", "some", "all"]:
    """How many values of a column are null."""
    if dataset.data.column(column).null_count == 0:
        return ""
    has = {row[column] is None for _, row in rows_of(dataset, [column])}
    return "all" if has <= {True} else "some" if True in has else ""


def checked(
    dataset: AnyDataset,
    check: Callable[[Row, int], None],
    columns: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
    num_rows: int | None = None,
) -> AnyDataset:
    """
    The data as they are, every row looked at: of a stream the first one now, each of the others
    when it is read.

    Args:
        dataset: The data.
        check: Called with each row and its number.
        columns: What is read of each row; of a stream all.
        numbers: What the rows are known by; their places if `None`.
        num_rows: Rows looked at, from the first on; all if `None`, and of a stream.
    """
    if isinstance(dataset, IterableDataset):

        def passed(row: dict[str, Any], number: int) -> dict[str, Any]:
            check(row, number)
            return row

        check(next(iter(dataset)), 0)
        return dataset.map(passed, with_indices=True, features=dataset.features)
    for place, row in itertools.islice(rows_of(dataset, columns), num_rows):
        check(row, place if numbers is None else numbers[place])
    return dataset
