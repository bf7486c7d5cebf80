"""
CapabilitySubspace: from capability gradients to a basis.

    refresh:  G = A A^T                    A: capability gradients, one row each; summed over shards
              B = W A                      W from G, so that the rows of B are orthonormal

and the coordinates of the gradients in it, C = A B^T, so that A = C B. What a step loses by them
says `projection`.

Scope "parameter" does this for every parameter tensor on its own, scope "model" once for the whole
parameter vector; the rows are stored per parameter in both. A new basis takes the memory of the old
one. Storage and communication belong to the backend.

Shapes: P parameters, R capability gradients, K basis rows, N entries of a parameter on this
process, B blocks (P of them in scope "parameter", 1 in scope "model").
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.engines import adam_moments
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.method.capability_gradients import CapabilityGradients
from ogpsa_trl.method.loss_history import LossHistory, Refresh
from ogpsa_trl.tensors import gradient_rows, matrices, vectors
from ogpsa_trl.tensors.blocks import Workspace

# What is saved beside the rows. The first are on the device, the masks on the CPU.
_OWN_STATE = (
    "gram", "inverse_gram", "coordinates", "mean_coordinates", "mean_square", "rank", "weights",
    "is_waiting", "was_held",
)  # fmt: skip
_HISTORY = ("rises", "drift", "predicted_change")
# What older checkpoints lack; it then stays as it is at the start.
_NEW_HISTORY = ("num_steps", "interval", "num_refreshes", "was_lost", "unseen_change")


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
            adam_moments.check_keeps_no_weights(backend.optimizer_class)
        if config.metric == "optimizer":
            adam_moments.check_known(backend.optimizer_class)
        num_parameters = len(backend.parameters)
        # Rows of the basis per parameter, shape [K, N]; None where all are zero.
        self.basis: list[Tensor | None] = [None] * num_parameters
        # B B^T and its inverse, shape [B, K, K].
        self.gram = torch.zeros(1, 0, 0)
        self.inverse_gram = torch.zeros(1, 0, 0)
        # What each parameter adds to B B^T, shape [P, K, K]. Not saved: it is computed from B.
        self.gram_PKK = torch.zeros(num_parameters, 0, 0, device=backend.device)
        # The capability gradients in the basis, shape [B, R, K].
        self.coordinates = torch.zeros(1, 0, 0)
        # The mean capability gradient: its coordinates in the basis, shape [B, K], and its squared
        # length. All that the cosine needs.
        self.mean_coordinates = torch.zeros(1, 0)
        self.mean_square = torch.zeros(())
        # Number of directions, the mean over the blocks.
        self.rank = torch.zeros(())
        # The share of each capability gradient in the mean, shape [R].
        self.weights = torch.zeros(0)
        self.history = LossHistory(config, backend.device)
        # The mean capability gradient has not been replayed yet.
        self.is_fresh = False
        # Per parameter, on the CPU: its direction is not known yet; it was held once.
        self.is_waiting = torch.zeros(num_parameters, dtype=torch.bool)
        self.was_held = torch.zeros(num_parameters, dtype=torch.bool)
        # The optimizer's state was looked at after its first step.
        self.is_optimizer_checked = config.metric == "optimizer"  # of known ones it is known
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

    @property
    def dtype(self) -> torch.dtype:
        """That of the stored rows."""
        return getattr(torch, self.config.basis_dtype)

    @torch.no_grad()
    def release_gradients(self, num_gradients: int) -> tuple[list[Tensor | None], float]:
        """
        Give away the capability gradients of the last refresh, in the memory of the basis.

        The subspace is without a basis until `refresh` is given new ones; if it never is, because
        computing them failed, the next step asks for a refresh.

        Args:
            num_gradients: How many there will be. Others than so many are of no use.

        Returns:
            Per parameter the rows, shape [R, N]; `None` where all are zero. And the share of them
            that stays in the new ones, nothing if there were none.
        """
        rows, self.is_due = self.basis, True
        self.basis = [None for _ in rows]
        if len(self.weights) != num_gradients:
            return [None] * len(rows), 0.0
        coordinates_PRK, workspace = self.coordinates.expand(len(rows), -1, -1), Workspace()
        for index, rows_KN in enumerate(rows):
            if rows_KN is not None:
                rows[index] = gradient_rows.combine_(coordinates_PRK[index], rows_KN, workspace)
        return rows, self.config.capability_ema

    @torch.no_grad()
    def refresh(self, gradients: CapabilityGradients, rises: Sequence[float]) -> Refresh:
        """
        Make a basis. A collective call: every process makes it.

        Args:
            gradients: The capability gradients. The basis takes the memory of their rows.
            rises: How far each of their losses is above its value at the start of training, on the
                same samples, in nats. That of a gradient that was kept does not count.

        Raises:
            FloatingPointError: a gradient is not finite in the first refresh, or all are in a later
                one. There is no basis then.
        """
        is_first = len(self.weights) != len(gradients.names)
        gradients.check_finite(is_first=is_first, was_lost=self.history.was_lost.tolist())
        gram_PRR = self._sum_grams(gradients.rows, len(gradients.names)).cpu().double()
        num_entries_P = torch.tensor([shard.total for shard in self.backend.shards]).double()
        gram_BRR = matrices.without_short_rows(self.merge(gram_PRR), self.merge(num_entries_P))
        weights_BKR = self.backend.from_first_process(
            lambda: matrices.orthonormal_weights(gram_BRR, self.config.rank, self.dtype)
        )
        self._store(gradients.rows, weights_BKR)
        self.gram_PKK = self._sum_grams(self.basis, weights_BKR.shape[1])
        stored_BKK = self.merge(self.gram_PKK)
        self.gram = self.small(stored_BKK)
        self.inverse_gram = self.small(
            self.backend.from_first_process(lambda: matrices.inverse_gram(stored_BKK))
        )
        self.coordinates = self.small(gram_BRR @ weights_BKR.mT)
        mean_R = gradients.mean_weights
        self.mean_coordinates = self.small(weights_BKR @ gram_BRR @ mean_R)
        self.mean_square = self.small((mean_R @ gram_BRR @ mean_R).sum())
        self.rank = self.small((weights_BKR != 0).any(dim=-1).sum(dim=-1).double().mean())
        is_zero_P = (gram_PRR.diagonal(dim1=1, dim2=2) == 0).all(dim=1)
        if self.config.capability_loss == "kl":
            # Where the model is still the starting one, no direction raises the loss, and all are
            # known: nothing waits. But the next step leaves that point.
            self.is_due = bool(is_zero_P.all())
        else:
            self.is_waiting = is_zero_P & ~self.was_held
            self.is_due = False
        self.is_fresh = True
        self.weights = self.small(gradients.weights)
        return self.history.refresh(rises, gradients)

    @torch.no_grad()
    def replay(self) -> Tensor | None:
        """
        Add the mean capability gradient to the gradient of the first step after a refresh.

        Returns:
            The length of what was added; None in other steps.
        """
        weight = self.config.capability_weight
        if not self.is_fresh or weight == 0:
            return None
        self.is_fresh = False
        coordinates_PK = self.mean_coordinates.expand(len(self.basis), -1)
        for (_, parameter), rows_KN, weights_K in zip(
            self.backend.parameters, self.basis, coordinates_PK, strict=True
        ):
            gradient_N = self.backend.gradient(parameter)
            if gradient_N is not None and rows_KN is not None:
                vectors.subtract_(gradient_N, rows_KN, -weight * weights_K)
        return weight * self.mean_square.sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """
        Everything that the next step depends on, as contiguous tensors on their devices. The rows
        of a basis are this process's shards (`backend.shards`); the rest is the same everywhere.
        """
        names = [name for name, _ in self.backend.parameters]
        rows = zip(names, self.basis, strict=True)
        state = {f"basis.{name}": rows_KN for name, rows_KN in rows if rows_KN is not None}
        state |= {name: getattr(self, name).contiguous() for name in _OWN_STATE}
        state |= {name: getattr(self.history, name) for name in _HISTORY + _NEW_HISTORY}
        return state | {"is_due": torch.tensor(self.is_due)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """
        Take over a state made by `state_dict` for the same parameters and settings.

        Raises:
            ValueError: an entry is missing, unknown, or has the wrong shape. Nothing is changed.
        """
        parameters = zip(self.backend.parameters, self.backend.shards, strict=True)
        num_rows = state["gram"].shape[-1] if "gram" in state else 0
        sizes = {f"basis.{name}": (num_rows, shard.size) for (name, _), shard in parameters}
        needed = {*_OWN_STATE, *_HISTORY, "is_due"}
        missing = sorted(needed - state.keys())
        unknown = sorted(state.keys() - sizes.keys() - needed - {*_NEW_HISTORY})
        misfits = sorted(
            name for name in sizes.keys() & state.keys() if state[name].shape != sizes[name]
        )
        if missing or unknown or misfits:
            raise ValueError(
                "The saved subspace belongs to other parameters: "
                f"missing {missing[:3]}, unknown {unknown[:3]}, of another size {misfits[:3]}."
            )
        device = self.backend.device
        for name in _OWN_STATE:
            on_cpu = state[name].dtype == torch.bool
            setattr(self, name, state[name].clone() if on_cpu else state[name].to(device))
        for name in _HISTORY:
            setattr(self.history, name, state[name].to(device))
        for name in _NEW_HISTORY:
            setattr(self.history, name, state.get(name, getattr(self.history, name)).clone())
        names = [f"basis.{name}" for name, _ in self.backend.parameters]
        self.basis = [state[name].to(device) if name in state else None for name in names]
        self.is_due = bool(state["is_due"])

    @torch.no_grad()
    def is_sound(self) -> bool:
        """
        Whether what was loaded is finite, and the rows are those whose Gram matrix was saved beside
        them. A collective call; the processes may differ in the answer.
        """
        num_rows = self.gram.shape[-1]
        if num_rows:
            self.gram_PKK = self._sum_grams(self.basis, num_rows)
        gram_BKK = self.merge(self.gram_PKK) if num_rows else self.gram
        small = [getattr(self, name) for name in _OWN_STATE]
        small += [getattr(self.history, name) for name in _HISTORY]
        is_finite = all(bool(values.isfinite().all()) for values in small)
        # Other shards add up in another order, and other processors invert with other digits.
        is_same = torch.allclose(gram_BKK, self.gram, rtol=1e-4, atol=1e-4)
        inverse_BKK = matrices.inverse_gram(gram_BKK).float()
        is_same &= torch.allclose(inverse_BKK, self.inverse_gram.cpu(), rtol=1e-3, atol=1e-3)
        return is_finite and is_same

    def _store(self, rows_PRN: list[Tensor | None], weights_BKR: Tensor) -> None:
        """Make rows a basis, in their memory, or one parameter at a time in less."""
        weights_PKR, workspace = weights_BKR.float().expand(len(rows_PRN), -1, -1), Workspace()
        for index, rows_RN in enumerate(rows_PRN):
            rows_PRN[index] = None
            if rows_RN is not None and weights_PKR[index].any():
                weights_KR = weights_PKR[index].to(rows_RN.device)
                self.basis[index] = gradient_rows.combine_(weights_KR, rows_RN, workspace)

    def _sum_grams(self, rows_PKN: Sequence[Tensor | None], size: int) -> Tensor:
        """Gram matrices of every parameter's rows, zero where there are none, shape [P, K, K]."""
        workspace = Workspace()
        triangles = [
            None if rows is None else gradient_rows.gram(rows, workspace) for rows in rows_PKN
        ]
        triangle_PX = matrices.table(triangles, matrices.triangle_size(size), self.backend.device)
        triangle_PX = self.backend.same_on_all(self.backend.sum_over_shards(triangle_PX))
        return matrices.symmetric(triangle_PX, size)

    def merge(self, values: Tensor) -> Tensor:
        """[P, ...] -> [B, ...]: the parameters of one block add up."""
        return values.sum(dim=0, keepdim=True) if self.config.scope == "model" else values

    def small(self, values: Tensor) -> Tensor:
        """A small float64 result of the CPU, where and as the step needs it."""
        return values.float().to(self.backend.device)
