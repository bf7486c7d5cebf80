"""
Where gradients live and when they are final: what the method asks of every training engine.

PyTorch's own engines (one process, DDP, FSDP2) are in `torch_engines`, DeepSpeed's ZeRO in `zero`;
`choose` says which engine has which backend, `supported` what is refused.

Shapes: P parameters, X numbers of each; N entries of one parameter's shard.
"""

import contextlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ogpsa_trl.engines import adam_moments

Value = TypeVar("Value")
StepContext = Callable[[], contextlib.AbstractContextManager[Any]]


class Shard(NamedTuple):
    """The part of a flattened parameter of `total` entries: `size` of them, from `start` on."""

    start: int
    size: int
    total: int


class GradientBackend(ABC):
    """
    What all engines share. A subclass says where its gradients are.

    Args:
        accelerator: The trainer's accelerator.
        model: The model that holds the parameters, not wrapped.
        wrapped_model: The model to call, wrapped by the engine (the same object on one process).
        optimizer: The optimizer, as the engine has it.

    Attributes:
        parameters: Name and parameter of all that is trained, in the same order everywhere.
        shards: The part of each flattened parameter that this process holds.
        device: Where tensors of this process live.
        is_replicated: Whether several processes hold the same entries: those of DDP, the replicas
            of HSDP.
        holds_weights: Whether the optimizer's weights are sharded as the gradients are; if not,
            neither they nor the second moment can be asked for.
        has_length_before_step: Whether the trainer knows the length of the gradient before the
            optimizer's step.
    """

    holds_weights = True
    has_length_before_step = False

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        wrapped_model: nn.Module,
        optimizer: Optimizer,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.wrapped_model = wrapped_model
        self.optimizer: Any = optimizer
        # `named_parameters` lists tied weights once, under the first of their names.
        self.parameters = [
            (n, p) for n, p in model.named_parameters() if p.requires_grad and self._is_held(p)
        ]
        self.device = accelerator.device
        self.process_index = accelerator.process_index
        self.num_processes = accelerator.num_processes
        self.shards = [self._shard(parameter) for _, parameter in self.parameters]
        # The parameters whose shards one process group holds together, as indices.
        self._shard_groups: dict[ProcessGroup, list[int]] = defaultdict(list)
        for index, (_, parameter) in enumerate(self.parameters):
            group = self._shard_group(parameter)
            if group is not None:
                self._shard_groups[group].append(index)
        num_shards = [group.size() for group in self._shard_groups] or [1]
        self.is_replicated = min(num_shards) < self.num_processes

    @property
    def is_sharded(self) -> bool:
        """Whether a process may hold less than the whole of a gradient."""
        return bool(self._shard_groups)

    # Where an engine keeps what it trains.

    def _is_held(self, parameter: nn.Parameter) -> bool:  # noqa: ARG002
        """Whether the optimizer updates a trainable parameter."""
        return True

    @abstractmethod
    def _shard(self, parameter: nn.Parameter) -> Shard:
        """What this process holds of the gradient of `parameter`."""

    @abstractmethod
    def _shard_group(self, parameter: nn.Parameter) -> ProcessGroup | None:
        """The processes whose shards make up the gradient; None where each holds all of it."""

    @abstractmethod
    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """
        This process's shard of the gradient, shape [N]. Writing into it changes the gradient.

        None if the parameter has no gradient, or this process no shard of it.
        """

    @abstractmethod
    def clear_gradients(self) -> None:
        """Forget all gradients, also those that the engine keeps elsewhere."""

    @abstractmethod
    def weights(self, parameter: nn.Parameter) -> Tensor:
        """This process's shard of the weights that the optimizer updates, shape [N], writable."""

    @abstractmethod
    def publish_weights(self) -> None:
        """Bring weights that were written to `weights` to the model. A collective call."""

    # Passes and steps.

    @abstractmethod
    def accumulation(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """One forward and backward pass of several that add up; the last makes them final."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """The engine's own backward pass: gradients are averaged over the processes."""

    @abstractmethod
    def around_step(self, context: StepContext) -> contextlib.AbstractContextManager[Any]:
        """
        Context of a training step. If it is the last of an optimizer step, `context()` is entered
        after the gradients are averaged and before they are clipped, and left after the optimizer
        has updated the weights.
        """

    def abandon_step(self) -> None:  # noqa: B027 - nothing to leave where a step is one call
        """
        Leave the context of a step that has ended before its optimizer's step did, as an exception
        does. It leaves nothing on the optimizer.
        """

    def other_passes(self) -> contextlib.AbstractContextManager[Any]:
        """Forward and backward passes that call other modules than those of training do."""
        return contextlib.nullcontext()

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Forward and backward passes without mixed precision, where the engine can make them."""
        return contextlib.nullcontext()

    @property
    def epsilon(self) -> float:
        """
        The relative rounding of passes within `full_precision`: 0 in float32, that of bfloat16
        where weights or the engine are in it.
        """
        is_float32 = all(p.dtype == torch.float32 for p in self.model.parameters())
        return 0.0 if is_float32 else torch.finfo(torch.bfloat16).eps

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """
        Put random states (CPU and device) aside, and back at the end; start and end without
        gradients. Only between two optimizer steps, where engines keep no gradient of their own.
        """
        device = torch.get_device_module(self.device) if self.device.type != "cpu" else None
        cpu_state = torch.get_rng_state()
        device_state = device.get_rng_state() if device is not None else None
        self.clear_gradients()
        try:
            yield
        finally:
            torch.set_rng_state(cpu_state)
            if device is not None:
                device.set_rng_state(device_state)
            self.clear_gradients()

    # What the optimizer holds.

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """Class of the optimizer that updates the weights."""
        return type(self.optimizer)

    @abstractmethod
    def _optimizer_state(self, parameter: nn.Parameter) -> tuple[Mapping[str, Any], int]:
        """
        What the optimizer stores on this process for the tensor that holds the shard of `parameter`
        (nothing before its first step), and where in that tensor, flattened, the shard starts.
        """

    @abstractmethod
    def _optimizer_group(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The group of the optimizer that holds `parameter`."""

    def learning_rates(self) -> list[float]:
        """
        The learning rates at which the optimizer makes its steps now, one for each parameter. An
        optimizer that finds its own rates, and says so by `None`, counts as one of rate 1.
        """
        groups = [self._optimizer_group(parameter) for _, parameter in self.parameters]
        by_group = {id(group): group.get("lr") for group in groups}  # a tensor is read once
        rates = {key: 1.0 if rate is None else float(rate) for key, rate in by_group.items()}
        return [rates[id(group)] for group in groups]

    def second_moment(self, parameter: nn.Parameter) -> Tensor | None:
        """
        This process's shard of Adam's second moment, shape [N], float32; None before its first
        step, and of an optimizer without one.
        """
        state, start = self._optimizer_state(parameter)
        moment_N = adam_moments.second_moment(
            self.optimizer_class, state, start=start, size=self._shard(parameter).size
        )
        return None if moment_N is None else moment_N.to(self.device)  # paged states are elsewhere

    def check_no_copy(self, weights_before: Sequence[Tensor]) -> None:
        """
        After the optimizer's first step from these weights: make sure that it holds no copy of what
        they are now. A collective call.

        Raises:
            ValueError: it does. On every process.
        """
        distances = []
        for (_, parameter), before_N in zip(self.parameters, weights_before, strict=True):
            state, start = self._optimizer_state(parameter)
            distances += adam_moments.distances_from_weights(
                state, self.weights(parameter), before_N, start=start
            )
        adam_moments.check_no_copy(self.optimizer_class, self.from_all_processes(distances))

    # Communication: every one of these is a collective call.

    def sum_over_shards(self, values_PX: Tensor) -> Tensor:
        """Sum per-parameter scalars over the shards, one all-reduce for each process group."""
        for group, indices in self._shard_groups.items():
            part = values_PX[indices]
            dist.all_reduce(part, group=group)
            values_PX[indices] = part
        return values_PX

    def same_on_all(self, values: Tensor) -> Tensor:
        """
        Numbers that decide a step, computed on every process, as the first process has them.

        Replicas may add in another order (by the number of their threads, on another processor),
        and what they hold would part by the rounding of every step. One broadcast where processes
        hold the same entries; the shards of one replica need none.
        """
        if self.is_replicated and values.numel():
            dist.broadcast(values, src=0)
        return values

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """Sum a tensor over the data-parallel processes, one all-reduce."""
        return cast(Tensor, self.accelerator.reduce(value, reduction="sum"))

    def is_on_all(self, is_here: bool) -> bool:
        """Whether something is there on every process."""
        num = self.sum_over_processes(torch.tensor(float(is_here), device=self.device))
        return bool(num == self.num_processes)

    def from_first_process(self, make: Callable[[], Value]) -> Value:
        """
        What the first process makes, sent to all; the others do not call `make`.

        An eigenvector has no sign: processors of another kind may return its negative, and the
        shards of a basis row would not fit together.
        """
        values = [make() if self.process_index == 0 else None]
        if self.num_processes > 1:
            broadcast_object_list(values)
        return cast(Value, values[0])

    def from_all_processes(self, values: list[Value]) -> list[Value]:
        """The lists of all processes, one behind the other."""
        return gather_object(values)
