"""Figures of results: runs against each other, and changes with their intervals."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogpsa_trl.evaluation.tables import cell, interval_text, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ogpsa_trl.evaluation.results import Result

# Okabe and Ito's palette: told apart with any colour vision. Grey comes first, for the model that
# nothing was done to.
COLOURS = ("#999999", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#000000")

# Of a change: colour, marker and what it says. Grey and hollow where its sign is not known.
_VERDICTS = {
    "better": (COLOURS[4], "o", "better"),
    "worse": (COLOURS[5], "X", "worse"),
    "unclear": (COLOURS[0], "o", "not told apart from zero"),
    None: (COLOURS[7], "d", "no verdict"),
}
_TINT = "#e3eef8"  # of COLOURS[4], light enough for all of the others


def new_figure(width: float, height: float) -> "Figure":
    """
    A figure of our own, in inches, which leaves the user's backend alone.

    Matplotlib is imported here, because nothing else needs it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def saved(figure: "Figure", path: str | Path, title: str | None = None) -> Path:
    """Write a figure, under a heading, as a PNG file; its folder is made if need be."""
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


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
        runs (`Mapping[str, Mapping[str, float]]`): Name of each run to its measures. Up to 8 runs
            have a colour of their own. A run may lack a measure.
        path (`str` or `Path`): PNG file to write; its folder is made if need be.
        lower_is_better (`Collection[str]`, *optional*, defaults to `()`): The measures of which
            less is better; the others are marked as the higher, the better.
        title (`str`, *optional*): Heading of the figure.
        num_columns (`int`, *optional*, defaults to `4`): Panels in a line, at least 1.
        digits (`int`, *optional*, defaults to `3`): Digits after the point of the values.

    Returns:
        `Path`: The file written.

    Raises:
        ValueError: If the runs hold no measure, or `lower_is_better` names one that no run has.
    """
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
    height = 0.8 + num_lines * (0.7 + 0.24 * len(runs))
    figure = new_figure(1.6 + 2.5 * num_columns, height)
    panels = list(figure.subplots(num_lines, num_columns, sharey=True, squeeze=False).flat)
    names = list(runs)
    for panel, measure in zip(panels, measures, strict=False):
        _draw_panel(panel, [runs[name].get(measure) for name in names], digits)
        panel.set_title(measure, loc="left", fontsize=10, fontweight="bold")
        arrow = r"$\downarrow$" if measure in lower_is_better else r"$\uparrow$"
        panel.text(
            1.03, 1.03, f"{arrow} better", transform=panel.transAxes, va="bottom", fontsize=7
        )
        panel.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)  # left edge only
        panel.set_ylim(len(names) - 0.4, -0.6)  # the first run on top
    for panel in panels[len(measures) :]:
        panel.set_visible(False)
    return saved(figure, path, title)


def _draw_panel(panel: "Axes", values: Sequence[float | None], digits: int) -> None:
    known = [value for value in values if value is not None]
    for row, value in enumerate(values):
        if value is not None:
            panel.barh(row, value, height=0.72, color=COLOURS[row % len(COLOURS)])
        place = {"transform": panel.get_yaxis_transform(), "va": "center", "fontsize": 8}
        panel.text(1.03, row, cell(value, digits), **place)
    if all(0 <= value <= 1 for value in known):
        panel.set_xlim(0, 1)
    if values[0] is not None:
        panel.axvline(values[0], color="#333333", linewidth=0.9, linestyle=":")
    panel.tick_params(axis="x", labelsize=7)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)


def change_figure(
    results: Sequence["Result"],
    path: str | Path,
    *,
    title: str | None = None,
    confidence: float = 0.95,
    digits: int = 4,
) -> Path:
    """
    Draw the changes of the measures with their intervals: one panel per unit, one line per measure.

    Tinted is the side of zero on which the change is for the better.

    Args:
        results: As `compare` gives them; those without a change are not drawn.
        path: PNG file to write; its folder is made if need be.
        title: Heading of the figure.
        confidence: Of the intervals, for the legend.
        digits: Digits after the point of the values.

    Raises:
        ValueError: no result has a change.
    """
    panels: dict[str, list[Result]] = {}
    for result in results:
        if result.delta is not None:
            panels.setdefault(result.unit, []).append(result)
    if not panels:
        raise ValueError(
            "A figure of changes needs measures of two models, but no result has a change. Name "
            "the model before with `base_model_name_or_path`."
        )
    # In inches: a line each, and around each panel its ticks and title.
    heights = [0.3 * len(members) + 0.25 for members in panels.values()]
    figure = new_figure(9, sum(heights) + 0.5 * len(heights) + 1.0)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (unit, members) in zip(axes, panels.items(), strict=True):
        _draw_changes(panel, members, digits)
        panel.set_title(f"Change, {unit}", loc="left", fontsize=9, fontweight="bold")
    verdicts = {result.verdict for members in panels.values() for result in members}
    _change_legend(figure, verdicts, confidence)
    return saved(figure, path, title)


def _draw_changes(panel: "Axes", results: Sequence["Result"], digits: int) -> None:
    ends = [0.0]
    for row, result in enumerate(results):
        assert result.delta is not None
        value, interval = result.delta
        colour, marker, _ = _VERDICTS[result.verdict]
        low, high = interval or (value, value)
        ends += [low, value, high]
        panel.plot([low, high], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        is_clear = result.verdict != "unclear"
        panel.plot(
            value, row, marker, color=colour, markersize=7, markeredgewidth=1.4,
            markerfacecolor=colour if is_clear else "white",
        )  # fmt: skip
        text = f"{signed(value, digits)}  {interval_text(result.delta, digits) or ''}"
        panel.text(1.015, row, text, transform=panel.get_yaxis_transform(), va="center", fontsize=8)
    margin = 0.08 * (max(ends) - min(ends)) or 0.1  # all of them zero
    left, right = min(ends) - margin, max(ends) + margin
    for row, result in enumerate(results):
        if result.higher_is_better is not None:
            good = (0, right) if result.higher_is_better else (left, 0)
            panel.fill_between(good, row - 0.42, row + 0.42, color=_TINT, linewidth=0, zorder=0)
    panel.set_xlim(left, right)
    panel.set_ylim(len(results) - 0.4, -0.6)  # the first on top
    panel.axvline(0, color="#333333", linewidth=0.9, linestyle=":")
    names = [result.name for result in results]  # of groups: as they are, not as mathematics
    panel.set_yticks(range(len(results)), names, fontsize=8.5, parse_math=False)
    panel.tick_params(axis="x", labelsize=7)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _change_legend(figure: "Figure", verdicts: Collection[str | None], confidence: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D(
            [], [], color=colour, marker=marker, linewidth=2.2, markersize=7, markeredgewidth=1.4,
            markerfacecolor="white" if verdict == "unclear" else colour, label=label,
        )
        for verdict, (colour, marker, label) in _VERDICTS.items()
        if verdict in verdicts
    ]  # fmt: skip
    handles.append(Patch(color=_TINT, label="good direction"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False,
        title=f"{100 * confidence:g} % intervals, by the bootstrap over the samples",
        title_fontsize=8,
    )  # fmt: skip
