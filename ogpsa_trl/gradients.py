"""
Capability gradients: the gradient of the mean loss of every part of every capability group.

They come through the engine's own forward and backward pass, so they have the sharding, the dtype
and the averaging of training gradients, and they leave nothing behind in training.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ogpsa_trl.backends import GradientBackend
from ogpsa_trl.data import Batch, CapabilityGroup


@dataclass
class CapabilityGradients:
    """
    Gradients of R parts over P parameters.

    Attributes:
        rows: Per parameter this process's shards, shape [R, N], float32; `None` where the
            parameter took part in no loss.
        losses: Token-mean loss of every part, in nats, over the batches of all processes.
        names: Name of the group of every part.
        weights: Share of every part in the mean capability gradient, shape [R], float64, sum 1. A
            group counts once, however many parts it has; a part of it counts by its tokens.
    """

    rows: list[Tensor | None]
    losses: list[float]
    names: list[str]
    weights: Tensor

    def group_means(self, values: Sequence[float]) -> dict[str, float]:
        """Means over the parts of every group, weighted as their losses are."""
        parts = list(zip(self.names, values, self.weights.tolist(), strict=True))
        return {
            group: sum(value * weight for name, value, weight in parts if name == group)
            / sum(weight for name, _, weight in parts if name == group)
            for group in dict.fromkeys(self.names)
        }


def capability_gradients(
    backend: GradientBackend,
    groups: Sequence[CapabilityGroup],
    sum_nll: Callable[[Batch], Tensor],
) -> CapabilityGradients:
    """
    Compute the gradients of all parts of the groups. A collective call: every process makes it.

    Args:
        backend: Where the gradients live.
        groups: The capability groups.
        sum_nll: The summed negative log-likelihood of the trainable tokens of a batch, a scalar
            with a graph, through the wrapped model.
    """
    parts = [part for group in groups for part in group.parts]
    shares = [part.num_tokens / group.num_tokens for group in groups for part in group.parts]
    names = [group.name for group in groups for _ in group.parts]
    rows: list[Tensor | None] = [None] * len(backend.parameters)
    losses: list[float] = []
    with backend.preserved(), _deterministic(backend.wrapped_model):
        for row, part in enumerate(parts):
            batches = part.batches_of(backend.process_index, backend.num_processes)
            total = torch.zeros((), device=backend.device)
            for index, batch in enumerate(batches):
                with backend.accumulation(is_last=index == len(batches) - 1):
                    nll = sum_nll(batch)
                    # The engine averages over the processes; the mean over all tokens is meant.
                    backend.backward(nll * (backend.num_processes / part.num_tokens))
                total += nll.detach()
            losses.append((backend.sum_over_processes(total) / part.num_tokens).item())
            for index, (_, parameter) in enumerate(backend.parameters):
                rows[index] = _with_row(rows[index], row, len(parts), backend.gradient(parameter))
            backend.clear_gradients()
    weights = torch.tensor(shares, dtype=torch.float64) / len(groups)
    return CapabilityGradients(rows, losses, names, weights)


def _with_row(
    rows_RN: Tensor | None, row: int, num_rows: int, gradient_N: Tensor | None
) -> Tensor | None:
    """Write a gradient into its row, in a tensor made at the first gradient that is there."""
    if gradient_N is None:
        return rows_RN
    if rows_RN is None:
        rows_RN = gradient_N.new_zeros(num_rows, len(gradient_N), dtype=torch.float32)
    rows_RN[row] = gradient_N
    return rows_RN


@contextlib.contextmanager
def _deterministic(model: nn.Module) -> Iterator[None]:
    """
    Take the modules out of training mode, so that dropout, embedding noise and router jitter rest.

    Modules under gradient checkpointing stay in it: they checkpoint in training mode only. What
    they drop out in their own `forward`, not in a submodule (as OPT's layers do), stays random.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        yield
    finally:
        for module, mode in modes:
            module.training = mode
