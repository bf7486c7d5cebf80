"""LossHistory: how the capability losses change, and what of that restoration takes back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpsa_trl.config import OGPSAConfig


@dataclass
class Refresh:
    """
    How the loss of each capability gradient has changed, in nats, one entry for each.

    Attributes:
        drift: Since the first refresh of the run.
        predicted_change: What the updates since the last refresh should have done, to first order.
            `None` at the first, and where the update is not projected, and so not known.
        realised_change: Since the last refresh. `None` at the first.
    """

    drift: list[float]
    predicted_change: list[float] | None
    realised_change: list[float] | None


class LossHistory:
    """
    The losses of R capability gradients from refresh to refresh.

    Args:
        config: The settings.
        device: Where the tensors that a step needs are.
    """

    def __init__(self, config: OGPSAConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        # Shape [R]: how far each loss was above the start of training at the last refresh; the
        # average of that over the refreshes, as the gradients are averaged; and what the updates
        # since then should have changed it by.
        self.rises = self.drift = self.predicted_change = torch.zeros(0)
        # Steps since the last refresh, and how many there were between the last two: as many are
        # expected until the next.
        self.num_steps = torch.tensor(0)
        self.interval = torch.tensor(config.refresh_interval)

    def refresh(self, rises: Sequence[float], is_kept: Sequence[bool]) -> Refresh:
        """
        Compare the losses with those at the start of training and at the last refresh.

        Args:
            rises: How far each loss is above its value at the start of training, in nats.
            is_kept: Of which gradients the old one is kept, so that the new loss does not count.
        """
        is_first = len(self.rises) != len(rises)
        old_R = torch.zeros(len(rises)) if is_first else self.rises.cpu()
        rises_R = torch.where(torch.tensor(is_kept), old_R, torch.tensor(rises)).double()
        predicted = realised = None
        if not is_first:
            realised = (rises_R - self.rises.cpu().double()).tolist()
            if self.config.target == "update":
                predicted = self.predicted_change.tolist()
        self.rises = rises_R.float().to(self.device)
        old_drift = self.rises if is_first else self.drift
        share = self.config.capability_ema
        self.drift = share * old_drift + (1 - share) * self.rises
        self.predicted_change = torch.zeros_like(self.rises)
        if self.num_steps > 0:
            self.interval = self.num_steps
            self.num_steps = torch.zeros_like(self.interval)
        return Refresh(rises_R.tolist(), predicted, realised)

    def count_step(self, changes_R: Tensor) -> None:
        """
        A projected update has been made.

        Args:
            changes_R: What it should change each loss by, in nats.
        """
        self.num_steps = self.num_steps + 1
        self.predicted_change = self.predicted_change + changes_R

    def share_of_step(self) -> float:
        """
        The share of a rise that the next step takes back: equal ones in as many steps as there were
        between the last two refreshes, and nothing where there are more.
        """
        return 1 / int(self.interval) if self.num_steps < self.interval else 0.0

    def to_restore(self) -> Tensor:
        """By how much the next step should lower each loss, in nats, shape [R], on the CPU."""
        return self.config.restoration * self.share_of_step() * self.drift.clamp_min(0).cpu()
