"""Which backend serves the engine that runs."""

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.engines.torch_engines import TorchBackend
from ogpsa_trl.engines.zero import make_zero_backend


def make_backend(
    accelerator: Accelerator, model: nn.Module, wrapped_model: nn.Module, optimizer: Any
) -> GradientBackend:
    """
    The backend of the engine that `accelerator` runs.

    Args:
        accelerator: The trainer's accelerator.
        model: The model that holds the parameters, not wrapped.
        wrapped_model: The model to call, wrapped by the engine.
        optimizer: The trainer's optimizer, wrapped by accelerate.

    Raises:
        ValueError: the parameters are sharded or spread over devices, although the engine is not.
    """
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    match accelerator.distributed_type:
        case DistributedType.DEEPSPEED:
            return make_zero_backend(accelerator, wrapped_model)
        case DistributedType.FSDP:
            return TorchBackend(accelerator, model, wrapped_model, optimizer)
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
                "sharded (a DTensor). Load the model without `tp_plan` or `distributed_config`, "
                "and shard it with `configs/accelerate/fsdp2.yaml`."
            )
    return TorchBackend(accelerator, model, wrapped_model, optimizer)


def one_process_backend(model: nn.Module) -> GradientBackend:
    """
    The backend of a model that is not in training, on one process: to take gradients of it.

    Raises:
        ValueError: several processes were launched, or the model is spread over devices.
    """
    accelerator = Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    if accelerator.num_processes > 1:
        raise ValueError(
            "Gradients of a model that is not in training are taken on one process, but "
            f"{accelerator.num_processes} were launched. Start the script with `python`."
        )
    return make_backend(accelerator, model, model, optimizer=None)
