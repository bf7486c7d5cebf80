"""What a trainer with capability data needs before it trains: checks, and the prepared groups."""

import functools
import importlib.metadata
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from packaging.version import Version
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.training_args import OptimizerNames

from ogpsa_trl.config import GateConfig, OGPSAConfig
from ogpsa_trl.data.groups import (
    CapabilityGroup,
    Part,
    named_groups,
    warn_of_samples_in_training,
    warn_of_uneven_groups,
)
from ogpsa_trl.data.preparation import (
    prepare_group,
)
from ogpsa_trl.engines.supported import check_same_on_all, check_supported
from ogpsa_trl.method.starting_point import content
from ogpsa_trl.training.model_kind import check_no_encoder

logger = logging.getLogger(__name__)

# The newest releases that the tests were run on; the oldest are the lower bounds of the package.
_TESTED = {
    "trl": (1, 16), "transformers": (5, 24), "accelerate": (1, 15), "peft": (0, 21),
}  # fmt: skip


@functools.cache
def warn_of_untested_versions() -> None:
    """Once: the method wraps what these libraries do not promise to keep."""
    for package, newest in _TESTED.items():
        found = importlib.metadata.version(package)
        if Version(found).release[:2] > newest:  # 2.0rc1 is one, too
            logger.warning(
                "%s %s is newer than the releases that ogpsa_trl was tested with (up to %d.%d). "
                "Should the run fail, install that one, or a newer ogpsa_trl.",
                package, found, *newest,
            )  # fmt: skip


def checked_datasets(capability_dataset: Any, config: OGPSAConfig | None) -> dict[str, Any]:
    """
    The capability data by group; none for plain TRL.

    Raises:
        ValueError: settings without data, or what are no settings.
    """
    if capability_dataset is None:
        if config is not None:
            raise ValueError(
                "`ogpsa_config` needs a `capability_dataset`, but there is none. Pass the samples "
                "to protect, or leave `ogpsa_config` out to train without OGPSA."
            )
        return {}
    if not isinstance(config, OGPSAConfig | None):
        raise ValueError(
            f"`ogpsa_config` must be an `OGPSAConfig`, but got {config!r}. Pass "
            "`OGPSAConfig(num_samples=200, ...)`."
        )
    return named_groups(capability_dataset)


def check_trainer(trainer: Any) -> None:
    """
    Refuse what the method cannot train.

    Raises:
        ValueError: a model that no text can be scored with, or an engine, a precision or an
            optimizer that is not supported.
    """
    warn_of_untested_versions()
    check_text_model(trainer)
    optimizer = OptimizerNames(trainer.args.optim).value
    check_supported(trainer.accelerator, optimizer, trainer.ogpsa_config.target)
    if trainer.ogpsa_config.target == "none" and not trainer.ogpsa_config.capability_weight:
        logger.warning(
            "With `target: none` and `capability_weight: 0` OGPSA measures the run and changes "
            "nothing. Set `capability_weight: 1` for replay or a KL penalty."
        )


def check_text_model(trainer: Any) -> None:
    """
    Refuse models and processors that no text can be scored with.

    Raises:
        ValueError: there is no language-modeling head, an encoder, or no tokenizer; or the model
            would be copied to several devices of this process.
    """
    model, processing_class = trainer.model, trainer.processing_class
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"This process has {trainer.args.n_gpu} GPUs, on which `transformers.Trainer` would run"
            " `torch.nn.DataParallel`, which OGPSA does not support. Launch with "
            "`accelerate launch --config_file configs/accelerate/ddp.yaml`, or set "
            "`CUDA_VISIBLE_DEVICES=0`."
        )
    check_no_encoder(model.config, type(model).__name__)
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"The capability loss is that of a language model, but {type(model).__name__} has no "
            "language-modeling head. Train an `AutoModelForCausalLM`; a reward model has no "
            "capability of this kind to protect."
        )
    if not isinstance(processing_class, ProcessorMixin | PreTrainedTokenizerBase):
        raise ValueError(
            "A `capability_dataset` needs a tokenizer, but `processing_class` is "
            f"{type(processing_class).__name__}. Pass `processing_class=tokenizer`."
        )


def keep_adapters_in_float32(model: Any) -> None:
    """
    On a quantised base TRL rounds adapters to bfloat16: a step of 1e-5 is lost in a weight of 1e-2,
    and with it what the projection takes out. To be called before the optimizer is made.
    """
    if getattr(model, "is_quantized", False):  # other models do not have it
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def prepared_groups(trainer: Any, datasets: Mapping[str, Any]) -> list[CapabilityGroup]:
    """
    The capability groups as tokens. A collective call: every process makes it.

    Raises:
        ValueError: data are empty, or in no known format; processes have others than each other.
    """
    config, seed = trainer.ogpsa_config, trainer.args.seed
    # Before the processes wait for each other to prepare them.
    check_same_on_all(
        {"names of capability groups": list(datasets), "`seed`": seed}
        | {f"`{name}`": value for name, value in asdict(config).items()}
    )
    preparation = trainer.capability_preparation()
    groups = [
        prepare_group(
            name,
            dataset,
            preparation,
            num_samples=config.num_samples,
            num_parts=config.gradients_per_group,
            batch_size=config.capability_batch_size,
            seed=seed,
        )
        for name, dataset in datasets.items()
    ]
    check_same_on_all({f"capability group {g.name!r}": content(g.samples) for g in groups})
    warn_of_uneven_groups(groups)
    warn_of_samples_in_training(groups, trainer.train_dataset)
    logger.info("OGPSA settings: %s", asdict(config))
    return groups


def check_gate_saving(config: GateConfig, args: Any) -> None:
    """
    Refuse `TrainingArguments` that save no checkpoint for `gate_action: best`, or mark another.

    Raises:
        ValueError: they do.
    """
    if config.gate_action != "best":
        return
    if args.metric_for_best_model is not None:
        raise ValueError(
            "`gate_action` 'best' marks the best checkpoint by its capability loss, but "
            f"`metric_for_best_model` is {args.metric_for_best_model!r} and would mark another."
            " Leave it out, and `load_best_model_at_end`, which sets it, as schedulers that "
            "watch a metric do: the gate loads its checkpoint by itself."
        )
    if args.save_strategy not in ("steps", "epoch"):
        raise ValueError(
            "`gate_action` 'best' needs checkpoints to choose from, but `save_strategy` is "
            f"{str(args.save_strategy.value)!r}. Set `save_strategy: steps` or `epoch`, or "
            "`gate_action: stop`."
        )


def warn_of_protected_samples(parts: Mapping[str, Part], groups: Sequence[CapabilityGroup]) -> None:
    """Warn where a gate measures what training protects."""
    protected = {
        tuple(sample.features["input_ids"]) for group in groups for sample in group.samples
    }
    for name, part in parts.items():
        num_known = sum(tuple(s.features["input_ids"]) in protected for s in part.samples)
        if num_known:
            logger.warning(
                "Gate group %r: %d of its %d samples are among those of `capability_dataset`, "
                "which training protects, so their loss says too little about others. Hold them "
                "out: take another split, or other rows.", name, num_known, len(part.samples),
            )  # fmt: skip
