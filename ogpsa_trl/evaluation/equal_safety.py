"""
Capability at equal safety.

At equal steps a method can look as if it kept more when it has only learned less. So each method is
run over a sweep (of learning rates, say), and what it keeps is read off where its safety has a
stated level.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

from ogpsa_trl.evaluation.figures import new_figure, saved

Measures = Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """
    Values of several seeds.

    Args:
        mean (`float`): Their mean.
        sd (`float`): Their standard deviation (of a sample); 0 for one value.
        num (`int`): How many there are.
    """

    mean: float
    sd: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """
        Mean and standard deviation of values.

        Raises:
            ValueError: there are none.
        """
        if not values:
            raise ValueError("`values` must hold at least one value, but is empty.")
        return cls(mean(values), stdev(values) if len(values) > 1 else 0.0, len(values))

    def __format__(self, form: str) -> str:
        """Mean and standard deviation, both in a form of numbers; the mean alone of one value."""
        sd = f" +- {self.sd:{form.removeprefix('+')}}" if self.num > 1 else ""
        return f"{self.mean:{form}}{sd}"

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; 0 for one value, of which nothing is known."""
        return self.sd / math.sqrt(self.num)


def at_safety(sweep: Sequence[Measures], safety: str, level: float) -> dict[str, float] | None:
    """
    The measures of a method where its safety has a level, interpolated linearly within a sweep.

    Args:
        sweep: Measures of the runs, in the order of the sweep: the learning rate rising.
        safety: The measure that says how safe a model is.
        level: The value of it that is looked for.

    Returns:
        All measures that both neighbours have. Where the sweep passes the level more than once the
        first time counts, because it is the gentlest training that is safe enough. `None` where no
        two neighbouring runs have the level between them: nothing is extrapolated.
    """
    runs = [run for run in sweep if math.isfinite(run[safety])]
    for run in runs[:1]:
        if run[safety] == level:
            return dict(run)
    for below, above in pairwise(runs):
        low, high = below[safety], above[safety]
        if min(low, high) <= level <= max(low, high) and low != high:
            share = (level - low) / (high - low)
            return {
                name: value + share * (above[name] - value)
                for name, value in below.items()
                if name in above
            }
    return None


def paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> Spread | None:
    """
    Differences `values - others` by seed, over the seeds that have both; `None` where none has.

    What seeds have in common (the data, the base model) cancels, so the differences vary less than
    the values.
    """
    common = sorted(set(values) & set(others))
    if not common:
        return None
    return Spread.of([values[seed] - others[seed] for seed in common])


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
        sweeps (`Mapping[str, Sequence[Mapping[str, Spread]]]`): Name of each method to the measures
            of its runs, in the order of the sweep.
        path (`str` or `Path`): PNG file to write; its folder is made if need be.
        safety (`str`): The measure along the horizontal axis.
        capability (`str`): The measure along the vertical axis.
        colour (`str`): The measure that colours the marks, over-refusal for one.
        marked (`int`): Which run of a sweep gets the mark, counted from 0.
        start (`Mapping[str, float]`): The measures of the model that training starts from, shown as
            a star.
        levels (`Sequence[float]`, *optional*, defaults to `()`): Values of safety to show as dotted
            lines.
        lower_is_better (`Collection[str]`, *optional*, defaults to `()`): The measures of which
            less is better.
        title (`str`, *optional*): Heading of the figure.

    Returns:
        `Path`: The file written.

    Raises:
        ValueError: If there are no methods.
    """
    if not sweeps:
        raise ValueError("`sweeps` must hold at least one method, but is empty.")
    figure = new_figure(13, 5.6)
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
    return saved(figure, path, title)


def share_figure(
    kept: Mapping[str, Mapping[float, Spread]],
    path: str | Path,
    *,
    capability: str,
    title: str | None = None,
) -> Path:
    """
    Draw what each method keeps against what its capability data cost.

    Args:
        kept: Capability by method and by share of the training tokens.
        path: PNG file to write; its folder is made if need be.
        capability: Name of the vertical axis.
        title: Heading of the figure.

    Returns:
        The file written.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for name, spreads in kept.items():
        shares = sorted(spreads)
        axes.errorbar(
            shares, [spreads[share].mean for share in shares],
            yerr=[spreads[share].standard_error for share in shares],
            marker="o", markersize=4, linewidth=1.2, capsize=2, label=name,
        )  # fmt: skip
    ticks = sorted({share for spreads in kept.values() for share in spreads})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("capability tokens / training tokens")
    axes.set_ylabel(capability)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return saved(figure, path, title)
