"""The pictures of a run report: lines over the steps, as SVG for inside an HTML page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ogpsa_trl.run_report.log import Series

# Colours that stand for those of the page, which knows whether it is light or dark.
_TEXT, _GRID = "#010101", "#020202"
_LINES = ("#0a0000", "#0b0000", "#0c0000", "#0d0000", "#0e0000", "#0f0000")
_DASHES = ((), (5, 2), (1.5, 1.5))  # for more lines than colours
_MARKED = 40  # points of a line, up to which each has a mark
MOST_POINTS = 300  # of a line; where there are more, means of neighbours are drawn


class Line(NamedTuple):
    """A line of a chart: what it is, and its points."""

    label: str
    series: Series


@dataclass(frozen=True)
class Chart:
    """A picture and what is said of it."""

    title: str
    note: str  # what has to be known to read it
    lines: Sequence[Line]  # at least one
    limit: tuple[float, str] | None = None  # where a horizontal line is drawn, and what it says
    bounds: tuple[float, float] | None = None  # of the values, if they have any


def style(index: int) -> tuple[int, tuple[float, ...]]:
    """Number of the colour and dashes of a line: no two of the first 18 look alike."""
    return index % len(_LINES), _DASHES[index // len(_LINES) % len(_DASHES)]


def drawn(series: Series) -> Series:
    """The points of a line: at most `MOST_POINTS`, else means of equally many neighbours."""
    size = -(-len(series.steps) // MOST_POINTS)
    if size <= 1:
        return series
    starts = range(0, len(series.steps), size)
    values = [series.values[start : start + size] for start in starts]
    # The step of the last one: a mean stands where it is known.
    steps = [series.steps[start : start + size][-1] for start in starts]
    return Series(steps, [sum(block) / len(block) for block in values])


def svg(chart: Chart, name: str) -> str:
    """
    Draw a chart.

    No text that comes from data is in it: labels belong to the page, which escapes them.

    Args:
        chart: What to draw.
        name: A word that no other picture of the page has.

    Returns:
        An `<svg>` element with text as text, in the colours of the page: `currentColor` and the
        variables `--grid` and `--line-0` to `--line-5`.
    """
    import matplotlib  # needed for nothing else; a figure of our own leaves the backend alone
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "text.parse_math": False,
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(5.4, 2.3), layout="constrained")
        FigureCanvasSVG(figure)
        panel = figure.subplots()
        for index, line in enumerate(chart.lines):
            colour, dashes = style(index)
            steps, values = drawn(line.series)
            panel.plot(
                steps, values, color=_LINES[colour], linewidth=1.6, dashes=dashes or (None, None),
                marker="o" if len(steps) <= _MARKED else None, markersize=3,
            )  # fmt: skip
        if chart.limit is not None:
            panel.axhline(chart.limit[0], color=_TEXT, linewidth=1, linestyle=":")
        if chart.bounds is not None:
            panel.set_ylim(*chart.bounds)
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True))
        panel.grid(color=_GRID, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_TEXT, length=0)
        panel.xaxis.label.set_color(_TEXT)
        panel.yaxis.get_offset_text().set_color(_TEXT)
        panel.spines[:].set_visible(False)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_page(file.getvalue(), name)


def _for_page(text: str, name: str) -> str:
    """The element alone, with ids of its own and the page's font and colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)  # HTML knows them
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # would be that of all elements
    text = re.sub(r"font-family: [^;]*; ?", "", text)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    colours = {_TEXT: "currentColor", _GRID: "var(--grid)"}
    colours |= {colour: f"var(--line-{index})" for index, colour in enumerate(_LINES)}
    for colour, variable in colours.items():
        text = text.replace(colour, variable)
    return text
