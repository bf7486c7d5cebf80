"""The trainers that swap in for TRL's."""

import contextlib
from dataclasses import replace
from typing import Any

from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from ogpsa_trl.data.preparation import Preparation
from ogpsa_trl.data.rendering import prepared
from ogpsa_trl.training.mixin import OGPSAMixin

_NAMES = {"train": "the training data", "eval": "the evaluation data"}


class _OfTRL(OGPSAMixin):
    """
    For trainers of TRL that cut texts, prepare data on several processes, and can offload
    activations.
    """

    maybe_activation_offload_context: contextlib.AbstractContextManager[Any]

    def capability_preparation(self) -> Preparation:
        preparation = super().capability_preparation()
        return replace(
            preparation,
            max_length=preparation.max_length or self.args.max_length,
            dataset_num_proc=self.args.dataset_num_proc,
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's own; where a row of the data is at fault, it is named."""
        name = kwargs.get("dataset_name", args[-1] if args else "train")
        where = _NAMES.get(name, f"the evaluation data {name!r}")
        parent: Any = super()  # the trainer that this class stands before
        return prepared(dataset, lambda rows: parent._prepare_dataset(rows, *args, **kwargs), where)

    def capability_pass_context(self) -> contextlib.AbstractContextManager[Any]:
        return self.maybe_activation_offload_context


class OGPSASFTTrainer(_OfTRL, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that keeps capabilities: see [`OGPSAMixin`] for what it adds.

    Example:

    ```python
    trainer = OGPSASFTTrainer(
        "Qwen/Qwen2.5-0.5B-Instruct",
        args=SFTConfig(output_dir="safe"),
        train_dataset=safety,
        capability_dataset={"instructions": instructions, "facts": facts},
        ogpsa_config=OGPSAConfig.from_preset("preserve", num_samples=200),
    )
    trainer.train()
    ```
    """

    def capability_preparation(self) -> Preparation:
        return replace(
            super().capability_preparation(),
            truncation_mode=self.args.truncation_mode,
            completion_only_loss=self.args.completion_only_loss,
            assistant_only_loss=self.args.assistant_only_loss,
            chat_template=self.chat_template,
            dataset_text_field=self.args.dataset_text_field,
        )


class OGPSADPOTrainer(_OfTRL, DPOTrainer):
    """
    [`~trl.DPOTrainer`] that keeps capabilities: see [`OGPSAMixin`] for what it adds.

    The capability loss is that of the capability completions, as in SFT.
    """

    def capability_preparation(self) -> Preparation:
        return replace(super().capability_preparation(), truncation_mode=self.args.truncation_mode)


class OGPSAKTOTrainer(_OfTRL, KTOTrainer):
    """
    [`~trl.KTOTrainer`] that keeps capabilities: see [`OGPSAMixin`] for what it adds.

    The capability loss is that of the capability completions, as in SFT.
    """


class OGPSAGRPOTrainer(OGPSAMixin, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that keeps capabilities: see [`OGPSAMixin`] for what it adds.

    The capability loss is that of the capability text, as in SFT, at temperature 1 whatever the
    temperature of the samples; nothing is generated for it. Texts are cut to
    `capability_max_length`.
    """


class OGPSARLOOTrainer(OGPSAMixin, RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] that keeps capabilities: see [`OGPSAGRPOTrainer`].
    """
