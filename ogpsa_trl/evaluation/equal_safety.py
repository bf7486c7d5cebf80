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
    measures: Sequence[str],
    start: Mapping[str, float],
    levels: Sequence[float] = (),
    lower_is_better: Collection[str] = (),
    title: str | None = None,
) -> Path:
    """
    Draw measures against safety: a panel for each, in it a line for the sweep of each method.

    Better is further up and to the right: an axis whose measure is better when lower is turned
    round. Bars are standard deviations over the seeds.

    Args:
        sweeps: Name of each method to the measures of its runs, in the order of the sweep.
        path: PNG file to write; its folder is made if need be.
        safety: The measure along the horizontal axes.
        measures: Those along the vertical axes.
        start: The measures of the model that training starts from, shown as a star.
        levels: Values of safety to show as dotted lines.
        lower_is_better: The measures of which less is better.
        title: Heading of the figure.

    Returns:
        The file written.

    Raises:
        ValueError: there are no methods.
    """
    if not sweeps:
        raise ValueError("`sweeps` must hold at least one method, but is empty.")
    figure = new_figure(5.2 * len(measures) + 2.4, 4.6)
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for level in levels:
            axes.axvline(level, color="#333333", linewidth=0.7, linestyle=":", zorder=0)
        for number, (name, sweep) in enumerate(sweeps.items()):
            axes.errorbar(
                [run[safety].mean for run in sweep], [run[measure].mean for run in sweep],
                xerr=[run[safety].sd for run in sweep], yerr=[run[measure].sd for run in sweep],
                color=f"C{number % 10}", marker="osD^v"[number // 10 % 5], markersize=4,
                linewidth=1.2, elinewidth=0.6, capsize=2, label=name,
            )  # fmt: skip
        axes.plot(
            start[safety], start[measure],
            linestyle="none", marker="*", markersize=11, color="black", label="before training",
        )  # fmt: skip
        axes.set_xlabel(safety)
        axes.set_ylabel(measure)
        axes.xaxis.set_inverted(safety in lower_is_better)
        axes.yaxis.set_inverted(measure in lower_is_better)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right upper", frameon=False, fontsize=8,
    )  # fmt: skip
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
