"""
Which capability samples a refresh sees: as many tokens as a budget buys, of samples not seen yet.

Where the budget buys few whole texts, refreshes take turns between whole texts and their
beginnings: a beginning is where a model refuses or answers, and the same tokens buy more of them.

Where the budget buys a sample of every group, every refresh sees as many of each. Where it does
not, the groups take turns. A group gives all of its samples once before one comes again.
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
# Beginnings that cost more than this share of the whole texts save too little.
_WORTHWHILE = 0.75


@dataclass(frozen=True)
class Round:
    """
    A kind of refresh.

    Attributes:
        num_samples: Samples of a group in a refresh; `None`: all of them.
        num_groups: Groups in a refresh; `None`: all of them.
        num_tokens: Trained tokens kept of each sample; `None`: all of them.
    """

    num_samples: int | None = None
    num_groups: int | None = None
    num_tokens: int | None = None

    @classmethod
    def within(
        cls,
        budget: float,
        lengths: Sequence[float],
        *,
        num_processes: int,
        num_parts: int,
        num_tokens: int | None = None,
    ) -> "Round":
        """
        As many samples as a budget buys, at least some of one group, and no more than are enough.

        Args:
            budget: Tokens of a refresh, on all processes.
            lengths: Tokens of a sample of each group, on average.
            num_processes: Samples come in this many at a time, so that no process is idle.
            num_parts: Gradients of a group, each of which needs a sample.
            num_tokens: Trained tokens kept of each sample.
        """
        step = math.ceil(num_parts / num_processes) * num_processes
        times = budget / (step * sum(lengths))
        if times >= 1:
            num_samples = min(int(times), math.ceil(ENOUGH_SAMPLES / step)) * step
            return cls(num_samples, None, num_tokens)
        return cls(step, max(1, int(times * len(lengths))), num_tokens)


@dataclass(frozen=True)
class Draws:
    """
    Attributes:
        seed: Of the order of the samples.
        rounds: Kinds of refreshes that take turns, the first of whole texts. Each has samples of
            its own.
    """

    seed: int
    rounds: tuple[Round, ...] = (Round(),)

    @classmethod
    def within(
        cls,
        budget: float,
        lengths: Sequence[float],
        beginnings: Sequence[float],
        *,
        num_processes: int,
        num_parts: int,
        seed: int,
    ) -> "Draws":
        """
        What a budget buys (see `Round.within`), of whole texts, or of them and of beginnings.

        Args:
            budget: Tokens of a refresh, on all processes.
            lengths: Tokens of a sample of each group, on average.
            beginnings: Tokens of the beginning of one.
            num_processes: Samples come in this many at a time.
            num_parts: Gradients of a group.
            seed: Of the order of the samples.
        """
        counts = {"num_processes": num_processes, "num_parts": num_parts}
        whole = Round.within(budget, lengths, **counts)
        has_enough = whole.num_groups is None and (whole.num_samples or 0) >= ENOUGH_SAMPLES
        if has_enough or sum(beginnings) > _WORTHWHILE * sum(lengths):
            return cls(seed, (whole,))
        return cls(seed, (whole, Round.within(budget, beginnings, **counts, num_tokens=BEGINNING)))

    @property
    def sees_all(self) -> bool:
        """Whether every refresh reads all samples."""
        return self.rounds[0].num_samples is None

    def parts(self, groups: Sequence[CapabilityGroup], refresh: int) -> list[Part | None]:
        """
        The parts of all groups, in order; `None` for those of a group whose turn it is not.

        Args:
            groups: The capability groups.
            refresh: The number of the refresh; in the first, 0, all groups have their turn.
        """
        visit, kind = divmod(refresh, len(self.rounds))
        turns = self._turns(kind, visit, len(groups))
        parts: list[Part | None] = []
        for index, group in enumerate(groups):
            if index in turns:
                parts += group.parts(self._samples(group, kind, turns[index]))
            else:
                parts += [None] * group.num_parts
        return parts

    def used(self, groups: Sequence[CapabilityGroup], num_refreshes: int) -> list[CapabilityGroup]:
        """The groups with no more samples, and of those no more tokens, than refreshes draw."""
        if self.sees_all:
            return list(groups)
        used = []
        for group in groups:
            samples: dict[str, Sample] = {}
            for kind, kind_of_refresh in enumerate(self.rounds):
                num_visits = math.ceil((num_refreshes - kind) / len(self.rounds))
                turns = self._turns(kind, max(num_visits - 1, 0), len(groups))
                num_samples = (1 + max(turns.values())) * (kind_of_refresh.num_samples or 0)
                for sample in self._pool(group, kind)[:num_samples]:
                    length = kind_of_refresh.num_tokens or sample.num_tokens
                    samples.setdefault(sample.name, beginning(sample, length))
            order = [samples[s.name] for s in group.samples if s.name in samples]
            used.append(replace(group, samples=order))
        return used

    def _turns(self, kind: int, visit: int, num_groups: int) -> dict[int, int]:
        """Whose turn it is, and which one: the number of each group's turn."""
        size = self.rounds[kind].num_groups or num_groups
        first = int(kind == 0)  # turns that all groups have at once, in the first refresh of all
        if size == num_groups or visit < first:
            return dict.fromkeys(range(num_groups), visit)
        places = range((visit - first) * size, (visit - first + 1) * size)
        return {place % num_groups: first + place // num_groups for place in places}

    def _pool(self, group: CapabilityGroup, kind: int) -> list[Sample]:
        """The samples of a kind: by their numbers, so that more samples change nothing."""
        sizes = [kind_of_refresh.num_samples or 0 for kind_of_refresh in self.rounds]
        if len(sizes) == 1:
            return group.samples
        numbers = range(sum(sizes[:kind]), sum(sizes[: kind + 1]))
        pool = [sample for sample in group.samples if sample.number % sum(sizes) in numbers]
        return pool or group.samples  # of a group that is too small

    def _samples(self, group: CapabilityGroup, kind: int, turn: int) -> list[Sample]:
        pool, num_samples = self._pool(group, kind), self.rounds[kind].num_samples
        if num_samples is None or num_samples >= len(pool):
            return pool
        epoch, start = divmod(turn * num_samples, len(pool))
        shuffled = self._shuffled(group.name, pool, epoch)
        if start + num_samples > len(shuffled):
            shuffled += self._shuffled(group.name, pool, epoch + 1)
        return shuffled[start : start + num_samples]

    def _shuffled(self, name: str, pool: Sequence[Sample], epoch: int) -> list[Sample]:
        samples = list(pool)
        Random(f"{self.seed} {name} {epoch}").shuffle(samples)
        return samples


def mean_length(samples: Sequence[Sample]) -> float:
    """Tokens of a sample, on average, those of its prompt included."""
    return sum(len(sample.features["input_ids"]) for sample in samples) / len(samples)
