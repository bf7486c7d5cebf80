"""
Times one cell of the overhead benchmark: a model, a setting of OGPSA and an engine.

    python scripts/overhead_cell.py '{"size": "10M", "target": "gradient"}' OUTPUT.json

It is launched by benchmark_overhead.py, in a process of its own for every cell: memory that one
cell leaves behind would count in the next.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl.trainer.sft_config import SFTConfig

from ogpsa_trl import OGPSAConfig, OGPSASFTTrainer, SubspaceCallback
from ogpsa_trl.benchmark.toy_model import toy_tokenizer
from ogpsa_trl.method import projection
from ogpsa_trl.tensors import matrices
from ogpsa_trl.training import step

# Width, layers, heads, width of the feed-forward layers, words.
SIZES = {
    "1M": (128, 4, 4, 352, 1024),
    "10M": (320, 7, 5, 880, 4096),
    "34M": (512, 9, 8, 1408, 4096),
    "100M": (768, 13, 12, 2112, 4096),
    "0.5B": (1024, 28, 16, 3072, 32768),
    "1.5B": (1536, 36, 12, 6144, 32768),
}


@dataclass(frozen=True)
class Cell:
    """
    What is measured together.

    Attributes:
        size: Of the model, from `SIZES`.
        rank: Number of capability gradients; up to two groups share them.
        target: `gradient`, `update` or `none` (replay without a projection).
        scope: `parameter` or `model`.
        metric: `euclidean`, or with `target: update` `optimizer`.
        capability_loss: `nll` or `kl`.
        basis_dtype: `float32` or `bfloat16`.
        accumulation: Passes of a step.
        tokens: Of a step on one process, over all its passes.
        length: Tokens of every sample.
        capability_samples: Samples of a refresh, of all groups together.
        engine: The launch file of accelerate, without its ending; `single` needs none.
        repeats: Measurements of everything.
    """

    size: str = "10M"
    rank: int = 2
    target: str = "gradient"
    scope: str = "model"
    metric: str = "euclidean"
    capability_loss: str = "nll"
    basis_dtype: str = "float32"
    accumulation: int = 1
    tokens: int = 2048
    length: int = 128
    capability_samples: int = 16
    engine: str = "single"
    repeats: int = 5

    @property
    def batch_size(self) -> int:
        """Sequences of a pass."""
        return max(self.tokens // self.length // self.accumulation, 1)

    def config(self) -> OGPSAConfig:
        """The settings of OGPSA."""
        num_groups = min(self.rank, 2)
        return OGPSAConfig.from_preset(
            "paper",
            target=self.target,  # type: ignore[arg-type]
            scope=self.scope,  # type: ignore[arg-type]
            metric=self.metric,  # type: ignore[arg-type]
            capability_loss=self.capability_loss,  # type: ignore[arg-type]
            basis_dtype=self.basis_dtype,  # type: ignore[arg-type]
            replay_weight=float(self.target == "none"),
            num_samples=self.capability_samples // num_groups,
            gradients_per_group=self.rank // num_groups,
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
        args.output.write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def model_config(size: str) -> LlamaConfig:
    """The architecture of a size."""
    width, num_layers, num_heads, ffn, words = SIZES[size]
    return LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=ffn,
        tie_word_embeddings=True,
    )


def make_trainer(cell: Cell, folder: str, num_steps: int) -> OGPSASFTTrainer:
    """A trainer on random tokens; samples all have the same length, so that passes compare."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = model_config(cell.size)

    def random_rows(num_rows: int) -> Dataset:
        ids = torch.randint(10, config.vocab_size, (num_rows, cell.length)).tolist()
        return Dataset.from_dict({"input_ids": ids})

    num_groups = min(cell.rank, 2)
    per_step = cell.batch_size * cell.accumulation * num_processes
    trainer = OGPSASFTTrainer(
        LlamaForCausalLM(config),
        args=SFTConfig(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=cell.batch_size,
            gradient_accumulation_steps=cell.accumulation,
            learning_rate=1e-5,
            max_length=cell.length,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=on_gpu,
        ),
        train_dataset=random_rows(num_steps * per_step),
        processing_class=toy_tokenizer(),
        capability_dataset={
            f"group {g}": random_rows(cell.capability_samples // num_groups)
            for g in range(num_groups)
        },
        ogpsa_config=cell.config(),
    )
    trainer.remove_callback(SubspaceCallback)  # the arms decide
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Arms(TrainerCallback):
    """
    Gives every optimizer step to an arm in turn, and times them all.

        plain    TRL's own step; its forward and backward passes are timed apart
        ogpsa    with a projection or a replay, without a refresh
        hooks    plain, with the basis moved in from the host for every parameter and pass

    A refresh is made and timed before each round. The step after it is not counted, nor is the
    first round: both find the memory in another state. The arms take turns in going first.

    Args:
        trainer: The trainer; the callback is added to it.
        names: The arms of a round.
    """

    def __init__(self, trainer: OGPSASFTTrainer, names: Sequence[str]) -> None:
        self.trainer = trainer
        self.names = list(names)
        self.groups = trainer.capability_groups
        self.seconds: dict[str, list[float]] = {
            name: [] for name in (*names, "refresh", "basis", "forward and backward", "projection")
        }
        self.steps_per_round = len(names) + 1
        self.stack = contextlib.ExitStack()  # of a step
        self.clocks = contextlib.ExitStack()  # of the run
        self.is_counting = True
        self.arm = ""
        self.start = self.passes = self.projection = self.basis = 0.0
        self.clocks.enter_context(timed_calls(trainer, "training_step", self._add_pass))
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        round_, place = divmod(state.global_step, self.steps_per_round)
        if state.global_step == 0:
            for name in ("project", "copy_weights", "project_update"):
                self.clocks.enter_context(timed_calls(step, name, self._add_projection))
            subspace = self.trainer.subspace
            self.clocks.enter_context(timed_calls(subspace, "replay", self._add_projection))
            for name in ("release_gradients", "refresh"):
                self.clocks.enter_context(timed_calls(subspace, name, self._add_basis))
        self.is_counting = round_ > 0
        self.arm = self.names[(round_ + place) % len(self.names)]
        if place == 0:
            self.trainer.capability_groups = self.groups
            self.basis = 0.0
            self._add("refresh", _timed(self.trainer.refresh_subspace))
            self._add("basis", self.basis)
            self.is_counting = False
        self.trainer.capability_groups = self.groups if self.arm == "ogpsa" else []
        self.trainer.subspace.is_fresh = True  # replay adds what the last refresh found
        if self.arm == "hooks":
            self.stack.enter_context(host_hooks(self.trainer))
        self.passes = self.projection = 0.0
        self.start = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._add(self.arm, _now() - self.start)
        self.stack.close()
        if self.arm == "plain":
            self._add("forward and backward", self.passes)
        if self.arm == "ogpsa":
            self._add("projection", self.projection)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.clocks.close()

    def _add(self, name: str, seconds: float) -> None:
        if self.is_counting:
            self.seconds[name].append(seconds)

    def _add_pass(self, seconds: float) -> None:
        self.passes += seconds

    def _add_basis(self, seconds: float) -> None:
        self.basis += seconds

    def _add_projection(self, seconds: float) -> None:
        self.projection += seconds


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
        "device": _device_name(),
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
    _load_lapack()
    gc.collect()
    trainer.train()
    if torch.cuda.is_available():
        return {"peak": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _load_lapack() -> None:
    """Some MB of code, whatever the model, that a basis needs and plain training may not."""
    gram_RR = torch.eye(2)
    matrices.orthonormal_weights(gram_RR[None])
    matrices.inverse_gram(gram_RR[None])


@contextlib.contextmanager
def host_hooks(trainer: OGPSASFTTrainer) -> Iterator[None]:
    """
    What the published code does: whole rows of the basis on the host, moved to the device for
    every parameter in every backward pass, and the gradient of that pass projected.
    """
    handles = []
    pairs = zip(trainer.subspace.backend.parameters, trainer.subspace.basis, strict=True)
    for (_, parameter), rows_KN in pairs:
        if rows_KN is None:
            continue
        host_KN = rows_KN.cpu().pin_memory() if rows_KN.is_cuda else rows_KN.clone()

        def project(gradient: Tensor, host_KN: Tensor = host_KN) -> Tensor:
            rows_KN = host_KN.to(gradient.device)
            flat_N = gradient.reshape(-1)
            return (flat_N - rows_KN.T @ (rows_KN @ flat_N)).view_as(gradient)

        handles.append(parameter.register_hook(project))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class CountedBytes(TorchDispatchMode):
    """Adds up the sizes of what operations read and write; those that only make a view are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
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
        subspace.replay()
        if target == "gradient":
            projection.project(subspace)
        elif target == "update":
            projection.project_update(subspace, projection.copy_weights(subspace))
    return counted.total


@contextlib.contextmanager
def timed_calls(owner: Any, name: str, add: Callable[[float], None]) -> Iterator[None]:
    """Put a clock around a method, or a function of a module, within the block."""
    method = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = _now()
        result = method(*args, **kwargs)
        add(_now() - start)
        return result

    with mock.patch.object(owner, name, timed):
        yield


def _timed(call: Callable[[], object]) -> float:
    start = _now()
    call()
    return _now() - start


def _now() -> float:
    """Seconds, after all that the device was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
