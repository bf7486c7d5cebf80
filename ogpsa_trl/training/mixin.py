"""OGPSAMixin, for any `transformers.Trainer`."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    IntervalStrategy,
    rotate_checkpoints,
)
from transformers.training_args import OptimizerNames
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.callbacks import RichProgressCallback

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.files import replace_text
from ogpsa_trl.data.groups import Batch, CapabilityGroup, named_groups, trained_labels
from ogpsa_trl.data.preparation import (
    Preparation,
    context_of,
    prepare_group,
    warn_of_samples_in_training,
    warn_of_uneven_groups,
)
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.engines.choose import make_backend
from ogpsa_trl.engines.supported import check_same_on_all, check_supported
from ogpsa_trl.method.capability_gradients import capability_gradients, has_finite_gradients
from ogpsa_trl.method.capability_loss import CapabilityLoss
from ogpsa_trl.method.projection import copy_weights, measure_update, project, project_update
from ogpsa_trl.method.saved_state import load_start, load_subspace, save_start, save_subspace
from ogpsa_trl.method.starting_point import content
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.tensors.tiled_head import Score, TiledHead
from ogpsa_trl.training.callbacks import SettingsCallback, SubspaceCallback
from ogpsa_trl.training.diagnostics import Diagnostics
from ogpsa_trl.training.model_card import PAPER, settings_section
from ogpsa_trl.training.model_kind import check_no_encoder
from ogpsa_trl.training.whole_checkpoints import (
    checkpoint_to_resume,
    mark,
    saving,
    unmark,
    without_deletion,
)

logger = logging.getLogger(__name__)

# A refresh that takes longer than this shows a progress bar.
_SECONDS_WITHOUT_BAR = 5

# Training gradients that are not finite are left out; more of them than this end the run.
_MOST_LOST_IN_A_ROW = 10


class OGPSAMixin(Trainer):
    """
    Removes from a trainer's gradient its component in the capability subspace.

    It stands in front of the trainer, which may be any `transformers.Trainer` of a causal language
    model: `class OGPSASFTTrainer(OGPSAMixin, SFTTrainer)`. Without a `capability_dataset` every
    method is the parent's, so the run is the parent's, bit for bit.

    Where the trainer differs from others in how it makes tokens, or gives log-probabilities without
    logits, override `capability_preparation` or `capability_log_probs`: see [`OGPSASFTTrainer`].

    Args:
        capability_dataset (`Dataset`, `IterableDataset` or `dict` of them by group name,
            *optional*): Samples of the capabilities to protect, in any text format of `SFTTrainer`,
            or in a preference format, of which the chosen completions are used. Of a stream the
            first `num_samples` are taken. `None`: plain TRL.
        ogpsa_config ([`OGPSAConfig`], *optional*): Settings of the method. `None`: its defaults.

    Raises:
        ValueError: settings without data; data that is empty or in no known format; an engine,
            precision or optimizer that is not supported.
    """

    # Set by the parents; `Trainer` declares them as optional or by their base classes.
    args: Any
    model: Any
    train_dataset: Any
    model_wrapped: Any
    processing_class: Any

    def __init__(
        self,
        *args: Any,
        capability_dataset: "Dataset | IterableDataset | Mapping[str, Any] | None" = None,
        ogpsa_config: OGPSAConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.capability_groups: list[CapabilityGroup] = []
        self.tiled_head = TiledHead(lambda: self.model.get_output_embeddings())
        self.ogpsa_config = ogpsa_config or OGPSAConfig()
        # What else stands in every checkpoint: by the name of the file, what makes its text.
        self.checkpoint_texts: dict[str, Callable[[], str]] = {}
        # The checkpoint that the run goes on from.
        self.resumed_from: str | None = None
        # Made when training begins.
        self._backend: GradientBackend | None = None
        # Where this run has written its starting point.
        self._start_file: Path | None = None
        if capability_dataset is None:
            if ogpsa_config is not None:
                raise ValueError(
                    "`ogpsa_config` needs a `capability_dataset`, but there is none. Pass the "
                    "samples to protect, or leave `ogpsa_config` out to train without OGPSA."
                )
            super().__init__(*args, **kwargs)
            return

        if not isinstance(ogpsa_config, OGPSAConfig | None):
            raise ValueError(
                f"`ogpsa_config` must be an `OGPSAConfig`, but got {ogpsa_config!r}. Pass "
                "`OGPSAConfig(num_samples=200, ...)`."
            )
        datasets = named_groups(capability_dataset)
        if isinstance(self, _BaseTrainer):  # what TRL writes into the model card
            self._name, self._paper = f"OGPSA ({self._name})", PAPER
            self._tag_names = [*self._tag_names, "ogpsa"]
        super().__init__(*args, **kwargs)
        self.check_model()
        check_supported(
            self.accelerator, OptimizerNames(self.args.optim).value, self.ogpsa_config.target
        )
        if getattr(self.model, "is_quantized", False):  # other models do not have it
            self._keep_adapters_in_float32()
        if self.ogpsa_config.target == "none" and not self.ogpsa_config.replay_weight:
            logger.warning(
                "With `target: none` and `replay_weight: 0` OGPSA measures the run and changes "
                "nothing. Set `replay_weight: 1` for replay or a KL penalty."
            )
        settings = {"seed": self.args.seed, **asdict(self.ogpsa_config)}
        # Before the processes wait for each other to prepare them.
        check_same_on_all(
            {"names of capability groups": list(datasets)}
            | {f"`{name}`": value for name, value in settings.items()}
        )
        preparation = self.capability_preparation()
        self.capability_groups = [
            prepare_group(
                name,
                dataset,
                preparation,
                num_samples=self.ogpsa_config.num_samples,
                num_parts=self.ogpsa_config.gradients_per_group,
                batch_size=self.ogpsa_config.capability_batch_size,
                seed=self.args.seed,
            )
            for name, dataset in datasets.items()
        ]
        check_same_on_all(
            {f"capability group {g.name!r}": content(g.samples) for g in self.capability_groups}
        )
        warn_of_uneven_groups(self.capability_groups)
        warn_of_samples_in_training(self.capability_groups, self.train_dataset)
        self.capability_loss = CapabilityLoss(
            self.ogpsa_config,
            self.capability_groups,
            self.capability_log_probs,
            self.capability_scores,
        )
        self.diagnostics = Diagnostics(
            [group.name for group in self.capability_groups for _ in range(group.num_parts)]
        )
        # Steps, up to now, whose training gradient was not finite.
        self.num_lost_in_a_row = 0
        logger.info("OGPSA settings: %s", asdict(self.ogpsa_config))
        self.add_callback(SettingsCallback(self, self.ogpsa_config, self.capability_groups))
        self.add_callback(SubspaceCallback(self))

    def check_model(self) -> None:
        """
        Refuse models and processors that no text can be scored with.

        Raises:
            ValueError: there is no language-modeling head, an encoder, or no tokenizer; or the
                model would be copied to several devices of this process.
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                f"This process has {self.args.n_gpu} GPUs, on which `transformers.Trainer` would "
                "run `torch.nn.DataParallel`, which OGPSA does not support. Launch with "
                "`accelerate launch --config_file configs/accelerate/ddp.yaml`, or set "
                "`CUDA_VISIBLE_DEVICES=0`."
            )
        if hasattr(self.model, "config"):
            check_no_encoder(self.model.config, type(self.model).__name__)
        if self.model.get_output_embeddings() is None:
            raise ValueError(
                "The capability loss is that of a language model, but "
                f"{type(self.model).__name__} has no language-modeling head. Train an "
                "`AutoModelForCausalLM`; a reward model has no capability of this kind to protect."
            )
        if not isinstance(self.processing_class, ProcessorMixin | PreTrainedTokenizerBase):
            raise ValueError(
                "A `capability_dataset` needs a tokenizer, but `processing_class` is "
                f"{type(self.processing_class).__name__}. Pass `processing_class=tokenizer`."
            )

    def _keep_adapters_in_float32(self) -> None:
        """
        On a quantised base TRL rounds adapters to bfloat16: a step of 1e-5 is lost in a weight of
        1e-2, and with it what the projection takes out. The optimizer is not made yet.
        """
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def capability_preparation(self) -> Preparation:
        """How capability samples become tokens. The length limit is that of the training data."""
        processing_class = self.processing_class
        is_processor = isinstance(processing_class, ProcessorMixin)
        tokenizer = processing_class.tokenizer if is_processor else processing_class
        return Preparation(
            processing_class,
            tokenizer,
            self.ogpsa_config.capability_max_length,
            context=context_of(self.model.config),
            vocabulary_size=getattr(self.model.config.get_text_config(), "vocab_size", None),
        )

    def capability_pass_context(self) -> contextlib.AbstractContextManager[Any]:
        """What the trainer puts around its own forward and backward passes."""
        return contextlib.nullcontext()

    def capability_log_probs(self, batch: Batch) -> Tensor:
        """
        Log-probabilities of the trainable tokens of a batch, zero elsewhere, with their graph.

        `compute_loss` is not used, because it counts tokens and metrics of training.

        Returns:
            Shape [rows, length - 1].
        """
        labels = batch.inputs["labels"]
        is_trained = trained_labels(labels)
        labels_T = labels[:, 1:][is_trained]

        def score(logits_TV: Tensor, positions: slice) -> Tensor:
            labels_T1 = labels_T[positions].to(logits_TV.device)[:, None]
            return logits_TV.float().log_softmax(dim=1).gather(1, labels_T1)[:, 0]

        scores_T = self.capability_scores(batch, score)
        is_trained = is_trained.to(scores_T.device)
        return scores_T.new_zeros(is_trained.shape).masked_scatter(is_trained, scores_T)

    def capability_scores(self, batch: Batch, score: Score) -> Tensor:
        """
        Scores of the trainable tokens of a batch, row by row, from the logits before them.

        Args:
            batch: The batch.
            score: Makes them from the logits of some of the tokens (see `tiled_head`).

        Returns:
            Shape [tokens], float32, with their graph.
        """
        # Not `_prepare_inputs`: that of GRPO generates completions.
        inputs: Any = self._prepare_input(batch.inputs)
        is_trained = trained_labels(inputs.pop("labels"))

        def logits() -> Tensor:
            with self.compute_loss_context_manager():
                return self.model_wrapped(**inputs, use_cache=False).logits

        return self.tiled_head.scores(logits, functional.pad(is_trained, (0, 1)), score)

    def refresh_subspace(self) -> None:
        """
        Estimate the subspace anew at the current weights, between two optimizer steps of `train`.

        A collective call: every process makes it. What is found is logged with the next log.

        Raises:
            FloatingPointError: a capability gradient is not finite in the first refresh, or all are
                in a later one. Where only some are not, those groups keep their last gradient.
        """
        start = time.perf_counter()
        backend, loss = self.subspace.backend, self.capability_loss
        num_samples, draw = self.ogpsa_config.samples_per_refresh, self._draw()
        parts = [p for group in self.capability_groups for p in group.parts(num_samples, draw)]
        progress = tqdm(
            total=sum(part.num_batches_of(backend.num_processes) for part in parts),
            desc="Refreshing the capability subspace",
            delay=_SECONDS_WITHOUT_BAR,
            disable=self.args.disable_tqdm
            or not self.is_world_process_zero()
            or self._shows_rich_progress(),
            leave=False,
        )

        def sum_loss(batch: Batch) -> Tensor:
            progress.update()
            return loss.sum(batch)

        with progress, self.capability_pass_context(), loss.passes(backend):
            loss.prepare(backend)
            old_rows, old_share = self.subspace.release_gradients(len(parts))
            gradients = capability_gradients(
                backend,
                parts,
                sum_loss,
                old_rows,
                old_share=old_share,
                dtype=self.subspace.dtype,
                rounding=loss.rounding,
            )
        refresh = self.subspace.refresh(gradients, loss.rises(parts, gradients.losses))
        self.diagnostics.record_refresh(
            self.subspace,
            gradients,
            refresh,
            seconds=time.perf_counter() - start,
            step=self.state.global_step,
        )
        floors = loss.floors(parts)
        if floors:
            self.diagnostics.record_groups(self.subspace, "divergence_floor", floors)

    def _shows_rich_progress(self) -> bool:
        """A bar of tqdm would put a line above the panel of rich at each of its updates."""
        return any(isinstance(c, RichProgressCallback) for c in self.callback_handler.callbacks)

    def _draw(self) -> str:
        """Names the samples of a refresh: others in every step and for every seed."""
        return f"{self.args.seed} {self.state.global_step}"

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.capability_groups:
            return super().training_step(*args, **kwargs)
        with self.subspace.backend.around_step(self._constrained_step):
            return super().training_step(*args, **kwargs)

    @contextlib.contextmanager
    def _constrained_step(self) -> Iterator[None]:
        """Around clipping and the optimizer's step."""
        target, backend = self.ogpsa_config.target, self.subspace.backend
        if target == "gradient":
            self._project()
        elif target == "none" or not backend.has_length_before_step:
            self._count_gradient(is_finite=has_finite_gradients(backend))
        length = self.subspace.replay()
        if length is not None:
            self.diagnostics.record(replay_length=length)
        if target == "update":
            weights_before = copy_weights(self.subspace)
            yield
            self._project_update(weights_before)
        elif self._is_logging_next() and backend.holds_weights:
            weights_before = copy_weights(self.subspace)
            yield
            share, changes = measure_update(self.subspace, weights_before)
            self.diagnostics.record(update_in_subspace=share)
            self.diagnostics.record_groups(self.subspace, "step_change", changes.tolist())
        else:
            yield

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer has just read the whole gradient: that it is finite costs nothing more."""
        norm: Any = super()._get_grad_norm(*args, **kwargs)
        if (
            self.capability_groups
            and self.ogpsa_config.target == "update"
            and self.subspace.backend.has_length_before_step
        ):
            self._count_gradient(is_finite=math.isfinite(norm))
        return norm

    def _count_gradient(self, *, is_finite: bool) -> None:
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
        step = self.state.global_step
        if self.num_lost_in_a_row > _MOST_LOST_IN_A_ROW:
            raise FloatingPointError(
                f"Step {step}: the training gradient has not been finite in "
                f"{self.num_lost_in_a_row} steps in a row. The weights are still those before. "
                "Lower `learning_rate`, or look for samples that the model gives no probability."
            )
        logger.warning(
            "Step %d: the training gradient is not finite and counts as zero in this step.", step
        )
        self.diagnostics.record(lost_gradients=1.0)
        backend = self.subspace.backend
        for _, parameter in backend.parameters:
            gradient_N = backend.gradient(parameter)
            if gradient_N is not None:
                gradient_N.zero_()

    def _project(self) -> None:
        projection = project(self.subspace)
        self._count_gradient(is_finite=projection is not None)
        if projection is None:
            return
        self.diagnostics.record(
            cosine=projection.cosine, gradient_in_subspace=projection.share_inside
        )
        self.diagnostics.record_removal(projection, step=self.state.global_step)

    def _project_update(self, weights_before: list[Tensor]) -> None:
        projection = project_update(self.subspace, weights_before)
        self.diagnostics.record(proposal_in_subspace=projection.share_inside)
        if projection.changes is not None and self._is_logging_next():
            changes = projection.changes.tolist()
            self.diagnostics.record_groups(self.subspace, "step_change", changes)
        self.diagnostics.record_removal(projection, step=self.state.global_step)

    def _is_logging_next(self) -> bool:
        """Whether the step under way is one after which the trainer logs."""
        return (
            self.args.logging_strategy == IntervalStrategy.STEPS
            and (self.state.global_step + 1) % self.state.logging_steps == 0
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means since the last log, read from the device here and not in every step."""
        if self.capability_groups and self.model.training:
            logs |= self.diagnostics.take_means()
        super().log(logs, *args, **kwargs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """The engine has just wrapped the model: from here on the parameters stay the same."""
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self.resumed_from = resume_from_checkpoint
        if self.capability_groups:
            backend = make_backend(self.accelerator, self.model, self.model_wrapped, self.optimizer)
            self._backend = backend
            self.subspace = CapabilitySubspace(backend, self.ogpsa_config)
            self.capability_loss.begin(self.model)
            self._start_file = None
            self.diagnostics.begin()
            if resume_from_checkpoint is not None:
                load_subspace(self.subspace, resume_from_checkpoint)
                self._load_start(backend, resume_from_checkpoint)
        return prepared

    def _load_start(self, backend: GradientBackend, folder: str) -> None:
        """Go on with the starting point of a checkpoint, and with the tokens that it is of."""
        start = load_start(backend, self.capability_groups, self.ogpsa_config, folder)
        if start is not None:
            self.capability_loss.start = start
            self.capability_groups[:] = start.groups_of(self.capability_groups)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """However it ends, nothing of this package is left on the optimizer."""
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self._backend is not None:
                self._backend.abandon_step()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """
        Take no step where the last one was made already: in a run that is resumed at its end.

        transformers (5.23) looks at `max_steps` after a step only, and would take one more.
        """
        if self.capability_groups and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The basis belongs to the state of the optimizer: saved, or left out, with it."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            for name, text in self.checkpoint_texts.items():
                replace_text(Path(output_dir) / name, text())
        if not self.capability_groups:
            return
        start = self.capability_loss.start
        if start is not None and self.args.should_save:
            self._start_file = save_start(start, self.ogpsa_config, output_dir, self._start_file)
        if self.subspace.backend.is_sharded or self.args.should_save:
            save_subspace(self.subspace, output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """
        Mark the checkpoint as whole when all processes have written it, and only then delete older
        ones: at any moment there is a whole one.

        Raises:
            SaveError: it cannot be written.
        """
        if not self.capability_groups:
            super()._save_checkpoint(model, trial)
            return
        run_dir = self._get_output_dir(trial)
        folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with saving(folder, run_dir):
            if self.args.should_save:
                unmark(folder)
            self.accelerator.wait_for_everyone()
            with without_deletion():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark(folder)
                if self.args.push_to_hub:
                    super()._push_from_checkpoint(str(folder))
                rotate_checkpoints(
                    run_dir,
                    self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint is whole: see `_save_checkpoint`."""
        if not self.capability_groups:
            super()._push_from_checkpoint(checkpoint_folder)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self.capability_groups and resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(
                resume_from_checkpoint, self.args.output_dir
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.capability_groups and self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            section = settings_section(self.ogpsa_config, self.capability_groups)
            path.write_text(path.read_text(encoding="utf-8") + section, encoding="utf-8")
