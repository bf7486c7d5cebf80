"""Results as a table for a text and as a figure."""

from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision. Grey comes first, for the model that
# nothing was done to.
COLOURS = ("#999999", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#000000")
MISSING = "-"


def markdown_table(
    rows: Sequence[Mapping[str, object]], columns: Sequence[str], *, digits: int = 3
) -> str:
    """
    A Markdown table, readable as plain text too.

    Args:
        rows (`Sequence[Mapping[str, object]]`):
            One mapping from column name to value per row. A missing value or `None` becomes a dash.
        columns (`Sequence[str]`):
            The columns to show, in this order. One that holds only numbers is aligned to the right.
        digits (`int`, *optional*, defaults to `3`):
            Digits after the point of values that are not whole numbers by type.

    Returns:
        `str`:
            The lines of the table, without a line break at the end.

    Raises:
        ValueError: If `columns` is empty.
    """
    if not columns:
        raise ValueError(
            "`columns` must name at least one column, but got none. Pass the names to show."
        )
    values = [[row.get(column) for column in columns] for row in rows]
    cells = [[_cell(value, digits) for value in row] for row in values]
    is_number = [
        all(value is None or isinstance(value, Real) for value in column)
        for column in zip(*values, strict=True)
    ]
    is_number = is_number or [False] * len(columns)  # no rows, nothing known
    lines = [[_cell(column, digits) for column in columns], *cells]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    ruler = [
        "-" * (width - 1) + ":" if number else "-" * width
        for width, number in zip(widths, is_number, strict=True)
    ]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, is_number, strict=True)
        )
        + " |"
        for line in [lines[0], ruler, *lines[1:]]
    )


def comparison_figure(
    runs: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    lower_is_better: Collection[str] = (),
    title: str | None = None,
    num_columns: int = 4,
    digits: int = 3,
) -> Path:
    """
    Draw runs against each other: one panel per measure, one bar with its value per run.

    Bars start at zero, so their lengths compare; a panel whose values all lie in [0, 1] shows just
    that range. The runs keep their order and colour in every panel. A dotted line goes on from the
    first run, so put the untuned model first.

    Args:
        runs (`Mapping[str, Mapping[str, float]]`):
            Name of each run to its measures. Up to 8 runs have a colour of their own. A run may
            lack a measure.
        path (`str` or `Path`):
            PNG file to write; its folder is made if need be.
        lower_is_better (`Collection[str]`, *optional*, defaults to `()`):
            The measures of which less is better; the others are marked as the higher, the better.
        title (`str`, *optional*):
            Heading of the figure.
        num_columns (`int`, *optional*, defaults to `4`):
            Panels in a line, at least 1.
        digits (`int`, *optional*, defaults to `3`):
            Digits after the point of the values.

    Returns:
        `Path`:
            The file written.

    Raises:
        ValueError: If the runs hold no measure, or `lower_is_better` names one that no run has.
    """
    # Matplotlib is needed for nothing else, and drawing on a figure of our own leaves the user's
    # backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = list(dict.fromkeys(measure for values in runs.values() for measure in values))
    unknown = sorted(set(lower_is_better) - set(measures))
    if not measures or unknown:
        raise ValueError(
            f"`lower_is_better` must name measures of the runs, which must have at least one, but "
            f"got {unknown} and the measures {measures}. Take out the unknown names, or add their "
            "values to the runs."
        )
    num_columns = min(num_columns, len(measures))
    num_lines = -(-len(measures) // num_columns)
    figure = Figure(
        figsize=(1.6 + 2.5 * num_columns, 0.8 + num_lines * (0.7 + 0.24 * len(runs))),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(num_lines, num_columns, sharey=True, squeeze=False).flat)
    names = list(runs)
    for panel, measure in zip(panels, measures, strict=False):
        _draw_panel(panel, [runs[name].get(measure) for name in names], digits)
        panel.set_title(measure, loc="left", fontsize=10, fontweight="bold")
        arrow = r"$\downarrow$" if measure in lower_is_better else r"$\uparrow$"
        panel.text(
            1.03, 1.03, f"{arrow} better", transform=panel.transAxes, va="bottom", fontsize=7
        )
        panel.set_yticks(range(len(names)), names, fontsize=9)  # shown at the left edge only
        panel.set_ylim(len(names) - 0.4, -0.6)  # the first run on top
    for panel in panels[len(measures) :]:
        panel.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _draw_panel(panel: "Axes", values: Sequence[float | None], digits: int) -> None:
    known = [value for value in values if value is not None]
    for row, value in enumerate(values):
        if value is not None:
            panel.barh(row, value, height=0.72, color=COLOURS[row % len(COLOURS)])
        panel.text(
            1.03,
            row,
            _cell(value, digits),
            transform=panel.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
    if all(0 <= value <= 1 for value in known):
        panel.set_xlim(0, 1)
    if values[0] is not None:
        panel.axvline(values[0], color="#333333", linewidth=0.9, linestyle=":")
    panel.tick_params(axis="x", labelsize=7)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)


def _cell(value: object, digits: int) -> str:
    if value is None:
        return MISSING
    is_fraction = isinstance(value, Real) and not isinstance(value, int)
    text = f"{value:.{digits}f}" if is_fraction else str(value)
    return " ".join(text.split()).replace("|", "\\|")
