"""CapabilityGate: measures held-out capability losses during training, and acts on their rise."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from ogpsa_trl.config import GateConfig
from ogpsa_trl.data.groups import Part, named_groups
from ogpsa_trl.data.preparation import prepare_group
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.engines.choose import make_backend
from ogpsa_trl.engines.supported import check_same_on_all, check_supported
from ogpsa_trl.method.capability_gradients import deterministic
from ogpsa_trl.method.starting_point import content
from ogpsa_trl.training.callbacks import record_settings
from ogpsa_trl.training.measurement import Measurement
from ogpsa_trl.training.mixin import OGPSAMixin
from ogpsa_trl.training.setup import (
    check_gate_saving,
    check_text_model,
    warn_of_protected_samples,
)

logger = logging.getLogger(__name__)

SAMPLES_NAME = "gate_samples.json"


class CapabilityGate(TrainerCallback):
    """
    Watches the loss on held-out capability data, and acts when it has risen too far.

    It measures before the first step, every `gate_interval` optimizer steps, before a checkpoint is
    saved, and after the last step. It serves a trainer of this package with or without a
    `capability_dataset`, so plain TRL can be gated too, and leaves no trace in training. A resumed
    run counts from the losses before the first step of all, which `trainer_state.json` holds.

    Logged are, in nats per token, `ogpsa/gate_loss/<group>`, `ogpsa/gate_increase/<group>` (since
    before training) and `ogpsa/gate_largest_increase`; before the first step also
    `ogpsa/gate_tokens/<group>`, the number of tokens that a loss is the mean over.

    Args:
        trainer ([`OGPSAMixin`]): The trainer to watch.
        gate_dataset (`Dataset`, `IterableDataset` or `dict` of them by group name): Held-out
            samples of capabilities, in any format that `capability_dataset` may have.
        config ([`GateConfig`], *optional*): Tolerance, action and cadence. `None`: its defaults,
            which measure and log only.

    Attributes:
        last (`Measurement`): The last measurement. `None` before `train`.

    Raises:
        ValueError: a trainer of another kind, data that is empty or in no known format, an engine
            that is not supported, or arguments that do not go with `gate_action: best`. While
            training: a checkpoint that does not hold the losses before training on this data.

    Example:

    ```python
    gate = CapabilityGate(
        trainer,
        {"facts": held_out_facts},
        GateConfig(max_capability_loss_increase=0.1, gate_action="stop"),
    )
    trainer.add_callback(gate)
    trainer.train()
    assert not gate.is_exceeded
    ```
    """

    def __init__(
        self,
        trainer: OGPSAMixin,
        gate_dataset: "Dataset | IterableDataset | Mapping[str, Any]",
        config: GateConfig | None = None,
    ) -> None:
        if not isinstance(trainer, OGPSAMixin):
            raise ValueError(
                "The capability gate needs an `OGPSASFTTrainer` or an `OGPSADPOTrainer`, but got "
                f"a {type(trainer).__name__}. Without `capability_dataset` they train as TRL's do."
            )
        self.trainer = trainer
        self.config = config or GateConfig()
        check_gate_saving(self.config, trainer.args)
        check_text_model(trainer)
        check_supported(trainer.accelerator, None, "none")
        is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        if self.config.gate_action == "best" and is_sharded and trainer.args.save_only_model:
            raise ValueError(
                "Under DeepSpeed and FSDP `gate_action` 'best' loads whole checkpoints, but "
                "`save_only_model` is true. Set it to false, or `gate_action: stop`."
            )
        datasets = named_groups(gate_dataset, "gate_dataset")
        check_same_on_all({"names of gate groups": list(datasets)})
        preparation = trainer.capability_preparation()
        self.parts: dict[str, Part] = {
            name: prepare_group(
                f"gate/{name}",
                dataset,
                preparation,
                num_samples=self.config.gate_num_samples,
                num_parts=1,
                batch_size=self.config.gate_batch_size,
                seed=trainer.args.seed,
                where=f"gate group {name!r}",
            ).whole()
            for name, dataset in datasets.items()
        }
        check_same_on_all(
            {f"gate group {name!r}": content(part.samples) for name, part in self.parts.items()}
        )
        warn_of_protected_samples(self.parts, trainer.capability_groups)
        trainer.checkpoint_texts[SAMPLES_NAME] = self._samples_text
        # Set when training begins: the engine wraps the model only then.
        self.backend: GradientBackend | None = None
        # Losses before training, in nats, by group, and of which model. None: not measured yet.
        self.start: dict[str, float] | None = None
        self._model: Any = None
        self.last: Measurement | None = None

    @property
    def is_exceeded(self) -> bool:
        """Whether the last measurement is past the tolerance; a loss that is no number is."""
        tolerance = self.config.max_capability_loss_increase
        if tolerance is None or self.last is None:
            return False
        return not self.last.largest_increase <= tolerance

    def report(self, folder: str) -> str:
        """Say in one screen why the gate is not passed. The model is in `folder`."""
        assert self.last is not None
        return self.last.report(
            self.config.max_capability_loss_increase, self.trainer.state.max_steps, folder
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        record_settings(self, trainer, "gate_config", asdict(self.config))
        self.backend = make_backend(
            trainer.accelerator, trainer.model, trainer.model_wrapped, trainer.optimizer
        )
        self.last = None
        if trainer.model is not self._model:  # the same goes on where training starts again
            self.start, self._model = None, trainer.model
        if state.global_step > 0:
            self._load_samples()
            self.start = self._start_in(state.log_history)
        else:
            self._measure(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the trainer logs and saves what belongs to this step."""
        is_due = state.global_step % self.config.gate_interval == 0
        if is_due or control.should_save or control.should_training_stop:
            self._check(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self._check(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is measured last are the weights that are left."""
        if self.last is None or self.last.step != state.global_step:
            self._measure(state, control)
        if self.config.gate_action == "best" and self.is_exceeded:
            self._load_best(state, control)

    def _check(self, state: TrainerState, control: TrainerControl) -> None:
        """Measure, if that is not done yet, and act on it."""
        if self.last is None or self.last.step != state.global_step:
            self._measure(state, control)
        assert self.last is not None
        if self.is_exceeded:
            control.should_training_stop |= self.config.gate_action == "stop"
        elif self.config.gate_action == "best" and control.should_save:
            # The trainer saves next: it takes the checkpoint of this step for its best one, keeps
            # it when it deletes old ones, and writes both into `trainer_state.json`.
            state.best_global_step = state.global_step
            state.best_metric = self.last.largest_increase

    def _load_best(self, state: TrainerState, control: TrainerControl) -> None:
        """The latest checkpoint within the tolerance, loaded as the trainer itself would do it."""
        assert self.backend is not None
        if not self.backend.is_on_all(state.best_model_checkpoint is not None):
            if state.is_world_process_zero:
                logger.warning(
                    "Capability gate: no checkpoint within the tolerance is there to be loaded, so "
                    "the weights stay those of step %d.",
                    state.global_step,
                )
            return
        if state.is_world_process_zero:
            logger.warning(
                "Capability gate: the weights are set back to those of step %d, the latest "
                "checkpoint within the tolerance (%s).",
                state.best_global_step, state.best_model_checkpoint,
            )  # fmt: skip
        self.trainer._load_best_model()
        self._measure(state, control)  # of what is there now: the trainer only warns if it failed

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        """Measure and log. A collective call: every process makes it."""
        losses = self._losses()
        self.start = losses if self.start is None else self.start
        self.last = Measurement(state.global_step, self.start, losses)
        logs = {f"ogpsa/gate_loss/{name}": loss for name, loss in losses.items()}
        increases = self.last.increases
        logs |= {f"ogpsa/gate_increase/{name}": increase for name, increase in increases.items()}
        logs["ogpsa/gate_largest_increase"] = self.last.largest_increase
        if state.global_step == 0:
            logs |= self._num_tokens()
        # TRL's own `log` would add the means of its training metrics and begin new ones; and any
        # log takes back the wish for the log of this step.
        should_log = control.should_log
        Trainer.log(self.trainer, logs)
        control.should_log = should_log
        if self.is_exceeded and state.is_world_process_zero:
            logger.warning(
                "Step %d: the held-out loss of gate group %r is %.4f nats per token above its "
                "value before training, more than `max_capability_loss_increase` (%s).",
                state.global_step, self.last.worst, self.last.largest_increase,
                self.config.max_capability_loss_increase,
            )  # fmt: skip

    @torch.no_grad()
    def _losses(self) -> dict[str, float]:
        """Token-mean losses at the current weights, on every process the same: one all-reduce."""
        backend = self.backend
        assert backend is not None
        sums = torch.zeros(len(self.parts), dtype=torch.float64, device=backend.device)
        with backend.preserved(), deterministic(backend.wrapped_model), backend.other_passes():
            for index, part in enumerate(self.parts.values()):
                for batch in part.batches_of(backend.process_index, backend.num_processes):
                    sums[index] -= self.trainer.capability_log_probs(batch).sum()
        totals = backend.sum_over_processes(sums).tolist()
        return {
            name: total / part.num_tokens
            for (name, part), total in zip(self.parts.items(), totals, strict=True)
        }

    def _num_tokens(self) -> dict[str, float]:
        return {f"ogpsa/gate_tokens/{name}": part.num_tokens for name, part in self.parts.items()}

    def _start_in(self, log_history: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """
        The losses before training, from the log that a checkpoint holds.

        Raises:
            ValueError: it has none, or of other data.
        """
        tokens = self._num_tokens()
        for entry in log_history:
            if entry["step"] == 0 and tokens.items() <= entry.items():
                return {
                    name: entry[f"ogpsa/gate_loss/{name}"] - entry[f"ogpsa/gate_increase/{name}"]
                    for name in self.parts
                }
        raise ValueError(
            "The capability gate counts from the losses before training, but this checkpoint does "
            f"not hold them for these groups (tokens in the loss: {tokens}). Resume with the gate "
            "data and settings that the run began with, begin anew, or train on without the gate "
            "(leave out `gate_datasets`)."
        )

    def _samples_text(self) -> str:
        """The tokens, for a checkpoint."""
        return json.dumps({n: [s.features for s in part.samples] for n, part in self.parts.items()})

    def _load_samples(self) -> None:
        """
        Go on with the tokens of the checkpoint, where it has as many samples of the same groups: a
        chat template may write the date, and the losses before training are of other tokens then.
        """
        path = Path(self.trainer.resumed_from or "") / SAMPLES_NAME
        if self.backend is None or not self.backend.is_on_all(path.is_file()):
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        ours = {name: len(part.samples) for name, part in self.parts.items()}
        if {name: len(samples) for name, samples in saved.items()} != ours:
            return
        for name, part in self.parts.items():
            samples = [
                part.sample(f"gate/{name}/{index}", features)
                for index, features in enumerate(saved[name])
            ]
            num = sum(a.features != b.features for a, b in zip(part.samples, samples, strict=True))
            if num:
                logger.warning(
                    "Gate group %r: %d of its samples have other tokens now than in %s, by other "
                    "data or a chat template that writes the date. The gate goes on with those of "
                    "the checkpoint.", name, num, self.trainer.resumed_from,
                )  # fmt: skip
            self.parts[name] = replace(part, samples=samples)
