"""
CapabilityLoss: what is protected. `nll` of the capability text, or `kl` to the starting model.

Both are sums over trainable tokens, in nats, and both are counted from the starting point: `rises`.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.groups import Batch, CapabilityGroup, Part
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.method.capability_gradients import deterministic
from ogpsa_trl.method.starting_point import (
    Measured,
    StartingPoint,
    all_samples,
    measure_part,
    measure_start,
    moved_embeddings,
    passes_looked_at,
)
from ogpsa_trl.tensors.divergence import divergence, likely_tokens
from ogpsa_trl.tensors.tiled_head import Score

logger = logging.getLogger(__name__)

# A divergence per token, in nats, that is rounding: log-probabilities in float32 that differ by
# 1e-6 make 1e-12.
_KL_ROUNDING = 1e-10

# Samples of each group that its floor is measured on. Measured: the floors of three draws of four
# sentences are within a tenth of their mean.
_SAMPLES_OF_FLOOR = 8


class CapabilityLoss:
    """
    The loss on capability samples, through the wrapped model.

    Args:
        config: The settings.
        groups: The capability groups.
        log_probs: Log-probabilities of the trainable tokens of a batch, zero elsewhere, shape
            [rows, length - 1], with their graph.
        scores: Of the trainable tokens of a batch, row by row, from their logits tile by tile.
    """

    def __init__(
        self,
        config: OGPSAConfig,
        groups: Sequence[CapabilityGroup],
        log_probs: Callable[[Batch], Tensor],
        scores: Callable[[Batch, Score], Tensor],
    ) -> None:
        self.config = config
        self.groups = groups
        self.log_probs = log_probs
        self.scores = scores
        # What the starting model makes of the samples, and that model. None: not measured yet.
        self.start: StartingPoint | None = None
        self._model: nn.Module | None = None
        # Whether the passes of this training have been looked at.
        self._is_floor_known = False

    def begin(self, model: nn.Module) -> None:
        """
        Training of a model begins, or begins again in the middle (`auto_find_batch_size`): what was
        measured of it counts as long as it is the same.
        """
        self._is_floor_known = False
        if model is not self._model:
            self.start, self._model = None, model

    @property
    def is_kl(self) -> bool:
        """Whether the loss is the divergence, zero at the start."""
        return self.config.capability_loss == "kl"

    @property
    def rounding(self) -> float:
        """A token-mean loss below which it is at its minimum but for rounding."""
        return _KL_ROUNDING if self.is_kl else 0.0

    def sum(self, batch: Batch) -> Tensor:
        """Sum over the trainable tokens of a batch, with its graph."""
        if not self.is_kl:
            return -self.log_probs(batch).sum()
        assert self.start is not None
        return self._divergence(batch, *self.start.likely_tokens(batch))

    def _divergence(self, batch: Batch, tokens_TK: Tensor, start_TX: Tensor) -> Tensor:
        """Summed over the trainable tokens, from these log-probabilities of these tokens."""

        def score(logits_TV: Tensor, positions: slice) -> Tensor:
            tile = (tokens_TK[positions], start_TX[positions])
            return divergence(logits_TV, *(values.to(logits_TV.device) for values in tile))

        return self.scores(batch, score).sum()

    @contextmanager
    def passes(self, backend: GradientBackend) -> Iterator[None]:
        """
        Around its passes. Scores come through a module that TRL's heads do not call.

        A divergence is a difference of nearly equal numbers: in bfloat16 its gradient after a first
        step is noise (measured: a cosine of .46 with that in float32, 30 times too long), that of
        `nll` is not (.9993).
        """
        precision = backend.full_precision() if self.is_kl else nullcontext()
        with backend.other_passes(), precision:
            yield

    def prepare(self, backend: GradientBackend, *, sees_all: bool) -> None:
        """
        Measure the starting point, if the first refresh needs it. A collective call.

        It does not where the refresh reads all samples anyway and their likelihood is enough.

        Args:
            backend: The engine.
            sees_all: Whether it reads all samples.
        """
        if not self.is_kl:
            if self.start is None and not sees_all:
                self.start = measure_start(backend, self.groups, self._measure)
        elif not self._is_floor_known:
            self._find_floors(backend)
            self._is_floor_known = True

    def _find_floors(self, backend: GradientBackend) -> None:
        """
        Measure the start, unless it is known. Count from what rounding makes of equal models, where
        the passes are rounded more than those in which it was measured: by another engine, it may
        be, or a model that is in autocast.
        """
        with passes_looked_at(backend) as epsilon_of_passes:
            if self.start is None:
                self.start = measure_start(backend, self.groups, self._measure)
            else:  # from a checkpoint: one pass is enough to see
                part = self.groups[0].part(self.groups[0].samples[:1])
                measure_part(backend, part, self._measure)
        epsilon = epsilon_of_passes()
        if epsilon <= self.start.epsilon:
            return
        self.start.epsilon = epsilon
        for group in self.groups:
            part = group.part(group.samples[:_SAMPLES_OF_FLOOR])
            floor = self.measure_floor(backend, part, epsilon)
            self.start.set_floor(group, floor)
            logger.info(
                "Capability group %r: below %.2g nats per token a divergence is not known from "
                "rounding, and nothing is restored.", group.name, floor,
            )  # fmt: skip

    @torch.no_grad()
    def measure_floor(self, backend: GradientBackend, part: Part, epsilon: float) -> float:
        """
        The token-mean divergence, in nats, that rounding alone makes of the model as it is: that of
        passes whose embeddings are moved by one rounding from passes in which they are not. What
        follows is then rounded in other ways too, as after a step of training. A collective call.

        Measured for two models of 260 thousand and 135 million parameters, in bfloat16: 4e-4 and
        1e-3; steps that are too small to see show .7 to 2 times as much.

        Args:
            backend: The engine.
            part: Samples to measure it on.
            epsilon: The relative rounding.
        """
        total = torch.zeros((), device=backend.device)
        generator = torch.Generator(backend.device).manual_seed(0)  # training draws as it would
        with deterministic(backend.wrapped_model):
            for batch in part.batches_of(backend.process_index, backend.num_processes):
                likely = self._likely_tokens(batch)
                with moved_embeddings(backend, epsilon, generator):
                    total += self._divergence(batch, *likely)
        return backend.sum_over_processes(total).item() / part.num_tokens

    def rises(self, parts: Sequence[Part | None], losses: Sequence[float]) -> list[float]:
        """
        How far the token-mean losses of parts are above those at the start, on their samples; NaN
        where it was not the turn of one.
        """
        if self.start is None:  # then all parts are there, with all samples
            known = [part for part in parts if part is not None]
            self.start = StartingPoint.from_losses(all_samples(self.groups), known, losses)
        return [loss - start for loss, start in zip(losses, self._at_start(parts), strict=True)]

    def floors(self, parts: Sequence[Part | None]) -> list[float]:
        """Divergences of parts, in nats per token, that rounding makes; none of other losses."""
        if not self.is_kl or self.start is None or not self.start.losses.any():
            return []
        return self._at_start(parts)

    def _at_start(self, parts: Sequence[Part | None]) -> list[float]:
        assert self.start is not None
        return [math.nan if part is None else self.start.mean_loss(part) for part in parts]

    def _measure(self, batch: Batch) -> list[Measured]:
        """What the starting point holds of every sample of a batch."""
        if not self.is_kl:
            losses = -self.log_probs(batch).sum(dim=1)
            return [{"losses": loss} for loss in losses[: len(batch.samples)]]
        counts = [sample.num_tokens for sample in batch.samples]
        start = self._likely_tokens(batch)
        return [
            {"losses": torch.zeros(()), "tokens": tokens, "log_probs": log_probs}
            for tokens, log_probs in zip(*(t.split(counts) for t in start), strict=True)
        ]

    def _likely_tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is kept of the model as it is: tokens [T, K] and log-probabilities [T, X]."""
        tiles: list[tuple[Tensor, Tensor]] = []

        def score(logits_TV: Tensor, _: slice) -> Tensor:
            tiles.append(likely_tokens(logits_TV, self.config.kl_tokens))
            return logits_TV.new_zeros(len(logits_TV))

        self.scores(batch, score)
        tokens, log_probs = (torch.cat(values) for values in zip(*tiles, strict=True))
        return tokens, log_probs
