"""Statistics of samples, and their paired bootstrap intervals before and after training."""

# S samples; leading dimensions, where there are any, are resamples

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

# Of the columns, each [..., S], the statistic, [...].
Statistic = Callable[..., NDArray[np.float64]]

# Numbers of a column that are drawn at a time: 80 MB of them and of their places.
_NUM_DRAWN = 5_000_000


@dataclass(frozen=True)
class SampleValues:
    """
    What one model made of each of S samples, and the statistic of them that is reported.

    A mean over tokens is a ratio of two sums over samples. Both have to be kept: a mean of the
    means of the samples is another number, and a bootstrap of the tokens would take those of one
    text for independent.

    `form` says what the statistic does: `mean`, `ratio` of the sums of the two columns,
    `exp(ratio)`, or `aggregate`, a function of the items that the column counts.
    """

    ids: tuple[str, ...]  # names of the samples; the same in every model
    columns: tuple[NDArray[np.float64], ...]  # each [S]
    statistic: Statistic
    form: str
    items: tuple[Any, ...] | None = None  # what an `aggregate` is of

    @property
    def value(self) -> float:
        """The statistic of the samples as they are."""
        return float(self.statistic(*self.columns))

    def select(self, ids: Sequence[str]) -> "SampleValues":
        """The samples of these names, in this order."""
        place = {name: index for index, name in enumerate(self.ids)}
        rows = [place[name] for name in ids]
        return replace(self, ids=tuple(ids), columns=tuple(c[rows] for c in self.columns))


class Interval(NamedTuple):
    """A confidence interval, in the unit of the statistic."""

    low: float
    high: float


def mean_of(ids: Sequence[str], values: ArrayLike) -> SampleValues:
    """Values whose mean over the samples is reported."""
    return SampleValues(tuple(ids), (np.asarray(values, float),), lambda v: v.mean(-1), "mean")


def ratio_of(
    ids: Sequence[str], numerators: ArrayLike, denominators: ArrayLike, *, exp: bool = False
) -> SampleValues:
    """
    Values whose ratio of sums is reported, as of log-probabilities to tokens; with `exp` the
    exponential of it, as for a perplexity.
    """
    columns = (np.asarray(numerators, float), np.asarray(denominators, float))
    statistic, form = (_exp_ratio, "exp(ratio)") if exp else (_ratio, "ratio")
    return SampleValues(tuple(ids), columns, statistic, form)


def statistic_of(
    ids: Sequence[str], items: Sequence[Any], aggregate: Callable[[list[Any]], float]
) -> SampleValues:
    """Items of any kind, of which a function makes a number; slow, for what has no other form."""

    def of_places(places: Any) -> Any:
        def of_one(row: Any) -> float:
            return float(aggregate([items[int(place)] for place in row]))

        return np.apply_along_axis(of_one, -1, places)

    places = (np.arange(len(items), dtype=float),)
    return SampleValues(tuple(ids), places, of_places, "aggregate", tuple(items))


def interval(
    values: SampleValues, *, num_bootstrap: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """
    Confidence interval of a statistic, by the bootstrap over the samples.

    Args:
        values: The samples and the statistic.
        num_bootstrap: Number of resamples.
        confidence: Share of intervals, in (0, 1), that are to hold the statistic of the population.
        seed: Of the resampling.

    Returns:
        The interval, or `None` where there are fewer than two samples.

    The percentile interval: its ends are quantiles of the statistic over the resamples. So it holds
    possible values only, turns with a transform (a perplexity's interval is that of the logarithm),
    and needs no jackknife; it is too narrow by about a factor sqrt((S - 1) / S), which is 1 % at 50
    samples. It knows the samples only: where none of S samples shows something, it is [0, 0],
    though up to 3 / S of the population may (at 95 %).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    return _percentile(values.columns, values.statistic, num_bootstrap, confidence, seed)


def paired_interval(
    before: SampleValues,
    after: SampleValues,
    *,
    num_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """
    Confidence interval of after minus before, on the same samples.

    A resample takes the same samples for both models, so what makes a sample hard for both does not
    widen the interval. All else as in `interval`.

    Raises:
        ValueError: the samples are not the same.
    """
    if before.ids != after.ids:
        raise ValueError(
            "A paired interval needs the same samples in the same order, but got "
            f"{len(before.ids)} and {len(after.ids)} that differ. Select those in common with "
            "`SampleValues.select`."
        )
    num_before = len(before.columns)

    def difference(*columns: Any) -> Any:
        return after.statistic(*columns[num_before:]) - before.statistic(*columns[:num_before])

    columns = before.columns + after.columns
    return _percentile(columns, difference, num_bootstrap, confidence, seed)


def _percentile(
    columns: tuple[NDArray[np.float64], ...],
    statistic: Statistic,
    num_bootstrap: int,
    confidence: float,
    seed: int,
) -> Interval | None:
    num_samples = len(columns[0])
    if num_samples < 2:
        return None
    result = bootstrap(
        columns,
        lambda *resampled, axis: statistic(*(np.moveaxis(c, axis, -1) for c in resampled)),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=num_bootstrap,
        confidence_level=confidence,
        batch=max(1, _NUM_DRAWN // num_samples),
        rng=np.random.default_rng(seed),
    )
    return Interval(*map(float, result.confidence_interval))


def _ratio(numerators: Any, denominators: Any) -> Any:
    return numerators.sum(-1) / denominators.sum(-1)


def _exp_ratio(numerators: Any, denominators: Any) -> Any:
    return np.exp(_ratio(numerators, denominators))
