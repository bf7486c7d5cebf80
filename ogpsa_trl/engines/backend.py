"""
Where gradients live and when they are final: the interface, and PyTorch's own engines.

The mathematics above sees one interface, whatever the engine:

    device                     where tensors of this process live
    process_index, num_processes
    parameters                 (name, parameter) of all that is trained, same order everywhere
    shards                     the part of each flattened parameter that this process holds
    gradient(parameter)        its gradient there: flat, writable in place; None if it has none
    sum_over_shards(values)    per-parameter scalars, summed over the shards of its gradient
    same_on_all(values)        numbers that decide a step, which replicas must not part by
    sum_over_processes(value)  sum over the batches of all processes
    from_first_process(make)   a value that must not differ between the processes
    from_all_processes(values) the lists of all processes as one
    preserved()                context: what happens inside leaves no trace in training
    other_passes()             context of passes that call other modules than training does
    full_precision()           context of passes in float32, where the engine can make them
    epsilon                    relative rounding of the passes in there
    accumulation(is_last)      context of one forward and backward pass that adds to the gradients
    backward(loss)             the engine's own backward pass, without an optimizer step
    clear_gradients()          forget the gradients
    around_step(context)       context of a training step: enters `context()` when its gradients
                               are final, before they are clipped; leaves it after the optimizer
    abandon_step()             leaves that context where an exception has ended the step
    weights(parameter)         this process's shard of what the optimizer updates, writable in place
    optimizer_class            class of the optimizer
    publish_weights()          bring what was written there to the model
    check_no_copy()            refuse an optimizer that holds another copy of them
    holds_weights              whether these weights are sharded as the gradients are; if not,
                               neither they nor the second moment can be asked for
    has_length_before_step     whether the trainer has the gradient's length before the step
    second_moment(parameter)   this process's shard of Adam's second moment; None if there is none
    learning_rates()           of every parameter in this step; 0 where the optimizer holds it not

`TorchBackend` serves one process, DDP and FSDP2; DeepSpeed's ZeRO is in `zero`. Which engine has
which backend, and what is refused, says `engines`.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ogpsa_trl.engines import adam_moments

# Products in TF32 keep 10 bits.
_EPSILON_OF_TF32 = 2.0**-10

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
    # Whether the trainer knows the length of the gradient before the optimizer's step.
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
        # Whether several processes hold the same entries: those of DDP, the replicas of HSDP.
        num_shards = [group.size() for group in self._shard_groups] or [1]
        self.is_replicated = min(num_shards) < self.num_processes

    @property
    def optimizer_class(self) -> type[Optimizer]:
        """Class of the optimizer that updates the weights."""
        return type(self.optimizer)

    @property
    def is_sharded(self) -> bool:
        """Whether a process may hold less than the whole of a gradient."""
        return bool(self._shard_groups)

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

    def abandon_step(self) -> None:  # noqa: B027 - nothing to leave where a step is one call
        """
        Leave the context of a step that has ended before its optimizer's step did, as an exception
        does. It leaves nothing on the optimizer.
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

    def other_passes(self) -> contextlib.AbstractContextManager[Any]:
        """Forward and backward passes that call other modules than those of training do."""
        return contextlib.nullcontext()

    @property
    def epsilon(self) -> float:
        """
        The relative rounding of passes within `full_precision`: 0 in float32, that of bfloat16
        where weights or the engine are in it.
        """
        is_float32 = all(p.dtype == torch.float32 for p in self.model.parameters())
        return 0.0 if is_float32 else torch.finfo(torch.bfloat16).eps

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Forward and backward passes without mixed precision, where the engine can make them."""
        return contextlib.nullcontext()

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
        """Whether something is there on every process. A collective call."""
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

    has_length_before_step = True

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        wrapped_model: nn.Module,
        optimizer: Optimizer,
    ) -> None:
        self._groups: dict[nn.Parameter, Mapping[str, Any]] = {}
        if optimizer is not None:  # its own groups, of which schedules change the rates
            self._groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        super().__init__(accelerator, model, wrapped_model, optimizer)
        # Undoes what a step has put on the optimizer.
        self._step = contextlib.ExitStack()
        whole = [name for name, p in self.parameters if not isinstance(p, DTensor)]
        if self.is_sharded and whole:
            raise ValueError(
                f"Under FSDP2 OGPSA needs every trainable parameter to be sharded, but {whole[0]!r}"
                " is not, so its gradient is not averaged. Freeze it, or take its module out of "
                "`ignored_modules`."
            )

    def _is_held(self, parameter: nn.Parameter) -> bool:
        return self.optimizer is None or parameter in self._groups

    def _optimizer_group(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        return self._groups[parameter]

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
        """Put gradients aside too, also those that no optimizer uses: clipping reads them."""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        try:
            with super().preserved():
                yield
        finally:
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
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
        for parameter in self.model.parameters():
            parameter.grad = None

    @property
    def epsilon(self) -> float:
        """0 in float32; on a GPU, that of TF32 where it is on."""
        if not self._has_full_precision:
            return torch.finfo(torch.bfloat16).eps
        is_on = self.device.type != "cpu" and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return _EPSILON_OF_TF32 if is_on or self._takes_tf32 else 0.0

    @property
    def _takes_tf32(self) -> bool:
        """In place of bfloat16. Who trains in float32 has chosen the precision of products."""
        return self.device.type != "cpu" and self.accelerator.mixed_precision == "bf16"

    @property
    def _has_full_precision(self) -> bool:
        """Kernels of FlashAttention know no float32, nor do weights that are not."""
        config: Any = self.model.config
        parts = (config, config.get_text_config())
        is_flash = any("flash" in str(part._attn_implementation) for part in parts)
        return super().epsilon == 0 and not is_flash

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """
        Without autocast, and in FSDP2 with the parameters gathered as they are sharded. On a GPU
        products are then made in TF32, which keeps 10 bits at half the speed of bfloat16.
        """
        if not self._has_full_precision:
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(_without_autocast(self.model))
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    stack.enter_context(_gathered_in_float32(module))
            if self._takes_tf32:
                # Not by `set_float32_matmul_precision`, which fails after `tf32: true`.
                matmul = torch.backends.cuda.matmul
                own = matmul.fp32_precision
                matmul.fp32_precision = "none"  # that of all products of torch
                if matmul.fp32_precision == own:
                    own = "none"  # what `tf32: true` of a later training sets has to reach it
                stack.callback(setattr, matmul, "fp32_precision", own)
                matmul.fp32_precision = "tf32"
            yield

    @contextlib.contextmanager
    def around_step(self, context: StepContext) -> Iterator[None]:
        """Clipping and the optimizer's step come later, in the training loop."""
        yield
        if not self.accelerator.sync_gradients:
            return
        self._step.enter_context(context())
        handle = self.optimizer.register_step_post_hook(lambda *_: self._step.close())
        self._step.callback(handle.remove)  # called first

    def abandon_step(self) -> None:
        # As by an exception, so that what follows the optimizer's step is left out.
        abandoned = RuntimeError("The optimizer has not made its step.")
        self._step.__exit__(RuntimeError, abandoned, None)

    def weights(self, parameter: nn.Parameter) -> Tensor:
        return _local(parameter.data).reshape(-1)  # a copy where it is not contiguous

    def publish_weights(self) -> None:
        """The optimizer's weights are the model's."""

    def _optimizer_state(self, parameter: nn.Parameter) -> tuple[Mapping[str, Any], int]:
        state = self.optimizer.state.get(parameter, {})
        return {key: _local(value) for key, value in state.items()}, 0


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """
    Take off what `Accelerator.prepare_model` (1.15) has put around `forward`: autocast, and a cast
    of the outputs; twice where `auto_find_batch_size` has started again.
    """
    own: Any = model.__dict__.get("forward")
    forward = own
    while isinstance(getattr(forward, "__wrapped__", None), ConvertOutputsToFp32):
        forward = forward.__wrapped__.model_forward.__wrapped__
    if forward is own:
        yield
        return
    model.forward = MethodType(forward, model) if isinstance(own, MethodType) else forward
    try:
        yield
    finally:
        model.forward = own


@contextlib.contextmanager
def _gathered_in_float32(module: FSDPModule) -> Iterator[None]:
    """
    Let FSDP2 gather the parameters of one module without `MixedPrecisionPolicy`.

    It has no switch for that (torch 2.13): the policy is read where a group of parameters is made,
    and kept beside each parameter together with the tensor that it is gathered into.
    """
    state = module._get_fsdp_state()
    group, policy = state._fsdp_param_group, state._mp_policy
    params = [] if group is None else group.fsdp_params

    def gather_by(new_policy: MixedPrecisionPolicy, gathered: Sequence[tuple[Any, Any]]) -> None:
        module.reshard()
        state._mp_policy = new_policy
        if group is not None:
            group.mp_policy = new_policy
            group._init_mp_dtypes()
        for param, (outputs, unsharded) in zip(params, gathered, strict=True):
            param.all_gather_outputs = outputs
            if unsharded is not None:
                param._unsharded_param = unsharded
            elif "_unsharded_param" in param.__dict__:
                del param._unsharded_param

    known = [(p.all_gather_outputs, p.__dict__.get("_unsharded_param")) for p in params]
    gather_by(MixedPrecisionPolicy(), [([], None) for _ in params])
    try:
        yield
    finally:
        gather_by(policy, known)


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
