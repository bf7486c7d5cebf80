"""What a capability gate has measured at one time, and how it says so."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """
    What the gate has measured at one time.

    Attributes:
        step: Optimizer steps made before it.
        start: Token-mean losses before training, in nats, by group.
        losses: Token-mean losses now.
    """

    step: int
    start: Mapping[str, float]
    losses: Mapping[str, float]

    @property
    def increases(self) -> dict[str, float]:
        """How far the losses are above those before training, in nats per token, by group."""
        return {name: loss - self.start[name] for name, loss in self.losses.items()}

    @property
    def worst(self) -> str:
        """The group with the largest increase; one whose loss is not a number is worse than all."""
        increases = self.increases
        return max(increases, key=lambda n: math.inf if math.isnan(increases[n]) else increases[n])

    @property
    def largest_increase(self) -> float:
        """Increase of the worst group."""
        return self.increases[self.worst]

    def report(self, tolerance: float | None, max_steps: int, folder: str) -> str:
        """
        Say in one screen why the gate is not passed.

        Args:
            tolerance: The largest increase that it accepts.
            max_steps: Steps of the whole run.
            folder: Where the model is.
        """
        width = max(map(len, ["group", *self.losses]))
        rows = [
            f"  {name:{width}}  {self.start[name]:8.4f}  {loss:8.4f}  {self.increases[name]:+8.4f}"
            for name, loss in self.losses.items()
        ]
        return "\n".join([
            f"error: The capability gate is not passed: the held-out loss of group {self.worst!r} "
            f"has risen by {self.largest_increase:.4f} nats per token, more than "
            f"`max_capability_loss_increase` ({tolerance}).",
            "",
            f"  {'group':{width}}    before     after  increase",
            *rows,
            "",
            f"Training made {self.step} of {max_steps} steps. The model is in {folder}, but should "
            "not be used as it is.",
            f"Add data like that of {self.worst!r} to `capability_datasets`, lower "
            "`learning_rate`, or train fewer steps; with `gate_action: best` a run ends with its "
            "latest checkpoint within the tolerance. If the rise is acceptable, raise "
            "`max_capability_loss_increase`.",
        ])  # fmt: skip
