"""
CapabilityLoss: what is protected. `nll` of the capability text, or `kl` to the starting model.

Both are sums over trainable tokens, in nats, and both are counted from the starting point: `rises`.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ogpsa_trl.backends import GradientBackend
from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data import Batch, CapabilityGroup, Part
from ogpsa_trl.divergence import divergence, likely_tokens
from ogpsa_trl.start import Measured, StartingPoint, all_samples, measure_floor, measure_start
from ogpsa_trl.tiled_head import Score

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

    def begin(self, model: nn.Module) -> None:
        """
        Training of a model begins, or begins again in the middle (`auto_find_batch_size`): what was
        measured of it counts as long as it is the same.
        """
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
        tokens_TK, start_TX = self.start.likely_tokens(batch)

        def score(logits_TV: Tensor, positions: slice) -> Tensor:
            tile = (tokens_TK[positions], start_TX[positions])
            return divergence(logits_TV, *(values.to(logits_TV.device) for values in tile))

        return self.scores(batch, score).sum()

    def passes(self, backend: GradientBackend) -> AbstractContextManager[Any]:
        """
        Around its passes. Scores come through a module that TRL's fused head does not call.

        A divergence is a difference of nearly equal numbers: in bfloat16 its gradient after a first
        step is noise (measured: a cosine of .46 with that in float32, 30 times too long), that of
        `nll` is not (.9993).
        """
        if not self.is_kl:
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(backend.other_passes())
        stack.enter_context(backend.full_precision())
        return stack

    def prepare(self, backend: GradientBackend) -> None:
        """
        Measure the starting point, if the first refresh needs it. A collective call.

        It does not where the refresh takes all samples anyway and their likelihood is enough.
        """
        if self.start is None and (self.is_kl or self.config.samples_per_refresh is not None):
            self.start = measure_start(backend, self.groups, self._measure)
            if self.is_kl and backend.epsilon:
                self._measure_floors(backend, self.start)

    def _measure_floors(self, backend: GradientBackend, start: StartingPoint) -> None:
        for group in self.groups:
            (part,) = replace(group, num_parts=1).parts(_SAMPLES_OF_FLOOR, "floor")
            with torch.no_grad():
                floor = measure_floor(backend, part, self.sum, backend.epsilon)
            start.set_floor(group, floor)
            logger.info(
                "Capability group %r: below %.2g nats per token a divergence is not known from "
                "rounding, and nothing is restored.", group.name, floor,
            )  # fmt: skip

    def rises(self, parts: Sequence[Part], losses: Sequence[float]) -> list[float]:
        """How far the token-mean losses of parts are above those at the start, on their samples."""
        if self.start is None:
            self.start = StartingPoint.from_losses(all_samples(self.groups), parts, losses)
        first = map(self.start.mean_loss, parts)
        return [loss - start for loss, start in zip(losses, first, strict=True)]

    def floors(self, parts: Sequence[Part]) -> list[float]:
        """Divergences of parts, in nats per token, that rounding makes; none of other losses."""
        if not self.is_kl or self.start is None or not self.start.losses.any():
            return []
        return [self.start.mean_loss(part) for part in parts]

    def _measure(self, batch: Batch) -> list[Measured]:
        """What the starting point holds of every sample of a batch."""
        if not self.is_kl:
            losses = -self.log_probs(batch).sum(dim=1)
            return [{"losses": loss} for loss in losses[: len(batch.samples)]]
        tiles: list[tuple[Tensor, Tensor]] = []

        def score(logits_TV: Tensor, _: slice) -> Tensor:
            tiles.append(likely_tokens(logits_TV, self.config.kl_tokens))
            return logits_TV.new_zeros(len(logits_TV))

        self.scores(batch, score)
        start = [torch.cat(values) for values in zip(*tiles, strict=True)]
        counts = [sample.num_tokens for sample in batch.samples]
        return [
            {"losses": torch.zeros(()), "tokens": tokens, "log_probs": log_probs}
            for tokens, log_probs in zip(*(t.split(counts) for t in start), strict=True)
        ]
