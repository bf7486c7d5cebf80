"""Diagnostics: what refreshes and projections report, as metrics `ogpsa/<noun>` and warnings."""

import logging
import math
import time
from collections.abc import Sequence

from torch import Tensor

from ogpsa_trl.method.capability_gradients import CapabilityGradients, group_means
from ogpsa_trl.method.loss_history import Refresh
from ogpsa_trl.method.projection import Projection
from ogpsa_trl.method.subspace import CapabilitySubspace

logger = logging.getLogger(__name__)

# A change of a capability loss that differs from its prediction by more than this share of the loss
# (of one nat per token with `kl`, which starts at zero) is worth a warning.
_LARGEST_SURPRISE = 0.1


class Diagnostics:
    """
    Collects values between two logs; their means are logged.

    Args:
        names: Name of the capability group of every part.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        # Sum and number of the values of every metric. A sum stays on its device.
        self.sums: dict[str, tuple[float | Tensor, int]] = {}
        # When the values begin, and how much of the time since then went into refreshes.
        self.start = time.perf_counter()
        self.refresh_seconds = 0.0

    def begin(self) -> None:
        """Forget what was recorded: values and time count from now on."""
        self.sums.clear()
        self.start = time.perf_counter()
        self.refresh_seconds = 0.0

    def record(self, **metrics: float | Tensor) -> None:
        """Add values up where they are: a tensor is read from its device when it is logged."""
        for name, value in metrics.items():
            total, count = self.sums.get(f"ogpsa/{name}", (0.0, 0))
            self.sums[f"ogpsa/{name}"] = total + value, count + 1

    def record_groups(
        self, subspace: CapabilitySubspace, name: str, values: Sequence[float]
    ) -> dict[str, float]:
        """Record values of every part as means over the groups; those that are finite."""
        means = group_means(self.names, subspace.weights.tolist(), values)
        means = {group: value for group, value in means.items() if math.isfinite(value)}
        self.record(**{f"{name}/{group}": value for group, value in means.items()})
        return means

    def record_refresh(
        self,
        subspace: CapabilitySubspace,
        gradients: CapabilityGradients,
        refresh: Refresh,
        *,
        seconds: float,
        step: int,
    ) -> None:
        """Say what a refresh found, and whether it found what the updates should have done."""
        self.record(
            rank=subspace.rank,
            refresh_seconds=seconds,
            basis_megabytes=subspace.basis_bytes / 1e6,
        )
        self.refresh_seconds += seconds
        kept = {name for name, kept in zip(self.names, gradients.is_kept, strict=True) if kept}
        for name in sorted(kept):
            logger.warning(
                "Step %d: the gradient of capability group %r is not finite (losses %s). The group "
                "keeps its last one.", step, name, gradients.losses,
            )  # fmt: skip
        if kept:
            self.record(kept_gradients=float(sum(gradients.is_kept)))
        losses = self.record_groups(subspace, "capability_loss", gradients.losses)
        self.record_groups(subspace, "drift", refresh.drift)
        if refresh.realised_change is None:
            return
        realised = self.record_groups(subspace, "realised_change", refresh.realised_change)
        if refresh.predicted_change is None:
            return
        predicted = self.record_groups(subspace, "predicted_change", refresh.predicted_change)
        is_kl = subspace.config.capability_loss == "kl"
        for name, loss in losses.items():
            if name in kept:
                continue
            surprise = abs(realised[name] - predicted[name])
            if surprise > _LARGEST_SURPRISE * (1.0 if is_kl else loss):
                logger.warning(
                    "Step %d: since the last refresh the loss of capability group %r has changed "
                    "by %.3g, but the first-order model predicts %.3g. Lower `refresh_interval` or "
                    "`learning_rate`.",
                    step, name, realised[name], predicted[name],
                )  # fmt: skip

    def record_removal(self, projection: Projection, *, step: int) -> None:
        """Say what a projection took away."""
        self.record(removed_fraction=projection.removed_fraction)
        if projection.restoration is not None:
            self.record(
                restoration_ratio=projection.restoration.ratio,
                restoration_capped=projection.restoration.is_capped,
            )
        if projection.held:
            self.record(held_parameters=float(len(projection.held)))
            logger.info(
                "Step %d: %d parameters have no known capability direction yet and are not moved "
                "in this step; the subspace is refreshed before the next. First: %s",
                step, len(projection.held), projection.held[0],
            )  # fmt: skip

    def take_means(self) -> dict[str, float]:
        """The means of what was recorded since the last call; nothing if there was no step."""
        if not self.sums:
            return {}
        means = {name: float(total) / count for name, (total, count) in self.sums.items()}
        means["ogpsa/refresh_share"] = self.refresh_seconds / (time.perf_counter() - self.start)
        self.begin()
        return means
