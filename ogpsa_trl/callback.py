"""SubspaceCallback: decides when the capability subspace is estimated anew."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.subspace import CapabilitySubspace


class SubspaceTrainer(Protocol):
    """What the callback needs of a trainer: any with [`OGPSAMixin`] in front."""

    ogpsa_config: OGPSAConfig
    subspace: CapabilitySubspace

    def refresh_subspace(self) -> None: ...


class SubspaceCallback(TrainerCallback):
    """
    Refreshes the subspace before the first step and every `refresh_interval` optimizer steps.

    It also refreshes when the subspace asks for it: after resuming from a checkpoint without a
    basis, and after a step in which a parameter was held (see `CapabilitySubspace`). A refresh is
    made only between optimizer steps, where no gradient is under way.

    The trainers add one by themselves. For a schedule of your own, override `is_due` and put yours
    in its place:

    ```python
    trainer.remove_callback(SubspaceCallback)
    trainer.add_callback(WarmupSubspaceCallback(trainer))
    ```

    Args:
        trainer: The trainer whose subspace is refreshed.
        refresh_interval: Optimizer steps between two refreshes, at least 1. `None` takes it from
            the trainer's `OGPSAConfig`.
    """

    def __init__(self, trainer: SubspaceTrainer, refresh_interval: int | None = None) -> None:
        self.trainer = trainer
        self.refresh_interval = refresh_interval or trainer.ogpsa_config.refresh_interval

    def is_due(self, step: int) -> bool:
        """Whether to refresh before optimizer step number `step` (the first is 0)."""
        return step % self.refresh_interval == 0

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature of the event
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        if self.trainer.subspace.is_due or self.is_due(state.global_step):
            self.trainer.refresh_subspace()
