"""
CapabilitySubspace: from capability gradients to a basis, and the projection of the gradient.

    refresh:  G = A A^T                    A: capability gradients, one row each; summed over shards
              B = W A                      W from G, so that the rows of B are orthonormal
    project:  c = B g                      summed over shards: all that a step sends
              g <- g - B^T (B B^T)^-1 c    the inverse is the identity up to the rounding of B

Scope "parameter" does this for every parameter tensor on its own, scope "model" once for the whole
parameter vector; the rows are stored per parameter in both. Storage and communication belong to
the backend.

Shapes: P parameters, R capability gradients, K basis rows, N entries of a parameter on this
process, B blocks (P of them in scope "parameter", 1 in scope "model").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ogpsa_trl import linalg
from ogpsa_trl.backends import GradientBackend
from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.gradients import CapabilityGradients


@dataclass
class Projection:
    """What a projection did, as tensors on the device, so that a step need not wait for them."""

    removed_fraction: Tensor
    cosine: Tensor
    held: list[str]


_SMALL_STATE = (
    "inverse_gram", "mean_coordinates", "mean_square", "rank", "is_waiting", "was_held",
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
        num_parameters = len(backend.parameters)
        # Rows of the basis per parameter, shape [K, N]; None where all are zero.
        self.basis: list[Tensor | None] = [None] * num_parameters
        # (B B^T)^-1, shape [B, K, K].
        self.inverse_gram = torch.zeros(1, 0, 0)
        # The mean capability gradient: its coordinates in the basis, shape [B, K], and its squared
        # length. All that the cosine needs.
        self.mean_coordinates = torch.zeros(1, 0)
        self.mean_square = torch.zeros(())
        # Number of directions, the mean over the blocks.
        self.rank = torch.zeros(())
        # Per parameter, on the CPU: its direction is not known yet; it was held once.
        self.is_waiting = torch.zeros(num_parameters, dtype=torch.bool)
        self.was_held = torch.zeros(num_parameters, dtype=torch.bool)
        # A refresh is needed before the next step: there is no basis yet, or a parameter was held.
        self.is_due = True

    @property
    def basis_bytes(self) -> int:
        """Memory of the stored rows on this process, in bytes."""
        return sum(rows.nbytes for rows in self.basis if rows is not None)

    @torch.no_grad()
    def refresh(self, gradients: CapabilityGradients) -> None:
        """
        Replace the basis. A collective call: every process makes it.

        Args:
            gradients: The capability gradients. Their rows are used up, to hold only one
                parameter's rows twice.

        Raises:
            FloatingPointError: a capability gradient is not finite. The basis is left as it was.
        """
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
        stored_PKK = self._sum_grams(self.basis, weights_BKR.shape[1])
        self.inverse_gram = self._small(
            self.backend.from_first_process(lambda: linalg.inverse_gram(self._merge(stored_PKK)))
        )
        mean_R = gradients.weights
        self.mean_coordinates = self._small(weights_BKR @ gram_BRR @ mean_R)
        self.mean_square = self._small((mean_R @ gram_BRR @ mean_R).sum())
        self.rank = self._small((weights_BKR != 0).any(dim=-1).sum(dim=-1).double().mean())
        is_zero_P = (gram_PRR.diagonal(dim1=1, dim2=2) == 0).all(dim=1)
        self.is_waiting = is_zero_P & ~self.was_held
        self.is_due = False

    @torch.no_grad()
    def project(self) -> Projection:
        """
        Remove from the gradient its component in the subspace, in place. A collective call.

        Returns:
            `removed_fraction`: share of the gradient's squared length removed, in [0, 1];
            `cosine`: between the gradient and the mean capability gradient, before the projection,
            in [-1, 1] (where `rank` drops directions: with the part of the mean that is kept);
            `held`: the names of the parameters held in this step.

        Raises:
            RuntimeError: this process has no gradient of any parameter.
        """
        num_rows = self.inverse_gram.shape[-1]
        gradients = [self.backend.gradient(parameter) for _, parameter in self.backend.parameters]
        if all(g is None for g in gradients) and any(shard.size for shard in self.backend.shards):
            raise RuntimeError(
                f"No parameter has a gradient on process {self.backend.process_index}, so this "
                "step would not be projected. Check that the loss depends on trained parameters; "
                "if it does, please report the engine and its version."
            )
        products_PX = torch.zeros(len(gradients), num_rows + 1, device=self.inverse_gram.device)
        for products_X, rows_KN, gradient_N in zip(products_PX, self.basis, gradients, strict=True):
            if gradient_N is not None:
                products_X[-1] = linalg.dot(gradient_N[None], gradient_N)[0]
                if rows_KN is not None:
                    products_X[:-1] = linalg.dot(rows_KN, gradient_N)
        products_PX = self.backend.sum_over_shards(products_PX)  # P (K + 1) floats, all it sends
        squares_P = products_PX[:, -1]
        products_BK = self._merge(products_PX[:, :-1])
        weights_BK = (self.inverse_gram @ products_BK[..., None]).squeeze(-1)

        for rows_KN, gradient_N, weights_K in zip(
            self.basis, gradients, weights_BK.expand(len(gradients), -1), strict=True
        ):
            if rows_KN is not None and gradient_N is not None:
                linalg.subtract_(gradient_N, rows_KN, weights_K)

        held = self._hold(gradients, squares_P)
        tiny = torch.finfo(squares_P.dtype).tiny
        square = squares_P.sum().clamp_min(tiny)
        removed = (weights_BK * products_BK).sum()
        if held:
            removed = removed + squares_P[held].sum()
        in_mean = (weights_BK * self.mean_coordinates).sum()
        length = (square * self.mean_square).sqrt().clamp_min(tiny)
        names = [self.backend.parameters[index][0] for index in held]
        return Projection((removed / square).clamp(0, 1), in_mean / length, names)

    def _hold(self, gradients: list[Tensor | None], squares_P: Tensor) -> list[int]:
        """Zero the gradients of waiting parameters; ask for a refresh if any was not zero."""
        waiting = self.is_waiting.nonzero().flatten().tolist()
        if not waiting:  # the common case: nothing is read back from the device
            return []
        is_moving = (squares_P[waiting] > 0).tolist()
        held = [index for index, moves in zip(waiting, is_moving, strict=True) if moves]
        for index in held:
            gradient_N = gradients[index]
            if gradient_N is not None:
                gradient_N.zero_()
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
        """Replace the basis, one parameter at a time: rows and old basis go as the new one comes."""
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
