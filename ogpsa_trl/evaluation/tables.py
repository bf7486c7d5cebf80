"""Tables of results, as Markdown and for a terminal."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from ogpsa_trl.evaluation.results import Estimate, Result


def markdown_table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str] | None = None,
    *,
    digits: int = 3,
    style: str = "pipe",
) -> str:
    """
    A table of results.

    Args:
        rows (`Sequence[Mapping[str, object]]`): One mapping from column name to value per row. A
            missing value or `None` becomes a dash.
        columns (`Sequence[str]`, *optional*): The columns to show, in this order; default: all. One
            that holds only numbers is aligned to the right.
        digits (`int`, *optional*, defaults to `3`): Digits after the point of values that are not
            whole numbers by type.
        style (`str`, *optional*, defaults to `"pipe"`): A `tablefmt` of tabulate: Markdown, or
            `"simple"` for a terminal.

    Returns:
        `str`: The lines of the table, without a line break at the end.

    Raises:
        ValueError: If there are no columns.
    """
    columns = list(dict.fromkeys(c for row in rows for c in row)) if columns is None else columns
    if not columns:
        raise ValueError(
            "`columns` must name at least one column, but got none. Pass the names to show."
        )
    values = [[row.get(column) for column in columns] for row in rows]
    is_number = [
        bool(rows) and all(value is None or isinstance(value, Real) for value in column)
        for column in (zip(*values, strict=True) if rows else columns)
    ]
    return tabulate(
        [[cell(value, digits) for value in row] for row in values],
        [cell(column, digits) for column in columns],
        tablefmt=style,
        disable_numparse=True,  # a text that looks like a number is one of our own making
        colalign=["right" if number else "left" for number in is_number],
    )


def cell(value: object, digits: int = 3) -> str:
    """A value as text that cannot break a table; a dash where there is none."""
    if value is None:
        return "-"
    is_fraction = isinstance(value, Real) and not isinstance(value, int)
    text = f"{value:.{digits}f}" if is_fraction else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def result_rows(results: Sequence["Result"], *, digits: int = 4) -> list[dict[str, object]]:
    """
    The rows of a table of measures before and after.

    Args:
        results: As `compare` gives them.
        digits: Digits after the point.

    Returns:
        The columns `measure`, `unit`, `good` (which way), `before`, `after`, `change`, `interval`
        (of the change; where there is none, of the value after), `verdict` and `samples`.
    """
    return [
        {
            "measure": result.name,
            "unit": result.unit,
            "good": {True: "up", False: "down", None: None}[result.higher_is_better],
            "before": result.before and result.before.value,
            "after": result.after.value,
            "change": result.delta and signed(result.delta.value, digits),
            "interval": interval_text(
                result.delta or result.after, digits, sign="+" if result.delta else ""
            ),
            "verdict": result.verdict,
            "samples": result.num_samples,
        }
        for result in results
    ]


def signed(value: float, digits: int, sign: str = "+") -> str:
    """A number with its sign, but for that of a zero."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def interval_text(estimate: "Estimate", digits: int, *, sign: str = "+") -> str | None:
    """An interval as text; `None` where there is none."""
    ends = estimate.interval
    return None if ends is None else f"[{', '.join(signed(end, digits, sign) for end in ends)}]"
