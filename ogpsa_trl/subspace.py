"""
CapabilitySubspace: from capability gradients to a basis, and the projection of a step.

    refresh:  G = A A^T                    A: capability gradients, one row each; summed over shards
              B = W A                      W from G, so that the rows of B are orthonormal
    project:  p = B v                      summed over shards: all that a step sends
              v <- v - D B^T w             w from p, C and H = B D B^T (`constraints`)

v is the gradient or the optimizer's update, D the identity or the optimizer's metric, C = A B^T the
coordinates of the capability gradients. With D the identity and the constraint an equality,
w = H^-1 p, and H is the identity up to the rounding of B.

Scope "parameter" does this for every parameter tensor on its own, scope "model" once for the whole
parameter vector; the rows are stored per parameter in both. Storage and communication belong to
the backend.

Shapes: P parameters, R capability gradients, K basis rows, N entries of a parameter on this
process, B blocks (P of them in scope "parameter", 1 in scope "model").
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpsa_trl import constraints, linalg, optimizers
from ogpsa_trl.backends import GradientBackend
from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.gradients import CapabilityGradients


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
class Refresh:
    """
    How the loss of each capability gradient has changed, in nats, one entry for each.

    Attributes:
        drift: Since the first refresh of the run.
        predicted_change: What the updates since the last refresh should have done, to first order;
            zero where the update is not projected, and so not known. `None` at the first.
        realised_change: Since the last refresh. `None` at the first.
    """

    drift: list[float]
    predicted_change: list[float] | None
    realised_change: list[float] | None


@dataclass
class _Products:
    """Products of a vector v with the basis B and with itself, in a metric D, over all shards."""

    products_BK: Tensor  # B v
    squares_P: Tensor  # v v^T of every parameter
    square: Tensor  # and of all
    gram_BKK: Tensor  # B D B^T
    metric_square: Tensor  # v D^-1 v^T of all


_TINY = torch.finfo(torch.float32).tiny

# What is saved beside the rows. The first are on the device, the masks on the CPU.
_SMALL_STATE = (
    "gram", "inverse_gram", "coordinates", "mean_coordinates", "mean_square", "rank",
    "weights", "rises", "drift", "predicted_change", "is_waiting", "was_held",
)  # fmt: skip


class CapabilitySubspace:
    """
    The capability subspace of one model: estimated by `refresh`, removed by `project`.

    A parameter whose capability gradients are all exactly zero has no known direction. LoRA starts
    like that: while B is zero, the gradient of A is zero, for the capability losses and for the
    safety loss alike. Such a parameter is *waiting*. When its safety gradient becomes non-zero, the
    subspace says nothing about it yet, so it is *held*: its gradient is set to zero for this one
    step and `is_due` asks for a refresh before the next. If its capability gradient is zero even
    then, moving it changes no capability loss to first order, and it waits no more.

    Args:
        backend: Where the gradients live.
        config: The settings.
    """

    def __init__(self, backend: GradientBackend, config: OGPSAConfig) -> None:
        self.backend = backend
        self.config = config
        if config.target == "update":
            self._check_weights()
        if config.metric == "optimizer":
            optimizers.check_known(backend.optimizer_class)
        num_parameters = len(backend.parameters)
        # Rows of the basis per parameter, shape [K, N]; None where all are zero.
        self.basis: list[Tensor | None] = [None] * num_parameters
        # B B^T and its inverse, shape [B, K, K].
        self.gram = torch.zeros(1, 0, 0)
        self.inverse_gram = torch.zeros(1, 0, 0)
        # The capability gradients in the basis, shape [B, R, K].
        self.coordinates = torch.zeros(1, 0, 0)
        # The mean capability gradient: its coordinates in the basis, shape [B, K], and its squared
        # length. All that the cosine needs.
        self.mean_coordinates = torch.zeros(1, 0)
        self.mean_square = torch.zeros(())
        # Number of directions, the mean over the blocks.
        self.rank = torch.zeros(())
        # Per capability gradient, shape [R]: its share in the mean; how far its loss was above the
        # start of training at the last refresh, and the average of that over the refreshes, as the
        # gradients are averaged; what the updates since then should have changed it by.
        self.weights = self.rises = torch.zeros(0)
        self.drift = self.predicted_change = torch.zeros(0)
        # The mean capability gradient has not been replayed yet.
        self.is_fresh = False
        # Per parameter, on the CPU: its direction is not known yet; it was held once.
        self.is_waiting = torch.zeros(num_parameters, dtype=torch.bool)
        self.was_held = torch.zeros(num_parameters, dtype=torch.bool)
        # A refresh is needed before the next step: there is no basis yet, or a parameter was held.
        self.is_due = True

    def _check_weights(self) -> None:
        for name, parameter in self.backend.parameters:
            weights_N = self.backend.weights(parameter)
            if weights_N.dtype != torch.float32:
                raise ValueError(
                    "`target: update` corrects weights in float32, which bfloat16 would round away,"
                    f" but {name!r} is {weights_N.dtype}. Load the model with `dtype: float32`; "
                    "`bf16: true` then computes in bfloat16."
                )
            if weights_N.data_ptr() != self.backend.weights(parameter).data_ptr():
                raise ValueError(
                    f"`target: update` writes to weights in place, but {name!r} is not contiguous "
                    "in memory. Set `parameter.data = parameter.data.contiguous()`."
                )

    @property
    def basis_bytes(self) -> int:
        """Memory of the stored rows on this process, in bytes."""
        return sum(rows.nbytes for rows in self.basis if rows is not None)

    @torch.no_grad()
    def refresh(self, gradients: CapabilityGradients, rises: Sequence[float]) -> Refresh:
        """
        Replace the basis. A collective call: every process makes it.

        Args:
            gradients: The capability gradients. Their rows are used up, to hold only one
                parameter's rows twice.
            rises: How far each of their losses is above its value at the start of training, on the
                same samples, in nats.

        Raises:
            FloatingPointError: a capability gradient is not finite. The basis is left as it was.
        """
        is_first = len(self.rises) != len(gradients.names)  # or there were other groups before
        if not is_first:
            self._average(gradients.rows)
        gram_PRR = self._sum_grams(gradients.rows, len(gradients.names)).cpu().double()
        for name, loss, products_PR in zip(
            gradients.names, gradients.losses, gram_PRR.unbind(1), strict=True
        ):
            if not products_PR.isfinite().all():
                raise FloatingPointError(
                    f"The gradient of capability group {name!r} (loss {loss:.4g}) is not finite. "
                    "Check the samples of this group, or lower `learning_rate` if training has "
                    "diverged. The basis is left as it was."
                )
        gram_BRR = self._merge(gram_PRR)
        weights_BKR = self.backend.from_first_process(
            lambda: linalg.orthonormal_weights(gram_BRR, self.config.rank)
        )
        self._store(gradients.rows, weights_BKR)
        stored_BKK = self._merge(self._sum_grams(self.basis, weights_BKR.shape[1]))
        self.gram = self._small(stored_BKK)
        self.inverse_gram = self._small(
            self.backend.from_first_process(lambda: linalg.inverse_gram(stored_BKK))
        )
        self.coordinates = self._small(gram_BRR @ weights_BKR.mT)
        mean_R = gradients.weights
        self.mean_coordinates = self._small(weights_BKR @ gram_BRR @ mean_R)
        self.mean_square = self._small((mean_R @ gram_BRR @ mean_R).sum())
        self.rank = self._small((weights_BKR != 0).any(dim=-1).sum(dim=-1).double().mean())
        is_zero_P = (gram_PRR.diagonal(dim1=1, dim2=2) == 0).all(dim=1)
        if self.config.capability_loss == "kl":
            # Where the model is still the starting one, no direction raises the loss, and all are
            # known: nothing waits. But the next step leaves that point.
            self.is_due = bool(is_zero_P.all())
        else:
            self.is_waiting = is_zero_P & ~self.was_held
            self.is_due = False
        self.is_fresh = True
        self.weights = self._small(mean_R)
        return self._watch_losses(torch.tensor(rises, dtype=torch.float64), is_first)

    def _average(self, rows_PRN: list[Tensor | None]) -> None:
        """Keep a share of the old capability gradients, A = C B, in the new ones."""
        share = self.config.capability_ema
        if share == 0:
            return
        coordinates_PRK = share * self.coordinates.expand(len(rows_PRN), -1, -1)
        for index, (rows_RN, basis_KN) in enumerate(zip(rows_PRN, self.basis, strict=True)):
            if rows_RN is not None:
                rows_RN *= 1 - share
            if basis_KN is not None:
                old_RN = linalg.combine(coordinates_PRK[index], basis_KN, torch.float32)
                rows_PRN[index] = old_RN if rows_RN is None else rows_RN.add_(old_RN)

    def _watch_losses(self, rises_R: Tensor, is_first: bool) -> Refresh:
        """Compare the losses with those at the start of training and at the last refresh."""
        predicted = realised = None
        if is_first:
            self.drift = torch.zeros(len(rises_R), device=self.backend.device)
        else:
            predicted = self.predicted_change.tolist()
            realised = (rises_R - self.rises.cpu().double()).tolist()
        share = self.config.capability_ema
        self.rises = self._small(rises_R)
        self.drift = share * self.drift + (1 - share) * self.rises
        self.predicted_change = torch.zeros_like(self.rises)
        return Refresh(rises_R.tolist(), predicted, realised)

    @torch.no_grad()
    def replay(self) -> Tensor | None:
        """
        Add the mean capability gradient to the gradient of the first step after a refresh.

        Returns:
            The length of what was added; None in other steps.
        """
        weight = self.config.replay_weight
        if not self.is_fresh or weight == 0:
            return None
        self.is_fresh = False
        coordinates_PK = self.mean_coordinates.expand(len(self.basis), -1)
        for (_, parameter), rows_KN, weights_K in zip(
            self.backend.parameters, self.basis, coordinates_PK, strict=True
        ):
            gradient_N = self.backend.gradient(parameter)
            if gradient_N is not None and rows_KN is not None:
                linalg.subtract_(gradient_N, rows_KN, -weight * weights_K)
        return weight * self.mean_square.sqrt()

    @torch.no_grad()
    def project(self) -> Projection:
        """
        Make the gradient keep the constraint, in place. A collective call.

        Raises:
            RuntimeError: this process has no gradient of any parameter.
        """
        gradients = [self.backend.gradient(parameter) for _, parameter in self.backend.parameters]
        if all(g is None for g in gradients) and any(shard.size for shard in self.backend.shards):
            raise RuntimeError(
                f"No parameter has a gradient on process {self.backend.process_index}, so this "
                "step would not be projected. Check that the loss depends on trained parameters; "
                "if it does, please report the engine and its version."
            )
        # A step goes along minus the gradient, so what the constraint is about has the other sign.
        return self._project(gradients, gradients, is_descent=True)

    @torch.no_grad()
    def copy_weights(self) -> list[Tensor]:
        """This process's shards of the weights, copied: what `project_update` compares with."""
        return [self.backend.weights(parameter).clone() for _, parameter in self.backend.parameters]

    @torch.no_grad()
    def project_update(self, weights_before: list[Tensor]) -> Projection:
        """
        Make what the optimizer did since `copy_weights` keep the constraint. A collective call.

        Args:
            weights_before: The copied weights. They are used up.
        """
        weights = [self.backend.weights(parameter) for _, parameter in self.backend.parameters]
        updates = _differences(weights, weights_before)
        projection = self._project(updates, weights, is_descent=False)
        self.backend.publish_weights()
        return projection

    @torch.no_grad()
    def measure_update(self, weights_before: list[Tensor]) -> tuple[Tensor, Tensor]:
        """
        Look at the update since `copy_weights`. A collective call; the copied weights are used up.

        Returns:
            The share of its squared length that lies in the subspace, in [0, 1]; and what it should
            change each capability loss by, to first order, in nats, shape [R].
        """
        weights = (self.backend.weights(parameter) for _, parameter in self.backend.parameters)
        products = self._products(_differences(weights, weights_before), None)
        return self._inside(products) / products.square, self._changes(products.products_BK)

    def _project(
        self,
        vectors: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        *,
        is_descent: bool,
    ) -> Projection:
        """Find what the vectors of all parameters have to lose, and take it from the targets."""
        means_P = self._second_moment_means() if self.config.metric == "optimizer" else None
        products = self._products(vectors, means_P)
        weights_BK = self._weights(products, is_descent=is_descent)
        removed = _square(weights_BK, products.gram_BKK)
        restoration = None
        if self.config.restoration:
            restoring_BK, restoration = self._restoring(products, weights_BK)
            weights_BK = weights_BK + restoring_BK
        changes = None
        if not is_descent:
            left_BK = products.products_BK - _times(products.gram_BKK, weights_BK)
            changes = self._changes(left_BK)
            self.predicted_change = self.predicted_change + changes
        for index, (rows_KN, target_N, weights_K) in enumerate(
            zip(self.basis, targets, weights_BK.expand(len(targets), -1), strict=True)
        ):
            if rows_KN is not None and target_N is not None:
                linalg.subtract_(target_N, rows_KN, weights_K, self._metric(index, means_P))
        held = self._hold(vectors, targets, products.squares_P)

        if held:
            removed = removed + products.squares_P[held].sum()
        in_mean = (_times(self.inverse_gram, products.products_BK) * self.mean_coordinates).sum()
        return Projection(
            removed_fraction=(removed / products.metric_square).clamp(0, 1),
            share_inside=self._inside(products) / products.square,
            cosine=in_mean / (products.square * self.mean_square).sqrt().clamp_min(_TINY),
            held=[self.backend.parameters[index][0] for index in held],
            changes=changes,
            restoration=restoration,
        )

    def _products(self, vectors: Sequence[Tensor | None], means_P: Tensor | None) -> _Products:
        """
        The products of the vectors of all parameters with the basis and with themselves, in the
        metric that `means_P` (of the second moments) belong to, or the identity.
        """
        num_rows = self.inverse_gram.shape[-1]
        products_PX = torch.zeros(
            len(vectors), num_rows + 2 + num_rows**2, device=self.inverse_gram.device
        )
        if means_P is None:  # the basis alone gives the rest
            products_PX = products_PX[:, : num_rows + 1].contiguous()
        for index, (products_X, rows_KN, vector_N) in enumerate(
            zip(products_PX, self.basis, vectors, strict=True)
        ):
            if vector_N is None:
                continue
            products_X[num_rows] = linalg.dot(vector_N[None], vector_N)[0]
            if rows_KN is not None:
                products_X[:num_rows] = linalg.dot(rows_KN, vector_N)
            metric_N = self._metric(index, means_P)
            if metric_N is not None:
                scaled_N = torch.where(metric_N > 0, vector_N / metric_N, 0.0)
                products_X[num_rows + 1] = linalg.dot(scaled_N[None], vector_N)[0]
                if rows_KN is not None:
                    products_X[num_rows + 2 :] = linalg.gram(rows_KN, metric_N).flatten()
        products_PX = self.backend.sum_over_shards(products_PX)  # all that a step sends
        squares_P = products_PX[:, num_rows]
        products_BK = self._merge(products_PX[:, :num_rows])
        square = squares_P.sum().clamp_min(_TINY)
        if means_P is None:
            return _Products(products_BK, squares_P, square, self.gram, square)
        gram_PKK = products_PX[:, num_rows + 2 :].unflatten(1, (num_rows, num_rows))
        metric_square = products_PX[:, num_rows + 1].sum().clamp_min(_TINY)
        return _Products(products_BK, squares_P, square, self._merge(gram_PKK), metric_square)

    def _weights(self, products: _Products, *, is_descent: bool) -> Tensor:
        """The weights of the basis rows that a step has to lose, shape [B, K]."""
        if self.config.constraint == "equality" and self.config.metric == "euclidean":
            # Nothing leaves the device.
            return _times(self.inverse_gram, products.products_BK)
        # Along minus a gradient, what would rise falls.
        sign = -1 if is_descent else 1
        products_BK = sign * products.products_BK.cpu()
        gram_BKK = products.gram_BKK.cpu()
        if self.config.constraint == "equality":
            weights_BK = constraints.equality_weights(products_BK, gram_BKK)
        else:
            weights_BK = constraints.inequality_weights(
                products_BK, gram_BKK, self.coordinates.cpu()
            )
        return self._small(sign * weights_BK)

    def _changes(self, products_BK: Tensor) -> Tensor:
        """First-order changes A u of the losses, from the products B u, shape [R]."""
        return _times(self.coordinates, products_BK).sum(dim=0)

    def _inside(self, products: _Products) -> Tensor:
        """Squared length of what lies in the subspace."""
        return _square(products.products_BK, self.inverse_gram)

    def _restoring(self, products: _Products, removal_BK: Tensor) -> tuple[Tensor, Restoration]:
        """Weights that take back a part of the rise of each capability loss, shape [B, K]."""
        per_step = self.config.restoration / self.config.refresh_interval
        weights_BK, square = constraints.restoration_weights(
            per_step * self.drift.clamp_min(0).cpu(),
            products.gram_BKK.cpu(),
            self.coordinates.cpu(),
        )
        weights_BK, length = self._small(weights_BK), self._small(square).clamp_min(0).sqrt()
        rest = (
            (
                products.metric_square
                - 2 * (removal_BK * products.products_BK).sum()
                + _square(removal_BK, products.gram_BKK)
            )
            .clamp_min(0)
            .sqrt()
        )
        scale = (self.config.restoration_cap * rest / length.clamp_min(_TINY)).clamp_max(1)
        ratio = scale * length / rest.clamp_min(_TINY)
        return scale * weights_BK, Restoration(ratio, (scale < 1).float())

    def _second_moment_means(self) -> Tensor | None:
        """Mean of Adam's second moment over every parameter, shape [P]; None where it has none."""
        parameters = list(zip(self.backend.parameters, self.backend.shards, strict=True))
        means_P = torch.zeros(len(parameters), 2, device=self.backend.device)
        for mean, ((_, parameter), shard) in zip(means_P, parameters, strict=True):
            moment_N = self.backend.second_moment(parameter)
            if moment_N is not None:
                mean[0] = moment_N.sum() / max(shard.total, 1)
                mean[1] = 1
        means_P = self.backend.sum_over_shards(means_P)
        return means_P[:, 0] if means_P[:, 1].any() else None

    def _metric(self, index: int, means_P: Tensor | None) -> Tensor | None:
        """The diagonal of the optimizer's metric for one parameter; None for the identity."""
        if means_P is None:
            return None
        _, parameter = self.backend.parameters[index]
        moment_N = self.backend.second_moment(parameter)
        if moment_N is None:  # not trained yet, or not on this process
            return torch.zeros(self.backend.shards[index].size, device=self.backend.device)
        return linalg.adam_metric(moment_N, means_P[index])

    def _hold(
        self,
        vectors: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        squares_P: Tensor,
    ) -> list[int]:
        """Take all from the targets of waiting parameters that would move; ask for a refresh."""
        waiting = self.is_waiting.nonzero().flatten().tolist()
        if not waiting:  # the common case: nothing is read back from the device
            return []
        is_moving = (squares_P[waiting] > 0).tolist()
        held = [index for index, moves in zip(waiting, is_moving, strict=True) if moves]
        for index in held:
            vector_N, target_N = vectors[index], targets[index]
            if vector_N is not None and target_N is not None:
                target_N -= vector_N.clone() if vector_N is target_N else vector_N
        self.was_held[held] = True
        self.is_due = self.is_due or bool(held)
        return held

    def state_dict(self) -> dict[str, Tensor]:
        """
        Everything that the next step depends on, as contiguous tensors on their devices. The rows
        of a basis are this process's shards (`backend.shards`); the rest is the same everywhere.
        """
        names = [name for name, _ in self.backend.parameters]
        rows = zip(names, self.basis, strict=True)
        state = {f"basis.{name}": rows_KN for name, rows_KN in rows if rows_KN is not None}
        state |= {name: getattr(self, name).contiguous() for name in _SMALL_STATE}
        return state | {"is_due": torch.tensor(self.is_due)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Take over a state made by `state_dict` for the same parameters and settings.

        Raises:
            ValueError: an entry is missing, unknown, or has the wrong shape. Nothing is changed.
        """
        parameters = zip(self.backend.parameters, self.backend.shards, strict=True)
        sizes = {f"basis.{name}": (shard.size,) for (name, _), shard in parameters}
        missing = sorted({*_SMALL_STATE, "is_due"} - state.keys())
        unknown = sorted(state.keys() - sizes.keys() - {*_SMALL_STATE, "is_due"})
        misfits = sorted(
            name for name in sizes.keys() & state.keys() if state[name].shape[1:] != sizes[name]
        )
        if missing or unknown or misfits:
            raise ValueError(
                "The saved subspace belongs to other parameters: "
                f"missing {missing[:3]}, unknown {unknown[:3]}, of another size {misfits[:3]}."
            )
        device = self.backend.device
        for name in _SMALL_STATE:
            on_cpu = state[name].dtype == torch.bool
            setattr(self, name, state[name].clone() if on_cpu else state[name].to(device))
        names = [f"basis.{name}" for name, _ in self.backend.parameters]
        self.basis = [state[name].to(device) if name in state else None for name in names]
        self.is_due = bool(state["is_due"])

    def _store(self, rows_PRN: list[Tensor | None], weights_BKR: Tensor) -> None:
        """Replace the basis, one parameter at a time: rows and old basis go as the new comes."""
        dtype = getattr(torch, self.config.basis_dtype)
        weights_PKR = weights_BKR.float().expand(len(rows_PRN), -1, -1)
        for index, rows_RN in enumerate(rows_PRN):
            rows_PRN[index] = None
            self.basis[index] = None
            if rows_RN is not None and weights_PKR[index].any():
                weights_KR = weights_PKR[index].to(rows_RN.device)
                self.basis[index] = linalg.combine(weights_KR, rows_RN, dtype)

    def _sum_grams(self, rows_PKN: Sequence[Tensor | None], size: int) -> Tensor:
        """Gram matrices of every parameter's rows, zero where there are none, shape [P, K, K]."""
        device = self.backend.device
        zeros = torch.zeros(size, size, device=device)
        grams = [zeros if rows is None else linalg.gram(rows) for rows in rows_PKN]
        gram_PX = torch.stack(grams).flatten(start_dim=1)
        return self.backend.sum_over_shards(gram_PX).view(len(grams), size, size)

    def _merge(self, values: Tensor) -> Tensor:
        """[P, ...] -> [B, ...]: the parameters of one block add up."""
        return values.sum(dim=0, keepdim=True) if self.config.scope == "model" else values

    def _small(self, values: Tensor) -> Tensor:
        """A small float64 result of the CPU, where and as the step needs it."""
        return values.float().to(self.backend.device)


def _differences(after: Iterable[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    """`after - before`, in the memory of `before`."""
    return [old.neg_().add_(new) for new, old in zip(after, before, strict=True)]


def _times(matrix_BXK: Tensor, vector_BK: Tensor) -> Tensor:
    """Matrix times vector for every block, shape [B, X]."""
    return (matrix_BXK @ vector_BK[..., None]).squeeze(-1)


def _square(vector_BK: Tensor, matrix_BKK: Tensor) -> Tensor:
    """Sum of v M v^T over the blocks, a scalar."""
    return (vector_BK * _times(matrix_BKK, vector_BK)).sum()
