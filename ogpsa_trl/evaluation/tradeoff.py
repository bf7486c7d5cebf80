"""
Capability at equal safety.

At equal steps a method can look as if it kept more when it has only learned less. So each method is
run over a sweep (of learning rates, say), and what it keeps is read off where its safety has a
stated level.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev

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
