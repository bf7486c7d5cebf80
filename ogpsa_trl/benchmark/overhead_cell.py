"""
Times one cell of the overhead benchmark: a model, a setting of OGPSA and an engine.

    python -m ogpsa_trl.benchmark.overhead_cell '{"size": "10M", "target": "gradient"}' OUTPUT.json

`ogpsa benchmark overhead` launches it in a process of its own for every cell: memory that one cell
leaves behind would count in the next.
"""

import argparse
import gc
import json
import logging
import os
import resource
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_config import SFTConfig

from ogpsa_trl import OGPSAConfig, OGPSASFTTrainer, SubspaceCallback
from ogpsa_trl.benchmark.overhead_arms import Arms
from ogpsa_trl.benchmark.toy_model import toy_tokenizer
from ogpsa_trl.evaluation.json_files import write_json
from ogpsa_trl.method import projection
from ogpsa_trl.tensors import matrices

# Width, layers, heads, width of the feed-forward layers, words.
SIZES = {
    "1M": (128, 4, 4, 352, 1024),
    "10M": (320, 7, 5, 880, 4096),
    "34M": (512, 9, 8, 1408, 4096),
    "100M": (768, 13, 12, 2112, 4096),
    "0.5B": (1024, 28, 16, 3072, 32768),
    "1.5B": (1536, 36, 12, 6144, 32768),
}


LENGTH = 128  # tokens of every sample


@dataclass(frozen=True)
class Cell:
    """What is measured together."""

    size: str = "10M"  # of the model, from `SIZES`
    rank: int = 2  # number of capability gradients; up to two groups share them
    target: str = "gradient"
    scope: str = "model"
    metric: str = "euclidean"
    capability_loss: str = "nll"
    basis_dtype: str = "float32"
    accumulation: int = 1  # passes of a step
    tokens: int = 2048  # of a step on one process, over all its passes
    capability_samples: int = 16  # of a refresh, of all groups together
    engine: str = "single"  # launch file of accelerate, without its ending; `single` needs none
    repeats: int = 5  # measurements of everything

    @property
    def batch_size(self) -> int:
        """Sequences of a pass."""
        return max(self.tokens // LENGTH // self.accumulation, 1)

    @property
    def num_groups(self) -> int:
        """Capability groups."""
        return min(self.rank, 2)

    def config(self) -> OGPSAConfig:
        """The settings of OGPSA."""
        names: Any = ("target", "scope", "metric", "capability_loss", "basis_dtype")
        return OGPSAConfig.from_preset(
            "paper",
            **{name: getattr(self, name) for name in names},
            num_samples=self.capability_samples // self.num_groups,
            gradients_per_group=self.rank // self.num_groups,
            capability_batch_size=self.batch_size,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", type=json.loads)
    parser.add_argument("output", type=Path)
    parser.add_argument("--memory", choices=("plain", "ogpsa"), help="measure the peak of one arm")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("ogpsa_trl").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    cell = Cell(**args.cell)
    with tempfile.TemporaryDirectory() as folder:
        result = peak_memory(cell, args.memory, folder) if args.memory else timings(cell, folder)
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(args.output, result)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def make_trainer(cell: Cell, folder: str, num_steps: int) -> OGPSASFTTrainer:
    """A trainer on random tokens; samples all have the same length, so that passes compare."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    width, num_layers, num_heads, ffn, words = SIZES[cell.size]
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=ffn,
        tie_word_embeddings=True,
    )

    def random_rows(num_rows: int) -> Dataset:
        return Dataset.from_dict(
            {"input_ids": torch.randint(10, words, (num_rows, LENGTH)).tolist()}
        )

    per_step = cell.batch_size * cell.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    trainer = OGPSASFTTrainer(
        LlamaForCausalLM(config),
        args=SFTConfig(
            output_dir=folder, max_steps=num_steps, per_device_train_batch_size=cell.batch_size,
            gradient_accumulation_steps=cell.accumulation, learning_rate=1e-5, max_length=LENGTH,
            bf16=on_gpu, use_cpu=not on_gpu, dataloader_pin_memory=on_gpu,
            gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=random_rows(num_steps * per_step),
        processing_class=toy_tokenizer(),
        capability_dataset={
            f"group {g}": random_rows(cell.capability_samples // cell.num_groups)
            for g in range(cell.num_groups)
        },
        ogpsa_config=cell.config(),
    )  # fmt: skip
    trainer.remove_callback(SubspaceCallback)  # the arms decide
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def timings(cell: Cell, folder: str) -> dict[str, Any]:
    """Seconds of every arm, each an entry for every repeat; and the bytes that a step moves."""
    has_hooks = cell.engine == "single" and cell.target == "gradient"
    names = ["plain", "ogpsa", *(["hooks"] if has_hooks else [])]
    trainer = make_trainer(cell, folder, num_steps=(cell.repeats + 1) * (len(names) + 1))
    arms = Arms(trainer, names)
    num_parameters = sum(p.numel() for p in trainer.model.parameters())
    trainer.train()
    subspace = trainer.subspace
    return {
        "cell": asdict(cell),
        "parameters": num_parameters,
        "processes": trainer.accelerator.num_processes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "seconds": arms.seconds,
        "basis_bytes": subspace.basis_bytes,
        "bytes_moved": _bytes_of_a_step(trainer),
    }


def peak_memory(cell: Cell, arm: str, folder: str) -> dict[str, Any]:
    """
    Peak memory of this process, in bytes, over three steps, with refreshes or without.

    In two passes at least: a refresh adds up the gradients of several batches, and where training
    does too, both hold them beside the activations.
    """
    cell = replace(cell, accumulation=max(cell.accumulation, 2))
    trainer = make_trainer(cell, folder, num_steps=3)
    if arm == "plain":
        trainer.capability_groups = []
    else:
        trainer.add_callback(SubspaceCallback(trainer, refresh_interval=1))
    # Some MB of code, whatever the model, that a basis needs and plain training may not.
    matrices.orthonormal_weights(torch.eye(2)[None])
    matrices.inverse_gram(torch.eye(2)[None])
    gc.collect()
    trainer.train()
    if torch.cuda.is_available():
        return {"peak": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class CountedBytes(TorchDispatchMode):
    """Adds up the sizes of what operations read and write; those that only make a view are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            operands = tree_leaves((args, kwargs or {}, result))
            self.total += sum(t.nbytes for t in operands if isinstance(t, Tensor))
        return result


def _bytes_of_a_step(trainer: OGPSASFTTrainer) -> int:
    """
    Bytes that one more projection reads and writes on this process, counted by operation; zero
    where operations do not show: in engines that keep gradients elsewhere.
    """
    subspace, target = trainer.subspace, trainer.ogpsa_config.target
    if trainer.accelerator.num_processes > 1:
        return 0
    for _, parameter in subspace.backend.parameters:
        if parameter.grad is None:
            parameter.grad = torch.ones_like(parameter)
    subspace.is_fresh = True
    with CountedBytes() as counted:
        if target == "gradient":
            projection.project(subspace)
        else:
            projection.project_update(subspace, projection.copy_weights(subspace))
    return counted.total


if __name__ == "__main__":
    main()
