"""
Where gradients live and when they are final: the only module that knows the training engine.

The mathematics above sees one interface, whatever the engine:

    device                     where tensors of this process live
    process_index, num_processes
    parameters                 (name, parameter) of all that is trained, same order everywhere
    gradient(parameter)        this process's shard, flat, writable in place, or None
    sum_over_shards(values)    per-parameter scalars, summed over the shards of its gradient
    sum_over_processes(value)  sum over the batches of all processes
    preserved()                context: what happens inside leaves no trace in training
    accumulation(is_last)      context of one forward and backward pass that adds to the gradients
    backward(loss)             the engine's own backward pass, without an optimizer step
    clear_gradients()          forget the gradients
    when_final(action)         context of a training step: runs `action` on the final gradients

`TorchBackend` implements it for one process and DDP. Everything else is refused by name.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Engines under which every process holds all parameters and the averaged gradient.
_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

# Parts of the names of optimizers that never hold an accumulated gradient.
_UPDATES_DURING_BACKWARD = ("lomo", "layerwise")


class TorchBackend:
    """
    Gradients in `parameter.grad`, replicated on every process: one process and DDP.

    Args:
        accelerator: The trainer's accelerator.
        model: The model that holds the parameters, not wrapped.
        wrapped_model: The model to call, wrapped by the engine (the same object on one process).
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, wrapped_model: nn.Module
    ) -> None:
        self.accelerator = accelerator
        self.wrapped_model = wrapped_model
        # `named_parameters` lists tied weights once, under the first of their names.
        self.parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.device = accelerator.device
        self.process_index = accelerator.process_index
        self.num_processes = accelerator.num_processes

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This process's shard of the gradient, shape [N]. Writing into it changes the gradient."""
        if parameter.grad is None:
            return None
        if not parameter.grad.is_contiguous():  # a gradient has the strides of its parameter
            parameter.grad = parameter.grad.contiguous()
        return parameter.grad.view(-1)

    def sum_over_shards(self, values_PX: Tensor) -> Tensor:
        """Sum per-parameter scalars over the shards: replicated gradients have one."""
        return values_PX

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """Sum a tensor over the data-parallel processes, one all-reduce."""
        return cast(Tensor, self.accelerator.reduce(value, reduction="sum"))

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """Put gradients and random states (CPU and device) aside, and back at the end."""
        gradients = [parameter.grad for _, parameter in self.parameters]
        device = torch.get_device_module(self.device) if self.device.type != "cpu" else None
        cpu_state = torch.get_rng_state()
        device_state = device.get_rng_state() if device is not None else None
        try:
            self.clear_gradients()
            yield
        finally:
            torch.set_rng_state(cpu_state)
            if device is not None:
                device.set_rng_state(device_state)
            for (_, parameter), gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

    def accumulation(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """One pass of several: DDP averages the gradients over processes in the last only."""
        if is_last:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.wrapped_model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def clear_gradients(self) -> None:
        for _, parameter in self.parameters:
            parameter.grad = None

    @contextlib.contextmanager
    def when_final(self, action: Callable[[], None]) -> Iterator[None]:
        """
        Run `action` after the training step inside, if that was the last one of an optimizer step.

        Clipping comes later, in the training loop, and so acts on what `action` leaves.
        """
        yield
        if self.accelerator.sync_gradients:
            action()


def check_supported(accelerator: Accelerator, optimizer_name: str) -> None:
    """
    Refuse what is not tested, by name, before anything is trained.

    Args:
        accelerator: The trainer's accelerator.
        optimizer_name: `TrainingArguments.optim`.

    Raises:
        ValueError: engine, precision, compilation or optimizer is not supported.
    """
    state = accelerator.state
    if state.distributed_type not in _REPLICATED:
        raise ValueError(
            f"OGPSA supports one process and DDP, but the engine of this run is "
            f"{state.distributed_type.value}. Launch with `configs/accelerate/single.yaml` or "
            "`configs/accelerate/ddp.yaml`, and unset `fsdp` and `deepspeed`."
        )
    if accelerator.parallelism_config is not None:
        raise ValueError(
            "OGPSA supports data parallelism only, but a `parallelism_config` (tensor, context or "
            "sequence parallelism) is set. Unset it."
        )
    if state.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            "OGPSA supports `bf16: true` and full precision, but mixed precision is "
            f"{state.mixed_precision!r}. Set `fp16: false`, and `bf16: true` where the device has"
            " it."
        )
    dynamo = state.dynamo_plugin
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        raise ValueError(
            f"OGPSA does not support `torch_compile`, but it is on (backend "
            f"{dynamo.backend}). Set `torch_compile: false`."
        )
    if any(word in optimizer_name for word in _UPDATES_DURING_BACKWARD):
        raise ValueError(
            f"OGPSA projects the accumulated gradient, but the optimizer {optimizer_name!r} "
            "updates the parameters during the backward pass and never holds it. Set `optim: "
            "adamw_torch`."
        )


def make_backend(
    accelerator: Accelerator, model: nn.Module, wrapped_model: nn.Module
) -> TorchBackend:
    """
    The backend of the engine that `accelerator` runs.

    Raises:
        ValueError: the parameters are sharded or spread over devices, although the engine is not.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"OGPSA supports models on one device per process, but this one is spread over "
            f"{', '.join(devices)}. Load it without `device_map`, and launch one process per GPU."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"OGPSA supports parameters that every process holds whole, but {name!r} is "
                "sharded (a DTensor). Load the model without `tp_plan` or `distributed_config`."
            )
    return TorchBackend(accelerator, model, wrapped_model)
