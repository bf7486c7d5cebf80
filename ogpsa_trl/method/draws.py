"""
Which capability samples a refresh sees: as many tokens as a budget buys, of samples not seen yet.

Where the budget buys a sample of every group, every refresh sees as many of each. Where it does
not, the groups take turns. A group gives all of its samples once before one comes again.

Where the budget buys few whole texts, every second turn of a group goes to beginnings of answers:
there a model refuses or does not, and the same tokens buy more of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from ogpsa_trl.data.groups import CapabilityGroup, Part, Sample, beginning

# Samples of a group that a budget buys for a refresh, at most; a few more where each process takes
# one (measured: from 4 to 8 capability and over-refusal stay the same).
ENOUGH_SAMPLES = 8

# Trained tokens of a beginning (measured: docs/benchmark.md).
BEGINNING = 8
# Beginnings longer than this share of whole texts are nearly the texts themselves.
_WORTHWHILE = 0.75


@dataclass(frozen=True)
class Draws:
    """
    Attributes:
        seed: Of the order of the samples.
        num_samples: Samples of a group in a refresh; `None`: all of them.
        num_groups: Groups in a refresh; `None`: all of them.
        num_beginnings: Of every group, samples in a turn of beginnings; 0: it has no such turns.
    """

    seed: int
    num_samples: int | None = None
    num_groups: int | None = None
    num_beginnings: tuple[int, ...] = ()

    @classmethod
    def within(
        cls,
        budget: float,
        lengths: Sequence[float],
        beginnings: Sequence[float | None],
        *,
        num_processes: int,
        num_parts: int,
        seed: int,
    ) -> "Draws":
        """
        As many samples as a budget buys, at least some of one group, and no more than are enough.

        Args:
            budget: Tokens of a refresh, on all processes.
            lengths: Tokens of a sample of each group, on average.
            beginnings: Tokens of a beginning of each group, on average; `None`: it has no prompts.
            num_processes: Samples come in this many at a time, so that no process is idle.
            num_parts: Gradients of a group, each of which needs a sample.
            seed: Of the order of the samples.
        """
        step = math.ceil(num_parts / num_processes) * num_processes
        most = math.ceil(ENOUGH_SAMPLES / step) * step
        times = budget / (step * sum(lengths))
        num_samples = min(max(int(times), 1) * step, most)
        num_groups = None if times >= 1 else max(1, int(times * len(lengths)))
        budget_of_group = budget / (num_groups or len(lengths))
        num_beginnings = [
            0
            if tokens is None or tokens > _WORTHWHILE * length
            else min(int(budget_of_group / (step * tokens)) * step, most)
            for tokens, length in zip(beginnings, lengths, strict=True)
        ]
        return cls(
            seed, num_samples, num_groups,
            tuple(number if number > num_samples else 0 for number in num_beginnings),
        )  # fmt: skip

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
                number = self._num_beginnings(index)
                half, is_beginning = divmod(turns[index], 2) if number else (turns[index], 0)
                pool = self._pools(group, index)[is_beginning]
                num_samples = number if is_beginning else self.num_samples
                parts += group.parts(self._drawn(group.name, pool, num_samples, half))
            else:
                parts += [None] * group.num_parts
        return parts

    def used(self, groups: Sequence[CapabilityGroup], num_refreshes: int) -> list[CapabilityGroup]:
        """The groups with no more samples, and of those no more tokens, than refreshes draw."""
        if self.num_samples is None:
            return list(groups)
        num_turns = 1 + max(self._turns(len(groups), max(num_refreshes - 1, 0)).values())
        used = []
        for index, group in enumerate(groups):
            number = self._num_beginnings(index)
            num_whole = math.ceil(num_turns / 2) if number else num_turns
            whole, begun = self._pools(group, index)
            samples = {s.name: s for s in whole[: num_whole * self.num_samples]}
            for sample in begun[: (num_turns - num_whole) * number]:
                samples.setdefault(sample.name, beginning(sample, BEGINNING))
            order = [samples[s.name] for s in group.samples if s.name in samples]
            used.append(replace(group, samples=order))
        return used

    def _turns(self, num_groups: int, refresh: int) -> dict[int, int]:
        """Whose turn it is, and which one: the number of each group's turn."""
        size = self.num_groups or num_groups
        if refresh == 0 or size == num_groups:
            return dict.fromkeys(range(num_groups), refresh)
        places = range((refresh - 1) * size, refresh * size)
        return {place % num_groups: 1 + place // num_groups for place in places}

    def _num_beginnings(self, index: int) -> int:
        return self.num_beginnings[index] if self.num_beginnings else 0

    def _pools(self, group: CapabilityGroup, index: int) -> tuple[list[Sample], list[Sample]]:
        """
        The samples that are read as a whole, and those of which the beginning is: by their numbers,
        so that a longer run divides them in the same way.
        """
        number, num_samples = self._num_beginnings(index), self.num_samples or 0
        if not number:
            return group.samples, []
        pools: tuple[list[Sample], list[Sample]] = [], []
        for sample in group.samples:
            pools[sample.number % (num_samples + number) >= num_samples].append(sample)
        return pools[0] or group.samples, pools[1] or group.samples  # of a very small group

    def _drawn(
        self, name: str, pool: list[Sample], num_samples: int | None, turn: int
    ) -> list[Sample]:
        if num_samples is None or num_samples >= len(pool):
            return pool
        epoch, start = divmod(turn * num_samples, len(pool))
        shuffled = self._shuffled(name, pool, epoch)
        if start + num_samples > len(shuffled):
            shuffled += self._shuffled(name, pool, epoch + 1)
        return shuffled[start : start + num_samples]

    def _shuffled(self, name: str, pool: Sequence[Sample], epoch: int) -> list[Sample]:
        samples = list(pool)
        Random(f"{self.seed} {name} {epoch}").shuffle(samples)
        return samples


def mean_length(samples: Sequence[Sample]) -> float:
    """Tokens of a sample, on average, those of its prompt included."""
    return sum(len(sample.features["input_ids"]) for sample in samples) / len(samples)


def mean_beginning(samples: Sequence[Sample]) -> float | None:
    """Tokens of the beginning of a sample, on average; `None` where most have no prompt."""
    if 2 * sum(sample.has_prompt for sample in samples) < len(samples):
        return None
    return mean_length([beginning(sample, BEGINNING) for sample in samples])
