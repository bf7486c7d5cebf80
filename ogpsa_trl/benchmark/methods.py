"""The methods of the trade-off benchmark, and how one stage is trained by one of them."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from ogpsa_trl import OGPSAConfig, OGPSADPOTrainer, OGPSASFTTrainer
from ogpsa_trl.data.preparation import Preparation, prepare_group
from ogpsa_trl.evaluation.models import load_folder

STAGES: dict[str, tuple[Any, Any]] = {
    "sft": (SFTConfig, OGPSASFTTrainer),
    "dpo": (DPOConfig, OGPSADPOTrainer),
}
# What is trained, stage after stage, and the factor on the learning rate of its configuration: DPO
# that starts from the base model has more to learn than DPO after SFT.
CHAINS = {
    "sft": [("sft", 1.0)],
    "dpo": [("dpo", 4.0)],
    "sft-dpo": [("sft", 1.0), ("dpo", 1.0)],
}


@dataclass(frozen=True)
class Method:
    """How a run differs from plain TRL."""

    # A preset, and settings to replace in it. `None`: no capability data in the trainer.
    ogpsa: Mapping[str, Any] | None = None
    lora: bool = False  # an adapter of rank 8 instead of all weights
    learning_rate_factor: float = 1.0  # on all learning rates of the sweep
    l2_weight: float = 0.0  # of the squared distance from the starting weights in the loss
    # Of capability samples among those trained on; SFT only: pairs cannot be mixed with them.
    mixed_share: float = 0.0
    # How far to go from the starting weights to the trained ones: merging by interpolation.
    kept_share: float = 1.0

    def config(self, stage: str, **settings: Any) -> OGPSAConfig:
        """The settings of OGPSA."""
        settings |= self.ogpsa or {}
        return OGPSAConfig.from_preset(settings.pop("preset"), stage=stage, **settings)

    @property
    def has_share(self) -> bool:
        """Whether a share of the training tokens says what its capability data cost."""
        if self.ogpsa is None:
            return False
        config = self.config("sft")
        return config.capability_token_share is not None and config.samples_per_refresh is None

    def at_share(self, share: float | None) -> "Method":
        """The method with another share; `None`: its own."""
        if share is None:
            return self
        return replace(self, ogpsa={**(self.ogpsa or {}), "capability_token_share": share})


# The published forms refresh as often as in the published DPO, on as many samples in all as the
# others see: 8 of each of two groups for each step.
_PUBLISHED = {"refresh_interval": 5, "num_samples": 40}
# The same samples a step at a time: running means instead of a pause in every fifth step.
_STREAMING = {"refresh_interval": 1, "samples_per_refresh": 8, "capability_ema": 0.8}

METHODS = {
    "naive": Method(),
    "L2, weight 0.1": Method(l2_weight=0.1),
    "L2, weight 1": Method(l2_weight=1.0),
    "LoRA": Method(lora=True, learning_rate_factor=10.0),
    "merged, 50%": Method(kept_share=0.5),
    "merged, 75%": Method(kept_share=0.75),
    "replay mixed in, 25%": Method(mixed_share=0.25),
    "replay added": Method({"preset": "kl", "capability_loss": "nll"}),
    "KL, weight 1": Method({"preset": "kl"}),
    "KL, weight 3": Method({"preset": "kl", "capability_weight": 3.0}),
    "KL, weight 10": Method({"preset": "kl", "capability_weight": 10.0}),
    "OGPSA paper": Method({"preset": "paper", **_PUBLISHED}),
    "OGPSA paper-theorem": Method({"preset": "paper-theorem", **_PUBLISHED}),
    "OGPSA paper, streaming": Method({"preset": "paper", **_STREAMING}),
    "OGPSA update": Method({"preset": "preserve", "restoration": 0.0}),
    "OGPSA update, per tensor": Method(
        {"preset": "preserve", "restoration": 0.0, "scope": "parameter", "metric": "euclidean"}
    ),
    "OGPSA preserve": Method({"preset": "preserve"}),
    "OGPSA preserve, nll": Method({"preset": "preserve", "capability_loss": "nll"}),
    "OGPSA preserve, LoRA": Method({"preset": "preserve"}, lora=True, learning_rate_factor=10.0),
    "OGPSA replay": Method({"preset": "replay"}),
}


@dataclass(frozen=True)
class Run:
    """One method, trained through a chain of stages at one learning rate with one seed."""

    chain: str
    num_steps: int
    method: str
    learning_rate_factor: float
    seed: int
    share: float | None = None  # `capability_token_share`; `None`: the method's own

    @property
    def label(self) -> str:
        """Method and share, for tables."""
        return self.method if self.share is None else f"{self.method}, share {self.share:g}"

    @property
    def name(self) -> str:
        """The name of its file."""
        method = "".join(c if c.isalnum() else "-" for c in self.label)
        return f"{self.chain}-{self.num_steps}-{method}-x{self.learning_rate_factor:g}-{self.seed}"


@dataclass
class Cost:
    """What training took."""

    forward: int = 0  # sequences through the model, those of a reference model included
    backward: int = 0  # sequences among them that went backward too
    seconds: float = 0.0  # of the processor, without loading and measuring


@dataclass(frozen=True)
class Recipe:
    """What all methods of a stage have in common."""

    stage: str  # `sft` or `dpo`
    config: Path  # YAML file with the settings of TRL and the capability batches
    training: Dataset  # the safety data
    capability_groups: Mapping[str, Dataset]
    learning_rate: float  # the highest of the schedule, before the method's factor
    num_steps: int  # of the optimizer
    seed: int  # of training

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the file says."""
        return yaml.safe_load(self.config.read_text(encoding="utf-8"))

    def arguments(self, method: Method, output: Path) -> Any:
        """The arguments of the TRL trainer."""
        config_class, _ = STAGES[self.stage]
        known = {f.name for f in fields(config_class)}
        values = {name: value for name, value in self.settings.items() if name in known}
        values |= {
            "output_dir": str(output),
            "max_steps": self.num_steps,
            "learning_rate": self.learning_rate * method.learning_rate_factor,
            "seed": self.seed,
            "logging_strategy": "no",
            "dataloader_drop_last": True,  # so that every step has equally many sequences
        }
        return config_class(**values)

    def ogpsa_config(self, method: Method) -> OGPSAConfig | None:
        """The settings of OGPSA, if the method has any."""
        if method.ogpsa is None:
            return None
        known = {name: self.settings[name] for name in ("num_samples", "capability_batch_size")}
        return method.config(self.stage, **known)


def is_applicable(method: Method, stages: Sequence[str]) -> bool:
    """Whether a method can train all of the stages."""
    return not (method.mixed_share and "dpo" in stages)


def train(method: Method, recipe: Recipe, start: Path, output: Path, cost: Cost) -> None:
    """
    Train one stage, and save model and tokenizer.

    Args:
        method: How to train.
        recipe: What to train on.
        start: Folder of the model to start from; in DPO it is the reference model too.
        output: Folder for the trained model; an adapter is merged into it.
        cost: What the training takes is added to it.
    """
    model, tokenizer = load_folder(start)
    config = recipe.ogpsa_config(method)
    make_trainer: Any = STAGES[recipe.stage][1]
    if method.l2_weight:
        make_trainer = type("L2Trainer", (L2ToStart, make_trainer), {"weight": method.l2_weight})
    peft_config = None
    if method.lora:
        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            model,
            args=recipe.arguments(method, Path(folder)),
            train_dataset=_training_data(method, recipe, tokenizer),
            processing_class=tokenizer,
            peft_config=peft_config,
            capability_dataset=None if config is None else dict(recipe.capability_groups),
            ogpsa_config=config,
        )
        trainer.remove_callback(PrinterCallback)
        models = [trainer.model, getattr(trainer, "ref_model", None)]
        with _counted([model for model in models if model is not None], cost):
            trainer.train()
    model = trainer.model.merge_and_unload() if method.lora else trainer.model
    if method.kept_share < 1:
        first, _ = load_folder(start)
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), first.parameters(), strict=True):
                parameter.copy_(torch.lerp(old, parameter, method.kept_share))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


class L2ToStart(Trainer):
    """Adds `weight * |weights - starting weights|^2` to the loss of the trainer behind it."""

    weight: float
    start: list[Tensor] | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.requires_grad]  # type: ignore[union-attr]
        if self.start is None:
            self.start = [parameter.detach().clone() for parameter in parameters]
        loss = super().training_step(*args, **kwargs)
        share = 2 * self.weight / self.args.gradient_accumulation_steps
        for parameter, start in zip(parameters, self.start, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - start, alpha=share)
        return loss


def _training_data(method: Method, recipe: Recipe, tokenizer: Any) -> Dataset:
    """The safety data, with capability samples among them where the method says so."""
    if not method.mixed_share:
        return recipe.training
    arguments = recipe.arguments(method, Path())
    preparation = Preparation(tokenizer, tokenizer, max_length=arguments.max_length)
    num_safety, groups = len(recipe.training), recipe.capability_groups
    num_capability = round(num_safety * method.mixed_share / (1 - method.mixed_share))
    # As many distinct samples as the others may draw from; each as often as the share asks for.
    wanted: dict[str, Any] = {"safety": (recipe.training, num_safety, None)} | {
        name: (d, min(recipe.settings["num_samples"], len(d)), num_capability // len(groups))
        for name, d in groups.items()
    }
    rows: list[dict[str, Any]] = []
    for name, (dataset, num_samples, num_rows) in wanted.items():
        group = prepare_group(
            name, dataset, preparation,
            num_samples=num_samples, num_parts=1, batch_size=1, seed=recipe.seed,
        )  # fmt: skip
        # Tokens and labels: samples of different formats, plain text and conversations, can be
        # mixed only in this form.
        batches = [group.collate([sample.features]) for sample in group.samples]
        rows += [
            {key: batch[key][0].tolist() for key in ("input_ids", "labels")}
            for batch in islice(cycle(batches), len(batches) if num_rows is None else num_rows)
        ]
    return Dataset.from_list(rows)


@contextmanager
def _counted(models: Sequence[nn.Module], cost: Cost) -> Iterator[None]:
    """Count the sequences that go through the models within the block, and its time."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        num_sequences = inputs[0].shape[0]
        cost.forward += num_sequences
        cost.backward += num_sequences * torch.is_grad_enabled()

    embeddings = {id(e): e for m in models for e in [m.get_input_embeddings()]}  # type: ignore[operator]
    handles = [embedding.register_forward_hook(count) for embedding in embeddings.values()]
    start = time.process_time()
    try:
        yield
    finally:
        cost.seconds += time.process_time() - start
        for handle in handles:
            handle.remove()
