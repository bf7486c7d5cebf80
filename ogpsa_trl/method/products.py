"""
What a projection measures of a step: its products with the basis, in the metric of the optimizer.

Shapes: P parameters, K basis rows, N entries of a parameter on this process, B blocks (P of them in
scope "parameter", 1 in scope "model").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.tensors import matrices, vectors
from ogpsa_trl.tensors.blocks import Workspace

TINY = torch.finfo(torch.float32).tiny


@dataclass
class Products:
    """Products of a vector v with the basis B and with itself, in a metric D, over all shards."""

    with_rows_BK: Tensor  # B v
    squares_P: Tensor  # v v^T of every parameter
    square: Tensor  # and of all
    gram_BKK: Tensor  # B D B^T
    metric_squares_P: Tensor  # v D^-1 v^T of every parameter
    metric_square: Tensor  # and of all
    rates_P: Tensor | None  # Factors of D; None where it is the identity


def measure(
    subspace: CapabilitySubspace,
    vectors_P: Sequence[vectors.Vector | None],
    metrics: Sequence[vectors.AdamMetric | None] | None = None,
    rates_P: Tensor | None = None,
) -> Products:
    """
    The products of the vectors of all parameters with the basis and with themselves, in a metric. A
    collective call, and all that a projection sends.

    Args:
        subspace: The subspace.
        vectors_P: The gradient, or the update, of each parameter.
        metrics: Adam's metric for each parameter. `None`: the identity.
        rates_P: The factors of an update's metric. `None`: the identity.
    """
    num_rows = subspace.inverse_gram.shape[-1]
    workspace = Workspace()
    numbers = [
        None
        if vector_N is None
        else vectors.products(
            rows_KN, vector_N, None if metrics is None else metrics[index], workspace
        )
        for index, (rows_KN, vector_N) in enumerate(zip(subspace.basis, vectors_P, strict=True))
    ]
    # With the identity as metric the basis alone gives the rest.
    width = vectors.num_products(num_rows, has_metric=metrics is not None)
    table_PX = matrices.table(numbers, width, subspace.backend.device)
    table_PX = subspace.backend.sum_over_shards(table_PX)
    of_each = vectors.Products.from_table(table_PX, num_rows)
    with_rows_BK = subspace.merge(of_each.with_rows_PK)
    squares_P, square = of_each.square_P, of_each.square_P.sum().clamp_min(TINY)
    if rates_P is None:
        return Products(with_rows_BK, squares_P, square, subspace.gram, squares_P, square, None)
    # What the optimizer did not move is not moved.
    rates_P = torch.where(squares_P > 0, rates_P, 0.0)
    gram_PKK, inverse_squares_P = subspace.gram_PKK, squares_P
    if of_each.gram_PKK is not None and of_each.inverse_square_P is not None:
        gram_PKK, inverse_squares_P = of_each.gram_PKK, of_each.inverse_square_P
    # Where D is zero nothing was moved, or no gradient has come yet.
    metric_squares_P = torch.where(
        (rates_P > 0) & inverse_squares_P.isfinite(), inverse_squares_P / rates_P, 0.0
    )
    return Products(
        with_rows_BK,
        squares_P,
        square,
        subspace.merge(rates_P[:, None, None] * gram_PKK),
        metric_squares_P,
        metric_squares_P.sum().clamp_min(TINY),
        rates_P,
    )


def relative_rates(backend: GradientBackend) -> Tensor:
    """The learning rates, relative to the largest: a common factor changes no projection."""
    rates_P = torch.tensor(backend.learning_rates(), device=backend.device)
    return rates_P / rates_P.max().clamp_min(TINY)


def adam_metrics(subspace: CapabilitySubspace) -> list[vectors.AdamMetric | None] | None:
    """
    Adam's metric for each parameter, from one reading of its state: entries that are stored in 8
    bits are held in 32 until the step has ended. None where no gradient has left a second moment.
    """
    backend = subspace.backend
    moments = [backend.second_moment(parameter) for _, parameter in backend.parameters]
    sums = [None if moment_N is None else moment_N.sum()[None] for moment_N in moments]
    sums_PX = backend.sum_over_shards(matrices.table(sums, 1, backend.device))
    totals_PX = torch.tensor([[max(shard.total, 1)] for shard in backend.shards])
    means_P = backend.same_on_all((sums_PX / totals_PX.to(backend.device)).flatten())
    if not means_P.any():
        return None
    floors_P = vectors.adam_floors(means_P)
    nothing = floors_P.new_zeros(())  # where it is missing the floor is infinite
    return [
        vectors.AdamMetric(nothing.expand(shard.size) if moment_N is None else moment_N, floor)
        for moment_N, shard, floor in zip(moments, backend.shards, floors_P, strict=True)
    ]
