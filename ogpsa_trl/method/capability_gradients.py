"""
Capability gradients: the gradient of the mean loss of every part of every capability group.

They come through the engine's own forward and backward pass, so they have the sharding, the dtype
and the averaging of training gradients, and they leave nothing behind in training.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ogpsa_trl.data.groups import Batch, Part
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.tensors import gradient_rows
from ogpsa_trl.tensors.blocks import Workspace


@dataclass
class CapabilityGradients:
    """
    Gradients of R parts over P parameters.

    Attributes:
        rows: Per parameter this process's shards, shape [R, N]; `None` where the parameter took
            part in no loss.
        losses: Token-mean loss of every part, in nats, over the batches of all processes. NaN where
            it was not its turn.
        names: Name of the group of every part.
        weights: Share of every part in the mean over all groups, shape [R], float64, sum 1. A group
            counts once, however many parts it has; a part of it counts by its tokens.
        is_kept: Of every part, whether its new gradient was not finite, so that the row is still
            the old one.
        is_resting: Of every part, whether it was not its turn, so that the row is the old one.
    """

    rows: list[Tensor | None]
    losses: list[float]
    names: list[str]
    weights: Tensor
    is_kept: list[bool]
    is_resting: list[bool]

    @property
    def mean_weights(self) -> Tensor:
        """Share of every part in the mean gradient of those whose turn it is, shape [R], sum 1."""
        weights_R = torch.where(torch.tensor(self.is_resting), 0.0, self.weights)
        return weights_R / weights_R.sum()

    def lost(self, was_lost: Sequence[bool]) -> list[bool]:
        """Of every part, whether its gradient was not finite when it had its last turn."""
        before = was_lost if len(was_lost) == len(self.names) else [False] * len(self.names)
        turns = zip(self.is_resting, before, self.is_kept, strict=True)
        return [was if rests else is_kept for rests, was, is_kept in turns]

    def check_finite(self, *, is_first: bool, was_lost: Sequence[bool]) -> None:
        """
        Refuse gradients that make no basis.

        Args:
            is_first: There are no older ones.
            was_lost: `lost` of the refresh before.

        Raises:
            FloatingPointError: one is not finite in the first refresh, or all are in a later one.
        """
        if not any(self.is_kept) or not (is_first or all(self.lost(was_lost))):
            return
        row = self.is_kept.index(True)
        raise FloatingPointError(
            f"The gradient of capability group {self.names[row]!r} (loss {self.losses[row]:.4g}) "
            "is not finite, "
            + (
                "and there is no older one to keep. Check the samples of this group."
                if is_first
                else "nor is that of any other group. Training has diverged: lower "
                "`learning_rate`, and resume from an earlier checkpoint."
            )
        )


def capability_gradients(
    backend: GradientBackend,
    parts: Sequence[Part | None],
    sum_loss: Callable[[Batch], Tensor],
    old_rows: list[Tensor | None],
    *,
    names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    old_share: float = 0.0,
    rounding: float = 0.0,
) -> CapabilityGradients:
    """
    Compute the gradients of all parts. A collective call: every process makes it.

    Args:
        backend: Where the gradients live.
        parts: The parts of all groups; `None` where it is not the turn of one.
        sum_loss: The summed loss of the trainable tokens of a batch, a scalar with a graph, through
            the wrapped model.
        old_rows: The gradients so far, shape [R, N] per parameter. They are used up: the new ones
            are written in their memory, so that all are held once.
        names: Name of the group of every part. `None`: all parts are there.
        dtype: Of rows that are not there yet.
        old_share: How much of the old gradients stays in the new ones, in [0, 1).
        rounding: A token-mean loss, in nats, below which a loss is at its minimum but for rounding:
            the gradient then counts as zero.
    """
    rows, losses, is_kept, workspace = old_rows, [], [], Workspace()
    with backend.preserved(), deterministic(backend.wrapped_model):
        for row, part in enumerate(parts):
            if part is None:
                losses.append(math.nan)
                is_kept.append(False)
                continue
            batches = part.batches_of(backend.process_index, backend.num_processes)
            total = torch.zeros((), device=backend.device)
            for index, batch in enumerate(batches):
                with backend.accumulation(is_last=index == len(batches) - 1):
                    loss = sum_loss(batch)
                    # The engine averages over the processes; the mean over all tokens is meant.
                    backend.backward(loss * (backend.num_processes / part.num_tokens))
                total += loss.detach()
            losses.append((backend.sum_over_processes(total) / part.num_tokens).item())
            is_kept.append(not (math.isfinite(losses[-1]) and has_finite_gradients(backend)))
            if not is_kept[-1]:
                is_zero = losses[-1] < rounding
                for index, (_, parameter) in enumerate(backend.parameters):
                    gradient_N = None if is_zero else backend.gradient(parameter)
                    rows[index] = _with_row(
                        rows[index], row, len(parts), gradient_N, old_share, dtype, workspace
                    )
            backend.clear_gradients()
    names = [part.group for part in parts if part is not None] if names is None else list(names)
    is_resting = [part is None for part in parts]
    return CapabilityGradients(rows, losses, names, _weights(parts, names), is_kept, is_resting)


def has_finite_gradients(backend: GradientBackend) -> bool:
    """Whether the square of its length is finite in float32: up to 1.8e19. A collective call."""
    squares_P = torch.zeros(len(backend.parameters), 1, device=backend.device)
    for square, (_, parameter) in zip(squares_P, backend.parameters, strict=True):
        gradient_N = backend.gradient(parameter)
        if gradient_N is not None:
            square.copy_(gradient_rows.squared_length(gradient_N))
    return bool(backend.sum_over_shards(squares_P).sum().isfinite())


def group_means(
    names: Sequence[str], weights: Sequence[float], values: Sequence[float]
) -> dict[str, float]:
    """
    Means of values of every part, one for each group, weighted as their losses are.

    Args:
        names: Name of the group of every part.
        weights: As in `CapabilityGradients`.
        values: One for every part.
    """
    sums = dict.fromkeys(names, 0.0)
    totals = dict(sums)
    for name, weight, value in zip(names, weights, values, strict=True):
        sums[name] += weight * value
        totals[name] += weight
    return {name: sums[name] / totals[name] for name in sums}


def _weights(parts: Sequence[Part | None], names: Sequence[str]) -> Tensor:
    """Parts of a group whose turn it is not count alike."""
    sizes = [1 if part is None else part.num_tokens for part in parts]
    num_tokens = dict.fromkeys(names, 0)
    for name, size in zip(names, sizes, strict=True):
        num_tokens[name] += size
    shares = [size / num_tokens[name] for name, size in zip(names, sizes, strict=True)]
    return torch.tensor(shares, dtype=torch.float64) / len(num_tokens)


def _with_row(
    rows_RN: Tensor | None,
    row: int,
    num_rows: int,
    gradient_N: Tensor | None,
    old_share: float,
    dtype: torch.dtype,
    workspace: Workspace,
) -> Tensor | None:
    """Write a gradient into its row, in a tensor made at the first gradient that is there."""
    if gradient_N is None:
        if rows_RN is not None:
            rows_RN[row] *= old_share
        return rows_RN
    if rows_RN is None:
        rows_RN = gradient_N.new_zeros(num_rows, len(gradient_N), dtype=dtype)
    gradient_rows.mix_(rows_RN[row], gradient_N, old_share, workspace)
    return rows_RN


@contextlib.contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """
    Take the modules out of training mode, so that dropout, embedding noise and router jitter rest.

    Where a graph is made, modules under gradient checkpointing stay in it: they checkpoint in
    training mode only. What they drop out in their own `forward`, not in a submodule (as OPT's
    layers do), is then random.

    Layers of bitsandbytes stay in it too. Nothing in them is random, and outside of it, on a CPU
    with AVX512-BF16, those of 4 bits pack their weights into a form for inference, through which
    no gradient passes (0.50).
    """
    modes = [(module, module.training) for module in model.modules()]
    has_graph = torch.is_grad_enabled()
    try:
        for module, _ in modes:
            is_checkpointed = getattr(module, "gradient_checkpointing", False)
            is_quantised = type(module).__module__.startswith("bitsandbytes.")
            module.training = is_quantised or (has_graph and bool(is_checkpointed))
        yield
    finally:
        for module, mode in modes:
            module.training = mode
