"""
Which capability samples a refresh sees: as many tokens as a budget buys, of samples not seen yet.

Where the budget buys a sample of every group, every refresh sees as many of each. Where it does
not, the groups take turns. A group gives all of its samples once before one comes again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from ogpsa_trl.data.groups import CapabilityGroup, Part, Sample

# Samples of a group that a budget buys for a refresh, at most; a few more where each process takes
# one (measured: from 4 to 8 capability and over-refusal stay the same).
ENOUGH_SAMPLES = 8


@dataclass(frozen=True)
class Draws:
    """
    Attributes:
        seed: Of the order of the samples.
        num_samples: Samples of a group in a refresh; `None`: all of them.
        num_groups: Groups in a refresh; `None`: all of them.
    """

    seed: int
    num_samples: int | None = None
    num_groups: int | None = None

    @classmethod
    def within(
        cls,
        budget: float,
        lengths: Sequence[float],
        *,
        num_processes: int,
        least: int,
        seed: int,
    ) -> "Draws":
        """
        As many samples as a budget buys, at least some of one group, and no more than are enough.

        Args:
            budget: Tokens of a refresh, on all processes.
            lengths: Tokens of a sample of each group, on average.
            num_processes: Samples come in this many at a time, so that no process is idle.
            least: Samples that a group needs in a refresh: one for each of its gradients.
            seed: Of the order of the samples.
        """
        step = math.ceil(least / num_processes) * num_processes
        num_rounds = budget / (step * sum(lengths))
        if num_rounds >= 1:
            return cls(seed, min(int(num_rounds), math.ceil(ENOUGH_SAMPLES / step)) * step)
        return cls(seed, step, max(1, int(num_rounds * len(lengths))))

    def parts(self, groups: Sequence[CapabilityGroup], refresh: int) -> list[Part | None]:
        """
        The parts of all groups, in order; `None` for those of a group whose turn it is not.

        Args:
            groups: The capability groups.
            refresh: The number of the refresh; in the first, 0, all groups have their turn.
        """
        turns = self._turns(len(groups), refresh)
        parts: list[Part | None] = []
        for index, group in enumerate(groups):
            if index in turns:
                parts += group.parts(self._samples(group, turns[index]))
            else:
                parts += [None] * group.num_parts
        return parts

    def used(self, groups: Sequence[CapabilityGroup], num_refreshes: int) -> list[CapabilityGroup]:
        """The groups with no more samples than so many refreshes draw."""
        if self.num_samples is None:
            return list(groups)
        num_turns = 1 + max(self._turns(len(groups), max(num_refreshes - 1, 0)).values())
        return [replace(g, samples=g.samples[: num_turns * self.num_samples]) for g in groups]

    def _turns(self, num_groups: int, refresh: int) -> dict[int, int]:
        """Whose turn it is, and which one: the number of each group's turn."""
        size = self.num_groups or num_groups
        if refresh == 0 or size == num_groups:
            return dict.fromkeys(range(num_groups), refresh)
        places = range((refresh - 1) * size, refresh * size)
        return {place % num_groups: 1 + place // num_groups for place in places}

    def _samples(self, group: CapabilityGroup, turn: int) -> list[Sample]:
        if self.num_samples is None or self.num_samples >= len(group.samples):
            return group.samples
        epoch, start = divmod(turn * self.num_samples, len(group.samples))
        shuffled = self._shuffled(group, epoch)
        if start + self.num_samples > len(shuffled):
            shuffled += self._shuffled(group, epoch + 1)
        return shuffled[start : start + self.num_samples]

    def _shuffled(self, group: CapabilityGroup, epoch: int) -> list[Sample]:
        samples = list(group.samples)
        Random(f"{self.seed} {group.name} {epoch}").shuffle(samples)
        return samples


def mean_length(group: CapabilityGroup) -> float:
    """Tokens of a sample of a group, on average, those of its prompt included."""
    return sum(len(s.features["input_ids"]) for s in group.samples) / len(group.samples)
