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

from ogpsa_trl.method.products import TINY, Products, adam_metrics, measure, relative_rates
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.tensors import constraints, matrices, vectors
from ogpsa_trl.tensors.blocks import Workspace


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
    products = measure(subspace, gradients)
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
    metrics = adam_metrics(subspace) if subspace.config.metric == "optimizer" else None
    products = measure(subspace, updates, metrics, relative_rates(subspace.backend))
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
    products = measure(subspace, _updates(subspace, weights_before))
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
    products: Products,
    metrics: Sequence[vectors.AdamMetric | None] | None = None,
) -> Projection:
    """Find what the vectors of all parameters have to lose, and take it from them."""
    backend, is_update = subspace.backend, products.rates_P is not None
    weights_BK = _removal(subspace, products)
    removed = matrices.square(weights_BK, products.gram_BKK)
    restoration = None
    if subspace.config.restoration:
        restoring_BK, restoration = _restoring(subspace, products, weights_BK)
        weights_BK = weights_BK + restoring_BK
    weights_BK = backend.same_on_all(weights_BK)
    _subtract(subspace, vectors_P, weights_BK, products.rates_P, metrics)
    changes = None
    if is_update:
        left_BK = products.with_rows_BK - matrices.times(products.gram_BKK, weights_BK)
        changes = _changes(subspace, left_BK)
        subspace.history.count_step(changes)
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
        cosine=in_mean / (products.square.sqrt() * subspace.mean_square.sqrt()).clamp_min(TINY),
        held=[backend.parameters[index][0] for index in held],
        changes=changes,
        restoration=restoration,
    )


def _removal(subspace: CapabilitySubspace, products: Products) -> Tensor:
    """The weights of the basis rows that a step has to lose, shape [B, K]."""
    if products.rates_P is None:  # nothing leaves the device
        return matrices.times(subspace.inverse_gram, products.with_rows_BK)
    weights_BK = constraints.equality_weights(products.with_rows_BK.cpu(), products.gram_BKK.cpu())
    return subspace.small(weights_BK)


def _subtract(
    subspace: CapabilitySubspace,
    vectors_P: Sequence[vectors.Vector | None],
    weights_BK: Tensor,
    rates_P: Tensor | None,
    metrics: Sequence[vectors.AdamMetric | None] | None,
) -> None:
    """Take D B^T w from the vectors of all parameters, in place."""
    weights_PK, workspace = weights_BK.expand(len(vectors_P), -1), Workspace()
    if rates_P is not None:
        weights_PK = rates_P[:, None] * weights_PK
    for index, (rows_KN, vector_N) in enumerate(zip(subspace.basis, vectors_P, strict=True)):
        if rows_KN is not None and vector_N is not None:
            metric = None if metrics is None else metrics[index]
            vectors.subtract_(vector_N, rows_KN, weights_PK[index], metric, workspace)


def _changes(subspace: CapabilitySubspace, products_BK: Tensor) -> Tensor:
    """First-order changes A u of the losses, from the products B u, shape [R]."""
    return matrices.times(subspace.coordinates, products_BK).sum(dim=0)


def _restoring(
    subspace: CapabilitySubspace, products: Products, removal_BK: Tensor
) -> tuple[Tensor, Restoration]:
    """Weights that take back a part of the rise of each capability loss, shape [B, K]."""
    config = subspace.config
    weights_BK, square = constraints.restoration_weights(
        subspace.history.to_restore(),
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
    scale = (config.restoration_cap * rest / length.clamp_min(TINY)).clamp_max(1)
    ratio = scale * length / rest.clamp_min(TINY)
    return scale * weights_BK, Restoration(ratio, (scale < 1).float())


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
