"""
What a trainer calls by itself: the refresh of the subspace, and the settings in trackers.

The metrics need nothing: they arrive in trackers with those of the trainer. But the configuration
of a run, as transformers writes it down, is the training arguments and the configuration of the
model, no more.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.groups import CapabilityGroup
from ogpsa_trl.method.subspace import CapabilitySubspace

logger = logging.getLogger(__name__)

_TRACKERS = (TensorBoardCallback, WandbCallback, TrackioCallback)


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

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.subspace.is_due or self.is_due(state.global_step):
            self.trainer.refresh_subspace()


class SettingsCallback(TrainerCallback):
    """
    Writes the settings of OGPSA, and the samples and tokens of each capability group, into the
    configuration of the run in trackers, and into `trainer_state.json`, as that of a callback. The
    trainers add one by themselves.

    Args:
        trainer: The trainer that it belongs to.
        config: Its settings.
        groups: Its capability groups.
    """

    def __init__(
        self, trainer: Trainer, config: OGPSAConfig, groups: Sequence[CapabilityGroup]
    ) -> None:
        self.trainer = trainer
        self.settings = asdict(config)
        for group in groups:
            self.settings[f"capability_samples/{group.name}"] = len(group.samples)
            self.settings[f"capability_tokens/{group.name}"] = group.num_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks["OGPSAConfig"] = {"args": self.settings, "attributes": {}}
        record_settings(self, self.trainer, "ogpsa_config", self.settings)


def record_settings(
    recorder: TrainerCallback, trainer: Trainer, title: str, settings: Mapping[str, Any]
) -> None:
    """
    Add settings, as `ogpsa/<name>`, to the configuration of the run in every tracker.

    To be called in `on_train_begin`. The trackers that come before the caller have been set up by
    then, and Trackio, which sends its configuration with the first metrics, has not sent it.

    Args:
        recorder: The callback that calls this.
        trainer: The trainer it belongs to.
        title: Names the settings in TensorBoard, which has no configuration but texts.
        settings: What JSON can hold, by name.
    """
    if not trainer.is_world_process_zero():
        return
    callbacks = trainer.callback_handler.callbacks
    place = callbacks.index(recorder)
    settings = {f"ogpsa/{name}": value for name, value in settings.items()}
    for callback in callbacks[:place]:
        match callback:
            case TensorBoardCallback():
                assert callback.tb_writer is not None
                text = f"```\n{json.dumps(settings, indent=1)}\n```"  # shown as Markdown
                callback.tb_writer.add_text(title, text)
            case WandbCallback():
                import wandb

                wandb.config.update(settings, allow_val_change=True)  # of a resumed run
            case TrackioCallback():
                import trackio

                trackio.config.update(settings)
    late = [type(c).__name__ for c in callbacks[place:] if isinstance(c, _TRACKERS)]
    if late:
        logger.warning(
            "The settings in %r are missing in the configuration of the run in %s, which is set up "
            "later. Name trackers in `report_to`, or give them to the trainer as `callbacks`.",
            title, ", ".join(late),
        )  # fmt: skip
