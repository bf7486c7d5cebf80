"""Gradients under PyTorch's own engines: one process, DDP, FSDP2 and its hybrid form, HSDP."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ogpsa_trl.engines.backend import GradientBackend, Shard, StepContext

# Products in TF32 keep 10 bits.
_EPSILON_OF_TF32 = 2.0**-10


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
        total, sharding = parameter.numel(), _sharding(parameter)
        if sharding is None:
            return Shard(0, total, total)
        num_rows, (mesh, dim) = len(parameter), sharding
        first_row = mesh.get_local_rank(dim) * math.ceil(num_rows / mesh.size(dim))
        start = min(first_row, num_rows) * math.prod(parameter.shape[1:])
        return Shard(start, _local(parameter).numel(), total)

    def _shard_group(self, parameter: nn.Parameter) -> ProcessGroup | None:
        sharding = _sharding(parameter)
        return None if sharding is None else sharding[0].get_group(sharding[1])

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


def _sharding(parameter: nn.Parameter) -> tuple[DeviceMesh, int] | None:
    """The device mesh, and its dimension, along which a parameter is sharded."""
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
    return parameter.device_mesh, sharded[0]
