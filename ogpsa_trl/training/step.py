"""
What OGPSA does in training, in the order in which it happens:

    begin                  once the engine has wrapped the model
    refresh                before a step that is due: capability gradients, then a basis of them
    around_optimizer       in every step: is the gradient finite? project, step, correct
    save                   with the optimizer's state
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.callbacks import RichProgressCallback

from ogpsa_trl.data.groups import Batch
from ogpsa_trl.engines.choose import make_backend
from ogpsa_trl.method.capability_gradients import capability_gradients, has_finite_gradients
from ogpsa_trl.method.draws import Draws
from ogpsa_trl.method.projection import copy_weights, measure_update, project, project_update
from ogpsa_trl.method.saved_start import load_start, save_start
from ogpsa_trl.method.saved_state import load_subspace, save_subspace
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.training.budget import planned_draws
from ogpsa_trl.training.callbacks import SubspaceCallback

logger = logging.getLogger(__name__)

# A refresh that takes longer than this shows a progress bar.
_SECONDS_WITHOUT_BAR = 5

# Training gradients that are not finite are left out; more of them than this end the run.
_MOST_LOST_IN_A_ROW = 10


class ConstrainedStep:
    """
    The method around a trainer's optimizer step.

    Args:
        trainer: An `OGPSAMixin`, which imports this module. `begin` makes its `subspace`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.config = trainer.ogpsa_config
        # Steps, up to now, whose training gradient was not finite.
        self.num_lost_in_a_row = 0
        # All samples, and which of them a refresh sees: known when training begins.
        self._groups = list(trainer.capability_groups)
        self.draws = Draws(trainer.args.seed)
        # Where this run has written its starting point.
        self._start_file: Path | None = None

    def begin(self, max_steps: int, checkpoint: str | None) -> None:
        """
        Make the backend and a subspace without a basis, or go on with those of a checkpoint.

        Args:
            max_steps: Optimizer steps of the whole run.
            checkpoint: Folder of the checkpoint. `None`: from the beginning.
        """
        trainer, loss = self.trainer, self.trainer.capability_loss
        backend = make_backend(
            trainer.accelerator, trainer.model, trainer.model_wrapped, trainer.optimizer
        )
        trainer.backend = backend
        trainer.subspace = CapabilitySubspace(backend, self.config)
        self.draws = planned_draws(trainer, self._groups, backend)
        loss.begin(trainer.model)
        self._start_file = None
        trainer.diagnostics.begin()
        if checkpoint is not None:
            load_subspace(trainer.subspace, checkpoint)
            loss.start = load_start(backend, self._groups, self.config, checkpoint) or loss.start
        # No more samples than the run draws, so that no more are measured at the start; with a
        # starting point those that it is of, and their tokens.
        interval = min(
            (c.refresh_interval for c in trainer.callback_handler.callbacks
             if isinstance(c, SubspaceCallback)),
            default=1,
        )  # fmt: skip
        # One more: a divergence has no gradient at the start, so the second step refreshes again.
        used, start = self.draws.used(self._groups, math.ceil(max_steps / interval) + 1), loss.start
        known = used if start is None else start.groups_of(self._groups)
        for group, wanted in zip(known, used, strict=True):
            if len(group.samples) < len(wanted.samples):
                logger.info(
                    "Capability group %r: refreshes draw from the %d samples whose starting point "
                    "is known; a new run of as many steps would use %d.",
                    group.name, len(group.samples), len(wanted.samples),
                )  # fmt: skip
        trainer.capability_groups[:] = known

    def refresh(self) -> None:
        """Estimate the subspace anew at the current weights. See `refresh_subspace`."""
        started = time.perf_counter()
        trainer, subspace, loss = self.trainer, self.trainer.subspace, self.trainer.capability_loss
        backend, step = subspace.backend, trainer.state.global_step
        names = trainer.diagnostics.names
        # Where nothing is known of a direction yet, or of so many gradients (the checkpoint has
        # another `gradients_per_group`), all groups have their turn, as in the first.
        is_known = not subspace.is_due and len(subspace.weights) == len(names)
        number = int(subspace.history.num_refreshes) if is_known else 0
        parts = self.draws.parts(trainer.capability_groups, number)
        active = [part for part in parts if part is not None]
        progress = self._progress(sum(p.num_batches_of(backend.num_processes) for p in active))

        def sum_loss(batch: Batch) -> Tensor:
            progress.update()
            return loss.sum(batch)

        with progress, trainer.capability_pass_context(), loss.passes(backend):
            loss.prepare(backend, sees_all=self.draws.num_samples is None)
            old_rows, old_share = subspace.release_gradients(len(parts))
            gradients = capability_gradients(
                backend,
                parts,
                sum_loss,
                old_rows,
                names=names,
                old_share=old_share,
                dtype=subspace.dtype,
                rounding=loss.rounding,
            )
        refresh = subspace.refresh(gradients, loss.rises(parts, gradients.losses))
        seconds = time.perf_counter() - started
        trainer.diagnostics.record_refresh(subspace, gradients, refresh, seconds=seconds, step=step)
        floors = loss.floors(parts)
        if floors:
            trainer.diagnostics.record_groups(subspace, "divergence_floor", floors)

    @contextlib.contextmanager
    def around_optimizer(self) -> Iterator[None]:
        """Around clipping and the optimizer's step."""
        subspace, target = self.trainer.subspace, self.config.target
        if target == "gradient":
            self.project_gradient()
        elif target == "none" or not subspace.backend.has_length_before_step:
            self.count_gradient(is_finite=has_finite_gradients(subspace.backend))
        length = subspace.replay()
        if length is not None:
            self.trainer.diagnostics.record(replay_length=length)
        if target == "update":
            weights_before = copy_weights(subspace)
            yield
            self.project_update(weights_before)
        elif self._is_logging_next() and subspace.backend.holds_weights:
            weights_before = copy_weights(subspace)
            yield
            self._measure_update(weights_before)
        else:
            yield

    def project_gradient(self) -> None:
        """`target: gradient`."""
        projection = project(self.trainer.subspace)
        self.count_gradient(is_finite=projection is not None)
        if projection is not None:
            self.trainer.diagnostics.record(
                cosine=projection.cosine, gradient_in_subspace=projection.share_inside
            )
            self.trainer.diagnostics.record_removal(projection, step=self.trainer.state.global_step)

    def project_update(self, weights_before: list[Tensor]) -> None:
        """`target: update`."""
        trainer, diagnostics = self.trainer, self.trainer.diagnostics
        projection = project_update(trainer.subspace, weights_before)
        diagnostics.record(proposal_in_subspace=projection.share_inside)
        if projection.changes is not None and self._is_logging_next():
            changes = projection.changes.tolist()
            diagnostics.record_groups(trainer.subspace, "step_change", changes)
        diagnostics.record_removal(projection, step=trainer.state.global_step)

    def _measure_update(self, weights_before: list[Tensor]) -> None:
        """What a step does that is not corrected."""
        trainer, diagnostics = self.trainer, self.trainer.diagnostics
        share, changes = measure_update(trainer.subspace, weights_before)
        diagnostics.record(update_in_subspace=share)
        diagnostics.record_groups(trainer.subspace, "step_change", changes.tolist())

    def look_at_length(self, length: float) -> None:
        """The trainer has read the whole gradient, to clip it."""
        if self.config.target == "update" and self.trainer.subspace.backend.has_length_before_step:
            self.count_gradient(is_finite=math.isfinite(length))

    def count_gradient(self, *, is_finite: bool) -> None:
        """
        Take a step whose gradient is not finite with one of zero: moments and weight decay still
        move the weights, and nothing that is not a number reaches them.

        Raises:
            FloatingPointError: it was so in too many steps in a row.
        """
        if is_finite:
            self.num_lost_in_a_row = 0
            return
        self.num_lost_in_a_row += 1
        step = self.trainer.state.global_step
        if self.num_lost_in_a_row > _MOST_LOST_IN_A_ROW:
            raise FloatingPointError(
                f"Step {step}: the training gradient has not been finite in "
                f"{self.num_lost_in_a_row} steps in a row. The weights are still those before. "
                "Lower `learning_rate`, or look for samples that the model gives no probability."
            )
        logger.warning(
            "Step %d: the training gradient is not finite and counts as zero in this step.", step
        )
        self.trainer.diagnostics.record(lost_gradients=1.0)
        backend = self.trainer.subspace.backend
        for _, parameter in backend.parameters:
            gradient_N = backend.gradient(parameter)
            if gradient_N is not None:
                gradient_N.zero_()

    def save(self, folder: str) -> None:
        """Write what a resumed run needs: the starting point and this process's part of a basis."""
        start, should_save = self.trainer.capability_loss.start, self.trainer.args.should_save
        if start is not None and should_save:
            self._start_file = save_start(start, self.config, folder, self._start_file)
        if self.trainer.subspace.backend.is_sharded or should_save:
            save_subspace(self.trainer.subspace, folder)

    def _is_logging_next(self) -> bool:
        """Whether the step under way is one after which the trainer logs."""
        args, state = self.trainer.args, self.trainer.state
        return (
            args.logging_strategy == IntervalStrategy.STEPS
            and (state.global_step + 1) % state.logging_steps == 0
        )

    def _progress(self, total: int) -> Any:
        """The bar of a refresh; above the panel of rich it would put a line at each update."""
        callbacks = self.trainer.callback_handler.callbacks
        return tqdm(
            total=total,
            desc="Refreshing the capability subspace",
            delay=_SECONDS_WITHOUT_BAR,
            disable=self.trainer.args.disable_tqdm
            or not self.trainer.is_world_process_zero()
            or any(isinstance(callback, RichProgressCallback) for callback in callbacks),
            leave=False,
        )
