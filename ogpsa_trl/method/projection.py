"""
Projection: what a step loses, so that it changes no capability loss, to first order.

    p = B v                      summed over shards: all that a step sends
    v <- v - D B^T w             w from p, C and H = B D B^T (`constraints`)

v is the gradient or the optimizer's update, B the basis of the capability subspace, D the identity
or the optimizer's metric, C the coordinates of the capability gradients. With D the identity
w = H^-1 p, and H is the identity up to the rounding of B.

Of an update D is the learning rate of each parameter, divided in Adam's metric by the root of the
second moment: what the optimizer moves little, a correction moves little, and what it did not move
stays where it is.

Shapes: P parameters, R capability gradients, K basis rows, N entries of a parameter on this
process, B blocks (P of them in scope "parameter", 1 in scope "model").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.tensors import constraints, matrices, vectors

_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Projection:
    """What a projection did, as tensors on the device, so that a step need not wait for them."""

    # Share of the squared length, in the metric, that was removed, in [0, 1].
    removed_fraction: Tensor
    # Share of the squared length that was in the subspace before, in [0, 1].
    share_inside: Tensor
    # With the mean capability gradient, before the projection, in [-1, 1] (where `rank` drops
    # directions: with the part of the mean that is kept).
    cosine: Tensor
    # Names of the parameters held in this step.
    held: list[str]
    # Of an update: what is left of it should change each capability loss by, in nats, shape [R].
    changes: Tensor | None = None
    restoration: "Restoration | None" = None


@dataclass
class Restoration:
    """How long a correction is relative to the rest of the update, and whether the cap binds."""

    ratio: Tensor
    is_capped: Tensor


@dataclass
class _Products:
    """Products of a vector v with the basis B and with itself, in a metric D, over all shards."""

    with_rows_BK: Tensor  # B v
    squares_P: Tensor  # v v^T of every parameter
    square: Tensor  # and of all
    gram_BKK: Tensor  # B D B^T
    metric_squares_P: Tensor  # v D^-1 v^T of every parameter
    metric_square: Tensor  # and of all
    rates_P: Tensor | None  # Factors of D; None where it is the identity


@torch.no_grad()
def project(subspace: CapabilitySubspace) -> Projection | None:
    """
    Take its component in the subspace from the gradient, in place. A collective call.

    Returns:
        What it did; `None` where the gradient, or the square of its length, is not finite. It is
        then as it was.

    Raises:
        RuntimeError: this process has no gradient of any parameter.
    """
    backend = subspace.backend
    gradients = [backend.gradient(parameter) for _, parameter in backend.parameters]
    if all(g is None for g in gradients) and any(shard.size for shard in backend.shards):
        raise RuntimeError(
            f"No parameter has a gradient on process {backend.process_index}, so this "
            "step would not be projected. Check that the loss depends on trained parameters; "
            "if it does, please report the engine and its version."
        )
    products = _products(subspace, gradients)
    if not products.square.isfinite():
        return None
    return _project(subspace, gradients, products)


@torch.no_grad()
def copy_weights(subspace: CapabilitySubspace) -> list[Tensor]:
    """This process's shards of the weights, copied: what `project_update` compares with."""
    backend = subspace.backend
    return [backend.weights(parameter).clone() for _, parameter in backend.parameters]


@torch.no_grad()
def project_update(subspace: CapabilitySubspace, weights_before: list[Tensor]) -> Projection:
    """
    Take from what the optimizer did since `copy_weights` what changes a capability loss. A
    collective call.

    Args:
        subspace: The subspace.
        weights_before: The copied weights.

    Raises:
        ValueError: in the first step, that the optimizer would take the correction back.
    """
    if not subspace.is_optimizer_checked:
        subspace.backend.check_no_copy(weights_before)
        subspace.is_optimizer_checked = True
    updates = _updates(subspace, weights_before)
    metrics = _metrics(subspace) if subspace.config.metric == "optimizer" else None
    products = _products(subspace, updates, metrics, _relative_rates(subspace.backend))
    projection = _project(subspace, updates, products, metrics)
    subspace.backend.publish_weights()
    return projection


@torch.no_grad()
def measure_update(
    subspace: CapabilitySubspace, weights_before: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """
    Look at the update since `copy_weights`. A collective call.

    Returns:
        The share of its squared length that lies in the subspace, in [0, 1]; and what it should
        change each capability loss by, to first order, in nats, shape [R].
    """
    products = _products(subspace, _updates(subspace, weights_before))
    inside = matrices.square(products.with_rows_BK, subspace.inverse_gram)
    return inside / products.square, _changes(subspace, products.with_rows_BK)


def _updates(
    subspace: CapabilitySubspace, weights_before: list[Tensor]
) -> list[vectors.Difference]:
    """What the optimizer did to the weights of each parameter."""
    backend = subspace.backend
    weights = [backend.weights(parameter) for _, parameter in backend.parameters]
    return list(map(vectors.Difference, weights, weights_before))


def _project(
    subspace: CapabilitySubspace,
    vectors_P: Sequence[vectors.Vector | None],
    products: _Products,
    metrics: Sequence[vectors.AdamMetric | None] | None = None,
) -> Projection:
    """Find what the vectors of all parameters have to lose, and take it from them."""
    config, backend = subspace.config, subspace.backend
    weights_BK = _weights(subspace, products)
    removed = matrices.square(weights_BK, products.gram_BKK)
    restoration = None
    if config.restoration:
        restoring_BK, restoration = _restoring(subspace, products, weights_BK)
        weights_BK = weights_BK + restoring_BK
    weights_BK = backend.same_on_all(weights_BK)
    changes = None
    if products.rates_P is not None:  # an update
        left_BK = products.with_rows_BK - matrices.times(products.gram_BKK, weights_BK)
        changes = _changes(subspace, left_BK)
        subspace.count_step(changes)
    weights_PK = weights_BK.expand(len(vectors_P), -1)
    if products.rates_P is not None:
        weights_PK = products.rates_P[:, None] * weights_PK
    for index, (rows_KN, vector_N, weights_K) in enumerate(
        zip(subspace.basis, vectors_P, weights_PK, strict=True)
    ):
        if rows_KN is None or vector_N is None:
            continue
        metric = None if metrics is None else metrics[index]
        vectors.subtract_(vector_N, rows_KN, weights_K, metric)
    held = _hold(subspace, vectors_P, products.squares_P)

    if held:
        removed = removed + products.metric_squares_P[held].sum()
    inside_BK = matrices.times(subspace.inverse_gram, products.with_rows_BK)
    inside = (inside_BK * products.with_rows_BK).sum()
    in_mean = (inside_BK * subspace.mean_coordinates).sum()
    return Projection(
        removed_fraction=(removed / products.metric_square).clamp(0, 1),
        share_inside=inside / products.square,
        # Of two squares the product might not fit into float32.
        cosine=in_mean / (products.square.sqrt() * subspace.mean_square.sqrt()).clamp_min(_TINY),
        held=[backend.parameters[index][0] for index in held],
        changes=changes,
        restoration=restoration,
    )


def _products(
    subspace: CapabilitySubspace,
    vectors_P: Sequence[vectors.Vector | None],
    metrics: Sequence[vectors.AdamMetric | None] | None = None,
    rates_P: Tensor | None = None,
) -> _Products:
    """
    The products of the vectors of all parameters with the basis and with themselves, in a metric.

    Args:
        subspace: The subspace.
        vectors_P: The gradient, or the update, of each parameter.
        metrics: Adam's metric for each parameter. `None`: the identity.
        rates_P: The factors of an update's metric. `None`: the identity.
    """
    num_rows = subspace.inverse_gram.shape[-1]
    numbers = [
        None
        if vector_N is None
        else vectors.products(rows_KN, vector_N, None if metrics is None else metrics[index])
        for index, (rows_KN, vector_N) in enumerate(zip(subspace.basis, vectors_P, strict=True))
    ]
    # With the identity as metric the basis alone gives the rest.
    width = vectors.num_products(num_rows, has_metric=metrics is not None)
    table_PX = matrices.table(numbers, width, subspace.backend.device)
    table_PX = subspace.backend.sum_over_shards(table_PX)  # all that a projection sends
    of_each = vectors.Products.from_table(table_PX, num_rows)
    with_rows_BK = subspace.merge(of_each.with_rows_PK)
    squares_P, square = of_each.square_P, of_each.square_P.sum().clamp_min(_TINY)
    if rates_P is None:
        return _Products(with_rows_BK, squares_P, square, subspace.gram, squares_P, square, None)
    # What the optimizer did not move is not moved.
    rates_P = torch.where(squares_P > 0, rates_P, 0.0)
    gram_PKK, inverse_squares_P = subspace.gram_PKK, squares_P
    if of_each.gram_PKK is not None and of_each.inverse_square_P is not None:
        gram_PKK, inverse_squares_P = of_each.gram_PKK, of_each.inverse_square_P
    # Where D is zero nothing was moved, or no gradient has come yet.
    metric_squares_P = torch.where(
        (rates_P > 0) & inverse_squares_P.isfinite(), inverse_squares_P / rates_P, 0.0
    )
    return _Products(
        with_rows_BK,
        squares_P,
        square,
        subspace.merge(rates_P[:, None, None] * gram_PKK),
        metric_squares_P,
        metric_squares_P.sum().clamp_min(_TINY),
        rates_P,
    )


def _weights(subspace: CapabilitySubspace, products: _Products) -> Tensor:
    """The weights of the basis rows that a step has to lose, shape [B, K]."""
    if products.rates_P is None:  # nothing leaves the device
        return matrices.times(subspace.inverse_gram, products.with_rows_BK)
    weights_BK = constraints.equality_weights(products.with_rows_BK.cpu(), products.gram_BKK.cpu())
    return subspace.small(weights_BK)


def _changes(subspace: CapabilitySubspace, products_BK: Tensor) -> Tensor:
    """First-order changes A u of the losses, from the products B u, shape [R]."""
    return matrices.times(subspace.coordinates, products_BK).sum(dim=0)


def _restoring(
    subspace: CapabilitySubspace, products: _Products, removal_BK: Tensor
) -> tuple[Tensor, Restoration]:
    """Weights that take back a part of the rise of each capability loss, shape [B, K]."""
    config = subspace.config
    weights_BK, square = constraints.restoration_weights(
        config.restoration * subspace.share_of_step() * subspace.drift.clamp_min(0).cpu(),
        products.gram_BKK.cpu(),
        subspace.coordinates.cpu(),
    )
    weights_BK, length = subspace.small(weights_BK), subspace.small(square).clamp_min(0).sqrt()
    rest = (
        (
            products.metric_square
            - 2 * (removal_BK * products.with_rows_BK).sum()
            + matrices.square(removal_BK, products.gram_BKK)
        )
        .clamp_min(0)
        .sqrt()
    )
    scale = (config.restoration_cap * rest / length.clamp_min(_TINY)).clamp_max(1)
    ratio = scale * length / rest.clamp_min(_TINY)
    return scale * weights_BK, Restoration(ratio, (scale < 1).float())


def _relative_rates(backend: GradientBackend) -> Tensor:
    """The learning rates, relative to the largest: a common factor changes no projection."""
    rates_P = torch.tensor(backend.learning_rates(), device=backend.device)
    return rates_P / rates_P.max().clamp_min(_TINY)


def _metrics(subspace: CapabilitySubspace) -> list[vectors.AdamMetric | None] | None:
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


def _hold(
    subspace: CapabilitySubspace, vectors_P: Sequence[vectors.Vector | None], squares_P: Tensor
) -> list[int]:
    """Let waiting parameters that would move stay where they are; ask for a refresh."""
    waiting = subspace.is_waiting.nonzero().flatten().tolist()
    if not waiting:  # the common case: nothing is read back from the device
        return []
    is_moving = (squares_P[waiting] > 0).tolist()
    held = [index for index, moves in zip(waiting, is_moving, strict=True) if moves]
    for index in held:
        vector_N = vectors_P[index]
        if vector_N is not None:
            vector_N.zero_()
    subspace.was_held[held] = True
    subspace.is_due = subspace.is_due or bool(held)
    return held
