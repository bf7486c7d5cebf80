"""
Where gradients live and when they are final: the interface, and PyTorch's own engines.

The mathematics above sees one interface, whatever the engine:

    device                     where tensors of this process live
    process_index, num_processes
    parameters                 (name, parameter) of all that is trained, same order everywhere
    shards                     the part of each flattened parameter that this process holds
    gradient(parameter)        its gradient there: flat, writable in place; None if it has none
    sum_over_shards(values)    per-parameter scalars, summed over the shards of its gradient
    sum_over_processes(value)  sum over the batches of all processes
    from_first_process(make)   a value that must not differ between the processes
    from_all_processes(values) the lists of all processes as one
    preserved()                context: what happens inside leaves no trace in training
    other_passes()             context of passes that call other modules than training does
    accumulation(is_last)      context of one forward and backward pass that adds to the gradients
    backward(loss)             the engine's own backward pass, without an optimizer step
    clear_gradients()          forget the gradients
    around_step(context)       context of a training step: enters `context()` when its gradients
                               are final, before they are clipped; leaves it after the optimizer
    weights(parameter)         this process's shard of what the optimizer updates, writable in place
    optimizer_class            class of the optimizer
    publish_weights()          bring what was written there to the model
    holds_weights              whether these weights are sharded as the gradients are; if not,
                               neither they nor the second moment can be asked for
    second_moment(parameter)   this process's shard of Adam's second moment; None if there is none

`TorchBackend` serves one process, DDP and FSDP2; DeepSpeed's ZeRO is in `zero`. Which engine has
which backend, and what is refused, says `engines`.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ogpsa_trl import optimizers

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
    """

    holds_weights = True

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        wrapped_model: nn.Module,
        optimizer: Optimizer,
    ) -> None:
        self.accelerator = accelerator
        self.wrapped_model = wrapped_model
        self.optimizer: Any = optimizer
        # `named_parameters` lists tied weights once, under the first of their names.
        self.parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
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

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """Class of the optimizer that updates the weights."""
        return type(self.optimizer)

    @property
    def is_sharded(self) -> bool:
        """Whether a process may hold less than the whole of a gradient."""
        return bool(self._shard_groups)

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
    def accumulation(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """One forward and backward pass of several that add up; the last makes them final."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """The engine's own backward pass: gradients are averaged over the processes."""

    @abstractmethod
    def clear_gradients(self) -> None:
        """Forget all gradients, also those that the engine keeps elsewhere."""

    @abstractmethod
    def around_step(self, context: StepContext) -> contextlib.AbstractContextManager[Any]:
        """
        Context of a training step. If it is the last of an optimizer step, `context()` is entered
        after the gradients are averaged and before they are clipped, and left after the optimizer
        has updated the weights.
        """

    @abstractmethod
    def weights(self, parameter: nn.Parameter) -> Tensor:
        """This process's shard of the weights that the optimizer updates, shape [N], writable."""

    @abstractmethod
    def publish_weights(self) -> None:
        """Bring weights that were written to `weights` to the model. A collective call."""

    @abstractmethod
    def _optimizer_state(self, parameter: nn.Parameter) -> tuple[Mapping[str, Any], int]:
        """
        What the optimizer stores on this process for the tensor that holds the shard of `parameter`
        (nothing before its first step), and where in that tensor, flattened, the shard starts.
        """

    def second_moment(self, parameter: nn.Parameter) -> Tensor | None:
        """
        This process's shard of Adam's second moment, shape [N], float32; None before its first
        step, and of an optimizer without one.
        """
        state, start = self._optimizer_state(parameter)
        moment_N = optimizers.second_moment(
            self.optimizer_class, state, start=start, size=self._shard(parameter).size
        )
        return None if moment_N is None else moment_N.to(self.device)  # paged states are elsewhere

    def other_passes(self) -> contextlib.AbstractContextManager[Any]:
        """Forward and backward passes that call other modules than those of training do."""
        return contextlib.nullcontext()

    def sum_over_shards(self, values_PX: Tensor) -> Tensor:
        """Sum per-parameter scalars over the shards, one all-reduce for each process group."""
        for group, indices in self._shard_groups.items():
            part = values_PX[indices]
            dist.all_reduce(part, group=group)
            values_PX[indices] = part
        return values_PX

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """Sum a tensor over the data-parallel processes, one all-reduce."""
        return cast(Tensor, self.accelerator.reduce(value, reduction="sum"))

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


class TorchBackend(GradientBackend):
    """
    Gradients in `parameter.grad`: replicated on one process and under DDP, DTensors under FSDP2.

    FSDP2 shards along the first dimension, in equal numbers of rows but for the last processes, so
    that a shard is one range of the flattened parameter. Under hybrid sharding (HSDP) the shards
    of one replica make up the gradient; the other replicas hold the same.

    Raises:
        ValueError: a trainable parameter is not sharded while others are (FSDP2 does not average
            its gradient), or is sharded in another way.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        whole = [name for name, p in self.parameters if not isinstance(p, DTensor)]
        if self.is_sharded and whole:
            raise ValueError(
                f"Under FSDP2 OGPSA needs every trainable parameter to be sharded, but {whole[0]!r}"
                " is not, so its gradient is not averaged. Freeze it, or take its module out of "
                "`ignored_modules`."
            )

    def _shard(self, parameter: nn.Parameter) -> Shard:
        total = parameter.numel()
        mesh_dim = _sharding_dim(parameter)
        if mesh_dim is None or not isinstance(parameter, DTensor):
            return Shard(0, total, total)
        num_rows, mesh = len(parameter), parameter.device_mesh
        first_row = mesh.get_local_rank(mesh_dim) * math.ceil(num_rows / mesh.size(mesh_dim))
        start = min(first_row, num_rows) * math.prod(parameter.shape[1:])
        return Shard(start, parameter.to_local().numel(), total)

    def _shard_group(self, parameter: nn.Parameter) -> ProcessGroup | None:
        mesh_dim = _sharding_dim(parameter)
        if mesh_dim is None or not isinstance(parameter, DTensor):
            return None
        return parameter.device_mesh.get_group(mesh_dim)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        if parameter.grad is None:
            return None
        if not parameter.grad.is_contiguous():  # a gradient has the strides of its parameter
            parameter.grad = parameter.grad.contiguous()
        return _local(parameter.grad).view(-1)

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """Put gradients aside too."""
        gradients = [parameter.grad for _, parameter in self.parameters]
        try:
            with super().preserved():
                yield
        finally:
            for (_, parameter), gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

    def accumulation(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """
        DDP averages the gradients over processes in the last pass only.

        FSDP2 does so in every pass: between two passes it would hold gradients that are not
        sharded, as large as the model.
        """
        if is_last or self.is_sharded:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.wrapped_model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clear_gradients(self) -> None:
        for _, parameter in self.parameters:
            parameter.grad = None

    @contextlib.contextmanager
    def around_step(self, context: StepContext) -> Iterator[None]:
        """Clipping and the optimizer's step come later, in the training loop."""
        yield
        if not self.accelerator.sync_gradients:
            return
        entered = context()
        entered.__enter__()

        def leave(*_: Any) -> None:
            handle.remove()
            entered.__exit__(None, None, None)

        handle = self.optimizer.register_step_post_hook(leave)

    def weights(self, parameter: nn.Parameter) -> Tensor:
        return _local(parameter.data).reshape(-1)  # a copy where it is not contiguous

    def publish_weights(self) -> None:
        """The optimizer's weights are the model's."""

    def _optimizer_state(self, parameter: nn.Parameter) -> tuple[Mapping[str, Any], int]:
        state = self.optimizer.state.get(parameter, {})
        return {key: _local(value) for key, value in state.items()}, 0


def _local(value: Any) -> Any:
    """This process's part of a DTensor; all else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def _sharding_dim(parameter: nn.Parameter) -> int | None:
    """The dimension of the device mesh along which a parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return None
    sharded = [dim for dim, placed in enumerate(parameter.placements) if not placed.is_replicate()]
    if not sharded:
        return None
    if len(sharded) > 1 or not parameter.placements[sharded[0]].is_shard(0):
        raise ValueError(
            "OGPSA supports parameters that are sharded along their first dimension, but here is "
            f"one with the placements {parameter.placements}. Train with FSDP2 alone, without "
            "tensor parallelism."
        )
    return sharded[0]
