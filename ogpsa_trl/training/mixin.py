"""OGPSAMixin, for any `transformers.Trainer`: where a trainer calls the method."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn import functional
from transformers import ProcessorMixin, Trainer

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.files import replace_text
from ogpsa_trl.data.groups import Batch, CapabilityGroup, trained_labels
from ogpsa_trl.data.preparation import Preparation, context_of
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.method.capability_loss import CapabilityLoss
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.tensors.tiled_head import Score, TiledHead
from ogpsa_trl.training.callbacks import SettingsCallback, SubspaceCallback
from ogpsa_trl.training.diagnostics import Diagnostics
from ogpsa_trl.training.model_card import PAPER, settings_section
from ogpsa_trl.training.setup import (
    check_trainer,
    checked_datasets,
    keep_adapters_in_float32,
    prepared_groups,
)
from ogpsa_trl.training.step import ConstrainedStep
from ogpsa_trl.training.whole_checkpoints import checkpoint_to_resume, save_whole


class OGPSAMixin(Trainer):
    """
    Takes from every optimizer step of a trainer what changes its capability losses.

        g <- g - B^T B g                          target: gradient, the paper's form
        u <- u - D A^T (A D A^T)^-1 (A u + r)     target: update, the default

        g   gradient of the step, before clipping     u   what the optimizer did to the weights
        A   gradients of the capability losses: `capability_loss`, `gradients_per_group`, averaged
            over refreshes by `capability_ema`
        B   an orthonormal basis of them: `rank`, `scope`, `basis_dtype`; A and B are made anew
            every `refresh_interval` steps, for `capability_token_share` of the tokens of training
        D   `metric`: learning rates, divided by the root of Adam's second moment or not
        r   `restoration` of how far the losses have risen, at most `restoration_cap`

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
    # Made where there is capability data; the subspace when training begins.
    capability_loss: CapabilityLoss
    diagnostics: Diagnostics
    constrained_step: ConstrainedStep
    subspace: CapabilitySubspace

    def __init__(
        self,
        *args: Any,
        capability_dataset: "Dataset | IterableDataset | Mapping[str, Any] | None" = None,
        ogpsa_config: OGPSAConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.ogpsa_config = ogpsa_config or OGPSAConfig()
        self.capability_groups: list[CapabilityGroup] = []
        self.tiled_head = TiledHead(lambda: self.model.get_output_embeddings())
        # What else stands in every checkpoint: by the name of the file, what makes its text.
        self.checkpoint_texts: dict[str, Callable[[], str]] = {}
        # The checkpoint that the run goes on from.
        self.resumed_from: str | None = None
        self.backend: GradientBackend | None = None  # made when training begins
        datasets = checked_datasets(capability_dataset, ogpsa_config)
        name = getattr(self, "_name", None)  # of a TRL trainer: what it writes into the model card
        if datasets and name is not None:
            self._name, self._paper = f"OGPSA ({name})", PAPER
            self._tag_names = [*self._tag_names, "ogpsa"]
        super().__init__(*args, **kwargs)
        if not datasets:
            return
        check_trainer(self)
        keep_adapters_in_float32(self.model)
        self.capability_groups = groups = prepared_groups(self, datasets)
        self.capability_loss = CapabilityLoss(
            self.ogpsa_config, groups, self.capability_log_probs, self.capability_scores
        )
        self.diagnostics = Diagnostics([g.name for g in groups for _ in range(g.num_parts)])
        self.constrained_step = ConstrainedStep(self)
        self.add_callback(SettingsCallback(self, self.ogpsa_config, groups))
        self.add_callback(SubspaceCallback(self))

    # What another trainer may do in its own way.

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

    # Where the trainer calls the method.

    def refresh_subspace(self) -> None:
        """
        Estimate the subspace anew at the current weights, between two optimizer steps of `train`.

        A collective call: every process makes it. What is found is logged with the next log.

        Raises:
            FloatingPointError: a capability gradient is not finite in the first refresh, or all are
                in a later one. Where only some are not, those groups keep their last gradient.
        """
        self.constrained_step.refresh()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.capability_groups:
            return super().training_step(*args, **kwargs)
        with self.subspace.backend.around_step(self.constrained_step.around_optimizer):
            return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer has just read the whole gradient: that it is finite costs nothing more."""
        norm: Any = super()._get_grad_norm(*args, **kwargs)
        if self.capability_groups:
            self.constrained_step.look_at_length(norm)
        return norm

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
            self.constrained_step.begin(max_steps, resume_from_checkpoint)
        return prepared

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """However it ends, nothing of this package is left on the optimizer."""
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            if self.backend is not None:
                self.backend.abandon_step()

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
        if self.capability_groups:
            self.constrained_step.save(output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Only a whole checkpoint counts: see `save_whole`."""
        if self.capability_groups:
            save_whole(self, super()._save_checkpoint, super()._push_from_checkpoint, model, trial)
        else:
            super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint is whole: `save_whole` does it."""
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
