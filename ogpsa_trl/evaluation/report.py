"""Results as a table for a text and as a figure."""

from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from ogpsa_trl.evaluation.tradeoff import Spread

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


def tradeoff_figure(
    sweeps: Mapping[str, Sequence[Mapping[str, Spread]]],
    path: str | Path,
    *,
    safety: str,
    capability: str,
    colour: str,
    marked: int,
    start: Mapping[str, float],
    levels: Sequence[float] = (),
    lower_is_better: Collection[str] = (),
    title: str | None = None,
) -> Path:
    """
    Draw capability against safety, a line for the sweep of each method and one mark on it.

    Better is further up and to the right: an axis whose measure is better when lower is turned
    round. The mark is the same run of the sweep for all methods, numbered as in the legend, with
    standard deviations over the seeds as bars, and its colour is a third measure. A second panel
    shows the better half of the marks at a larger scale.

    Args:
        sweeps (`Mapping[str, Sequence[Mapping[str, Spread]]]`):
            Name of each method to the measures of its runs, in the order of the sweep.
        path (`str` or `Path`):
            PNG file to write; its folder is made if need be.
        safety (`str`):
            The measure along the horizontal axis.
        capability (`str`):
            The measure along the vertical axis.
        colour (`str`):
            The measure that colours the marks, over-refusal for one.
        marked (`int`):
            Which run of a sweep gets the mark, counted from 0.
        start (`Mapping[str, float]`):
            The measures of the model that training starts from, shown as a star.
        levels (`Sequence[float]`, *optional*, defaults to `()`):
            Values of safety to show as dotted lines.
        lower_is_better (`Collection[str]`, *optional*, defaults to `()`):
            The measures of which less is better.
        title (`str`, *optional*):
            Heading of the figure.

    Returns:
        `Path`:
            The file written.

    Raises:
        ValueError: If there are no methods.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not sweeps:
        raise ValueError("`sweeps` must hold at least one method, but is empty.")
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    whole, close = figure.subplots(1, 2)
    marks = {name: sweep[marked] for name, sweep in sweeps.items()}
    shades = [mark[colour].mean for mark in marks.values()]
    low, high = min(shades), max(shades)
    for axes in (whole, close):
        for level in levels:
            axes.axvline(level, color="#333333", linewidth=0.7, linestyle=":", zorder=0)
        for name, sweep in sweeps.items():
            axes.plot(
                [run[safety].mean for run in sweep],
                [run[capability].mean for run in sweep],
                color="#bbbbbb", linewidth=0.8, marker=".", markersize=3, zorder=1,
            )  # fmt: skip
            x, y = marks[name][safety], marks[name][capability]
            axes.errorbar(
                x.mean, y.mean, xerr=x.sd, yerr=y.sd,
                fmt="none", ecolor="#777777", elinewidth=0.8, capsize=2, zorder=2,
            )  # fmt: skip
        axes.scatter(
            [start[safety]], [start[capability]],
            marker="*", s=130, color="#d55e00", zorder=3, label="starting model",
        )  # fmt: skip
        points = axes.scatter(
            [mark[safety].mean for mark in marks.values()],
            [mark[capability].mean for mark in marks.values()],
            c=shades, cmap="viridis_r", vmin=low, vmax=high, s=120, edgecolors="#333333", zorder=3,
        )  # fmt: skip
        for number, mark in enumerate(marks.values(), start=1):
            is_dark = mark[colour].mean > (low + high) / 2  # the scale darkens upwards
            axes.annotate(
                str(number),
                (mark[safety].mean, mark[capability].mean),
                ha="center", va="center", fontsize=7, zorder=4, annotation_clip=True,
                color="white" if is_dark else "black",
            )  # fmt: skip
        axes.set_xlabel(safety)
        axes.spines[["top", "right"]].set_visible(False)
    # The marks crowd where little is lost, so the better half of them is shown once more.
    sign = -1 if capability in lower_is_better else 1
    by_capability = sorted(marks.values(), key=lambda mark: -sign * mark[capability].mean)
    better = by_capability[: len(marks) // 2 + 1]
    for measure, set_limits in ((safety, close.set_xlim), (capability, close.set_ylim)):
        lowest = min(mark[measure].mean - mark[measure].sd for mark in better)
        highest = max(mark[measure].mean + mark[measure].sd for mark in better)
        margin = 0.08 * (highest - lowest) or 0.01
        set_limits(lowest - margin, highest + margin)
    for axes in (whole, close):
        axes.xaxis.set_inverted(safety in lower_is_better)
        axes.yaxis.set_inverted(capability in lower_is_better)
    whole.set_ylabel(capability)
    close.set_title("the better half of the methods", loc="left", fontsize=9)
    for number, name in enumerate(marks, start=1):
        whole.plot(
            [], [],
            linestyle="none", marker=f"${number}$", markersize=5 + 3 * (number > 9),
            color="#333333", markeredgewidth=0, label=name,
        )  # fmt: skip
    figure.colorbar(points, ax=close, label=colour, pad=0.01)
    figure.legend(
        *whole.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8
    )
    if title:
        figure.suptitle(title, fontsize=11)
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
