"""LossHistory: how the capability losses change, and what of that restoration takes back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.method.capability_gradients import CapabilityGradients


@dataclass
class Refresh:
    """
    How the loss of each capability gradient has changed, in nats, one entry for each; NaN where it
    was not its turn.

    Attributes:
        drift: Since the first refresh of the run.
        predicted_change: What the updates since its last turn should have done, to first order.
            `None` at the first refresh, and where the update is not projected, and so not known.
        realised_change: Since its last turn. `None` at the first refresh.
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
        self.num_refreshes = torch.tensor(0)
        # Shape [R]: whether the gradient was not finite at its last turn; and what the updates
        # between that turn and the last refresh should have changed the loss by.
        self.was_lost = torch.zeros(0, dtype=torch.bool)
        self.unseen_change = torch.zeros(0)

    def refresh(self, rises: Sequence[float], gradients: CapabilityGradients) -> Refresh:
        """
        Compare the losses with those at the start of training and at the last refresh.

        Args:
            rises: How far each loss is above its value at the start of training, in nats.
            gradients: Of which the old one is kept the new loss does not count. Of which it was not
                the turn the loss was not measured: what the updates should have done to it, to
                first order, counts.
        """
        is_first = len(self.rises) != len(rises)
        self.num_refreshes = self.num_refreshes + 1
        self.was_lost = torch.tensor(gradients.lost(self.was_lost.tolist()))
        is_resting_R = torch.tensor(gradients.is_resting)
        old_R = torch.zeros(len(rises)) if is_first else self.rises.cpu()
        is_old_R = torch.tensor(gradients.is_kept) | is_resting_R
        rises_R = torch.where(is_old_R, old_R, torch.tensor(rises)).double()
        predicted = realised = None

        def of_turns(values_R: Tensor) -> list[float]:
            return torch.where(is_resting_R, math.nan, values_R.cpu().double()).tolist()

        if not is_first:
            realised = of_turns(rises_R - self.rises.cpu().double())
            change_R = self.unseen_change + self.predicted_change.cpu()
            self.unseen_change = torch.where(is_resting_R, change_R, 0.0)
            if self.config.target == "update":
                predicted = of_turns(change_R)
        else:
            self.unseen_change = torch.zeros(len(rises))
        self.rises = rises_R.float().to(self.device)
        old_drift = self.rises if is_first else self.drift
        share = self.config.capability_ema
        drift_R = share * old_drift + (1 - share) * self.rises
        if not is_first and is_resting_R.any():
            expected_R = self.drift + self.predicted_change
            drift_R = torch.where(is_resting_R.to(self.device), expected_R, drift_R)
        self.drift = drift_R
        self.predicted_change = torch.zeros_like(self.rises)
        if self.num_steps > 0:
            self.interval = self.num_steps
            self.num_steps = torch.zeros_like(self.interval)
        return Refresh(of_turns(rises_R), predicted, realised)

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
