"""
Adam's second moment: which optimizers keep it, and how each stores it.

    torch, DeepSpeed   `exp_avg_sq`, a tensor of the parameter's shape; with `amsgrad` the step is
                       divided by the root of the largest so far instead, `max_exp_avg_sq`
    torchao            the same two, tensors that unpack themselves where they are quantised
    bitsandbytes       `state2`, float32, or codes of 8 bits: `qmap2` of the code, times the scale
                       of its block of 256, in `absmax2`

Neither torchao nor bitsandbytes is imported. Read in torch 2.13, deepspeed 0.19.8, torchao 0.18 and
bitsandbytes 0.50; tests/test_optimizers.py fails when they move.

Shapes: N entries that are asked for.
"""

import math
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Package -> classes whose step is divided by the root of a second moment (that of RAdam after its
# first steps). By package, as bitsandbytes names its classes as torch does; by exact class, as a
# subclass may step in another way.
_ADAM = {
    "torch": {"Adam", "AdamW", "NAdam", "RAdam"},
    "deepspeed": {"FusedAdam"},
    "torchao": {"".join(words) for words in product(("Adam", "AdamW"), ("4bit", "8bit", "Fp8"))},
    "bitsandbytes": {
        "".join(words) for words in product(("", "Paged"), ("Adam", "AdamW"), ("", "8bit", "32bit"))
    },
}
# Those that step along the gradient or its mean.
_NO_MOMENT = {"torch": {"SGD"}, "bitsandbytes": {"SGD", "SGD8bit", "SGD32bit"}}

# Values of `optim` that make them.
_SETTINGS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit",
    "paged_adamw_8bit", "paged_adamw_32bit",
)  # fmt: skip

_BITSANDBYTES_BLOCK = 256

# Packages whose optimizers make the weights anew in every step, from copies of their own.
_MAKES_WEIGHTS = {"schedulefree"}
# A state whose distance from the weights is a smaller share of their length is taken for a copy. A
# moment has the length of a gradient, and another direction.
_DISTANCE_OF_COPY = 0.1


def check_known(optimizer_class: type[Optimizer]) -> None:
    """
    Refuse optimizers of which it is not known what their step is divided by.

    Raises:
        ValueError: the class is none of those above.
    """
    if _is_one_of(_ADAM, optimizer_class) or _is_one_of(_NO_MOMENT, optimizer_class):
        return
    raise ValueError(
        "`metric: optimizer` reads the second moment of Adam as torch, torchao, bitsandbytes and "
        "DeepSpeed store it (and takes SGD, which has none, as `euclidean`), but the optimizer is "
        f"{_package(optimizer_class)}.{optimizer_class.__name__}. Set `optim` to one of "
        f"{', '.join(_SETTINGS)}, or `metric: euclidean`."
    )


def check_keeps_no_weights(optimizer_class: type[Optimizer]) -> None:
    """
    Refuse optimizers that would take a correction of the weights back in their next step.

    Raises:
        ValueError: the class is known to.
    """
    if _package(optimizer_class) in _MAKES_WEIGHTS:
        raise ValueError(_takes_back(optimizer_class, "of its own"))


def distances_from_weights(
    state: Mapping[str, Any], weights_N: Tensor, before_N: Tensor, *, start: int
) -> list[tuple[str, float, float]]:
    """
    Of every state that may be a copy of the weights: its name, its squared distance from them, and
    their squared length.

    Args:
        state: What the optimizer stores for the tensor that holds these weights.
        weights_N: The weights.
        before_N: What they were before the step. A state that is still the same is a memory of the
            start, as Prodigy has, and not what the next step begins from.
        start: Where they begin in that tensor.
    """
    size = len(weights_N)
    return [
        (name, (part_N.float() - weights_N).square().sum().item(), weights_N.square().sum().item())
        for name, value in state.items()
        if type(value) is Tensor and value.is_floating_point() and value.numel() >= start + size > 0
        for part_N in [value.reshape(-1)[start : start + size].to(weights_N.device)]
        if not torch.equal(part_N, before_N)
    ]


def check_no_copy(
    optimizer_class: type[Optimizer], distances: Iterable[tuple[str, float, float]]
) -> None:
    """
    Refuse an optimizer that stores a copy of the weights, after its first step.

    Args:
        optimizer_class: Its class.
        distances: `distances_from_weights` of all parameters.

    Raises:
        ValueError: it does.
    """
    if _package(optimizer_class) == "torch":  # none of them; ASGD only averages them
        return
    sums: dict[str, tuple[float, float]] = {}
    for name, distance, square in distances:
        old_distance, old_square = sums.get(name, (0.0, 0.0))
        sums[name] = old_distance + distance, old_square + square
    for name, (distance, square) in sums.items():
        if distance < _DISTANCE_OF_COPY**2 * square:
            raise ValueError(_takes_back(optimizer_class, f"in its state {name!r}"))


def _takes_back(optimizer_class: type[Optimizer], where: str) -> str:
    return (
        "`target: update` corrects the weights after the optimizer's step, but "
        f"{_package(optimizer_class)}.{optimizer_class.__name__} holds weights {where}, from which "
        "the next step makes them anew. Set `optim` to one of "
        f"{', '.join(_SETTINGS)}, or begin with `preset: paper`, which projects the gradient."
    )


def second_moment(
    optimizer_class: type[Optimizer], state: Mapping[str, Any], *, start: int, size: int
) -> Tensor | None:
    """
    Adam's running mean of squared gradients, of a range of the entries of one flattened tensor.

    Args:
        optimizer_class: One that `check_known` lets through.
        state: What the optimizer stores for the tensor; empty before its first step. Tensors of
            this process: a DTensor's own part of it.
        start: First entry.
        size: Number of entries.

    Returns:
        Shape [N], float32, on the device of the state; None before the first step, and of an
        optimizer without a second moment.
    """
    if not state or _is_one_of(_NO_MOMENT, optimizer_class):
        return None
    if _package(optimizer_class) == "bitsandbytes":
        return _of_bitsandbytes(state, start, size)
    key = "max_exp_avg_sq" if "max_exp_avg_sq" in state else "exp_avg_sq"
    return _unpacked(state[key].view(-1), start, size)


def _unpacked(moment: Tensor, start: int, size: int) -> Tensor:
    """Entries of a flat tensor, which may be one of torchao's: those can be cut between blocks."""
    if type(moment) is Tensor:  # small ones are not quantised
        return moment.narrow(0, start, size).float()
    block: int = moment.block_size  # pyright: ignore[reportAttributeAccessIssue]
    first, last = _blocks(start, size, block)
    blocks = moment[first * block : last * block].dequantize()
    return blocks.narrow(0, start - first * block, size)


def _of_bitsandbytes(state: Mapping[str, Any], start: int, size: int) -> Tensor:
    moment = state["state2"].view(-1)
    entries_N = moment.narrow(0, start, size)
    if moment.dtype == torch.float32:  # all with 32 bits, small ones with 8
        return entries_N
    block = _BITSANDBYTES_BLOCK
    codebook, scales = state["qmap2"], state["absmax2"]
    assert len(scales) == _blocks(0, len(moment), block)[1]
    codes_N = entries_N.to(codebook.device)  # torch takes a paged state for one of the CPU
    first, last = _blocks(start, size, block)
    scales_N = scales[first:last].repeat_interleave(block).narrow(0, start - first * block, size)
    return codebook.index_select(0, codes_N.int()).mul_(scales_N)


def _blocks(start: int, size: int, block: int) -> tuple[int, int]:
    """The first block that holds some of these entries, and the one after the last."""
    return start // block, math.ceil((start + size) / block)


def _is_one_of(known: Mapping[str, set[str]], optimizer_class: type[Optimizer]) -> bool:
    return optimizer_class.__name__ in known.get(_package(optimizer_class), ())


def _package(optimizer_class: type[Optimizer]) -> str:
    return optimizer_class.__module__.partition(".")[0]
