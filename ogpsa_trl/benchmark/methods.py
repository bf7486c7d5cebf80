"""The methods of the trade-off benchmark, and how one stage is trained by one of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer

from ogpsa_trl.cli.train import TRAINERS, Data, prepare
from ogpsa_trl.cli.train_arguments import RunArguments
from ogpsa_trl.cli.train_keys import parse_run
from ogpsa_trl.config import preset_settings
from ogpsa_trl.data.entries import load_groups
from ogpsa_trl.data.preparation import Preparation, prepare_group
from ogpsa_trl.evaluation.models import load_folder

# What is trained, stage after stage, and the factor on the learning rate of its configuration: DPO
# that starts from the base model has more to learn than DPO after SFT.
CHAINS = {
    "sft": [("sft", 1.0)],
    "dpo": [("dpo", 4.0)],
    "sft-dpo": [("sft", 1.0), ("dpo", 1.0)],
}

_PLAIN = {"ogpsa": False}


@dataclass(frozen=True)
class Method:
    """How a run differs from the configuration of its stage."""

    keys: Mapping[str, Any] = field(default_factory=lambda: _PLAIN)  # of `ogpsa train`
    learning_rate_factor: float = 1.0  # on all learning rates of the sweep
    l2_weight: float = 0.0  # of the squared distance from the starting weights in the loss
    # Of capability samples among those trained on; SFT only: pairs cannot be mixed with them.
    mixed_share: float = 0.0
    # How far to go from the starting weights to the trained ones: merging by interpolation.
    kept_share: float = 1.0

    @property
    def has_share(self) -> bool:
        """Whether a share of the training tokens says what its capability data cost."""
        if "preset" not in self.keys:
            return False
        settings = {**preset_settings(self.keys["preset"]), **self.keys}
        return (
            settings.get("capability_token_share", "the default") is not None
            and settings.get("samples_per_refresh") is None
        )

    def at_share(self, share: float | None) -> "Method":
        """The method with another share; `None`: its own."""
        if share is None:
            return self
        return replace(self, keys={**self.keys, "capability_token_share": share})

    def can_train(self, stages: Sequence[str]) -> bool:
        """Whether it can train all of the stages."""
        return "dpo" not in stages or not (self.mixed_share or self.keys.get("loss_type") == "dft")


# The published forms refresh as often as in the published DPO, on as many samples in all as the
# others see: 8 of each of two groups for each step.
_PUBLISHED = {"refresh_interval": 5, "num_samples": 40}
# The same samples a step at a time: running means instead of a pause in every fifth step.
_STREAMING = {"refresh_interval": 1, "samples_per_refresh": 8, "capability_ema": 0.8}
_LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": "all-linear"}
_PER_TENSOR = {"restoration": 0.0, "scope": "parameter", "metric": "euclidean"}

METHODS = {
    "naive": Method(),
    "DFT loss": Method({**_PLAIN, "loss_type": "dft"}),
    "L2, weight 0.1": Method(l2_weight=0.1),
    "L2, weight 1": Method(l2_weight=1.0),
    "LoRA": Method({**_PLAIN, **_LORA}, learning_rate_factor=10.0),
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
    "OGPSA update, per tensor": Method({"preset": "preserve", **_PER_TENSOR}),
    "OGPSA preserve": Method({"preset": "preserve"}),
    "OGPSA preserve, nll": Method({"preset": "preserve", "capability_loss": "nll"}),
    "OGPSA preserve, LoRA": Method({"preset": "preserve", **_LORA}, learning_rate_factor=10.0),
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


def stage_run(
    config: str,
    method: Method,
    *,
    model: Path,
    output: Path,
    learning_rate_factor: float = 1.0,
    num_steps: int = 1,
    seed: int = 0,
) -> RunArguments:
    """
    The arguments of one stage of training.

    Args:
        config: File of the stage, or the name of one that comes with the project.
        method: How to train.
        model: Folder of the model to start from.
        output: Folder for what the trainer writes.
        learning_rate_factor: On the learning rate of the file, beside the method's own.
        num_steps: Of the optimizer.
        seed: Of training.

    Raises:
        ValueError: As `parse_run`.
    """
    keys = {
        **method.keys,
        "model_name_or_path": model,
        "output_dir": output,
        "max_steps": num_steps,
        "seed": seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "run_report": False,
        "dataloader_drop_last": True,  # so that every step has equally many sequences
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    run = parse_run(["--config", config, *words])
    run.training.learning_rate *= learning_rate_factor * method.learning_rate_factor
    return run


def train(method: Method, run: RunArguments, output: Path, cost: Cost) -> None:
    """
    Train one stage, and save model and tokenizer.

    Args:
        method: How to train.
        run: The arguments; in DPO the model that they name is the reference model too.
        output: Folder for the trained model; an adapter is merged into it.
        cost: What the training takes is added to it.
    """
    trainer_class: Any = TRAINERS[run.train.stage]
    if method.l2_weight:
        trainer_class = type("L2Trainer", (L2ToStart, trainer_class), {"weight": method.l2_weight})

    def change_data(data: Data, tokenizer: Any) -> Data:
        if not method.mixed_share:
            return data
        return data._replace(train=mixed_data(method.mixed_share, run, data.train, tokenizer))

    trainer, _ = prepare(run, trainer_class=trainer_class, change_data=change_data)
    trainer.remove_callback(PrinterCallback)
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    with _counted([model for model in models if model is not None], cost):
        trainer.train()
    model: Any = trainer.model
    if run.model.use_peft:
        model = model.merge_and_unload()
    if method.kept_share < 1:
        first, _ = load_folder(str(run.model.model_name_or_path))
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), first.parameters(), strict=True):
                parameter.copy_(torch.lerp(old, parameter, method.kept_share))
    model.save_pretrained(output)
    trainer.processing_class.save_pretrained(output)


class L2ToStart(Trainer):
    """Adds `weight * |weights - starting weights|^2` to the loss of the trainer behind it."""

    weight: float
    start: list[Tensor] | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.model is not None
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.start is None:
            self.start = [parameter.detach().clone() for parameter in parameters]
        loss = super().training_step(*args, **kwargs)
        share = 2 * self.weight / self.args.gradient_accumulation_steps
        for parameter, start in zip(parameters, self.start, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - start, alpha=share)
        return loss


def mixed_data(share: float, run: RunArguments, safety: Dataset, tokenizer: Any) -> Dataset:
    """The safety data, with capability samples among them: a share of all."""
    groups: Any = load_groups(run.train.capability_datasets, "`capability_datasets`")
    preparation = Preparation(tokenizer, tokenizer, max_length=run.training.max_length)
    num_capability = round(len(safety) * share / (1 - share))
    # As many distinct samples as the others may draw from; each as often as the share asks for.
    wanted: dict[str, Any] = {"safety": (safety, len(safety), None)} | {
        name: (d, min(run.ogpsa.num_samples, len(d)), num_capability // len(groups))
        for name, d in groups.items()
    }
    rows: list[dict[str, Any]] = []
    for name, (dataset, num_samples, num_rows) in wanted.items():
        group = prepare_group(
            name, dataset, preparation,
            num_samples=num_samples, num_parts=1, batch_size=1, seed=run.training.seed,
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
def _counted(models: Sequence[PreTrainedModel], cost: Cost) -> Iterator[None]:
    """Count the sequences that go through the models within the block, and its time."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        num_sequences = inputs[0].shape[0]
        cost.forward += num_sequences
        cost.backward += num_sequences * torch.is_grad_enabled()

    embeddings = {id(e): e for m in models for e in [m.get_input_embeddings()]}
    handles = [embedding.register_forward_hook(count) for embedding in embeddings.values()]
    start = time.process_time()
    try:
        yield
    finally:
        cost.seconds += time.process_time() - start
        for handle in handles:
            handle.remove()
