"""
CapabilityLoss: what is protected. `nll` of the capability text, or `kl` to the starting model.

Both are sums over trainable tokens, in nats, and both are counted from the starting point: `rises`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ogpsa_trl.backends import GradientBackend
from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data import Batch, CapabilityGroup, Part
from ogpsa_trl.divergence import divergence, likely_tokens
from ogpsa_trl.start import Measured, StartingPoint, all_samples, measure_start
from ogpsa_trl.tiled_head import Score

# A divergence per token, in nats, that is rounding: log-probabilities in float32 that differ by
# 1e-6 make 1e-12.
_KL_ROUNDING = 1e-10


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
        # What the starting model makes of the samples. None: not measured yet.
        self.start: StartingPoint | None = None

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
        """Around its passes. Scores come through a module that TRL's fused head does not call."""
        return backend.other_passes() if self.is_kl else nullcontext()

    def prepare(self, backend: GradientBackend) -> None:
        """
        Measure the starting point, if the first refresh needs it. A collective call.

        It does not where the refresh takes all samples anyway and their likelihood is enough.
        """
        if self.start is None and (self.is_kl or self.config.samples_per_refresh is not None):
            self.start = measure_start(backend, self.groups, self._measure)

    def rises(self, parts: Sequence[Part], losses: Sequence[float]) -> list[float]:
        """How far the token-mean losses of parts are above those at the start, on their samples."""
        if self.start is None:
            self.start = StartingPoint.from_losses(all_samples(self.groups), parts, losses)
        first = map(self.start.mean_loss, parts)
        return [loss - start for loss, start in zip(losses, first, strict=True)]

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
