"""Which training engines are supported, and what is refused by name."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    gather_object,
    str_to_bool,
)
from torch.distributed.fsdp import CPUOffloadPolicy

from ogpsa_trl.config import Target

logger = logging.getLogger(__name__)

# Engines under which every process holds all parameters and the averaged gradient.
_REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

# Parts of the names of optimizers that never hold an accumulated gradient.
_UPDATES_DURING_BACKWARD = ("lomo", "layerwise")

# Settings that offload, and their names in old DeepSpeed configurations.
_OLD_OFFLOAD = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}

# Settings of `zero_optimization` that change where gradients are; the value that turns each off.
_ZERO_OPTIONS = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_gradients": False,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zenflow": None,
}


def check_same_on_all(values: Mapping[str, Any]) -> None:
    """
    Make sure that all processes train on the same. A collective call.

    Collective calls answer each other by their order alone: a process with other samples would
    estimate another subspace without a word, or leave the others waiting for an answer.

    Args:
        values: What must be the same, by its name in words.

    Raises:
        ValueError: some process has another value than the first. On every process.
    """
    by_process = gather_object([dict(values)])
    for process_index, others in enumerate(by_process):
        for name in by_process[0] | others:
            first, other = by_process[0].get(name), others.get(name)
            if other != first:
                raise ValueError(
                    f"All processes must have the same {name}, but process 0 has {first} and "
                    f"process {process_index} has {other}. Start them with the same "
                    "configuration, and let them read the same files."
                )


def check_supported(
    accelerator: Accelerator, optimizer_name: str | None, target: Target = "gradient"
) -> None:
    """
    Refuse what is not tested, by name, before anything is trained.

    Args:
        accelerator: The trainer's accelerator.
        optimizer_name: `TrainingArguments.optim`. `None` where no gradient is asked for.
        target: `OGPSAConfig.target`.

    Raises:
        ValueError: engine, precision, compilation or optimizer is not supported.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.FSDP:
        _check_fsdp(state.fsdp_plugin)
    elif state.distributed_type == DistributedType.DEEPSPEED:
        plugin = state.deepspeed_plugin
        assert plugin is not None
        _check_deepspeed(plugin.deepspeed_config, target)
        if _dtypes(plugin.deepspeed_config) == (True, False):
            logger.warning(
                "DeepSpeed keeps gradients in bfloat16, so that the projection leaves their "
                "rounding: cosines of 5e-4 with the capability directions, instead of 1e-8. Set "
                '`"data_types": {"grad_accum_dtype": "fp32"}` in the DeepSpeed configuration, as '
                "configs/accelerate/*.json do."
            )
    elif state.distributed_type not in _REPLICATED:
        raise ValueError(
            f"OGPSA supports one process, DDP, FSDP2 and DeepSpeed ZeRO, but the engine of this "
            f"run is {state.distributed_type.value}. Launch with one of `configs/accelerate/`."
        )
    _check_parallelism(accelerator)
    dynamo = state.dynamo_plugin
    backend = DynamoBackend.NO if dynamo is None else dynamo.backend
    _check_arithmetic(state.mixed_precision, None if backend == DynamoBackend.NO else backend)
    _check_optimizer(optimizer_name)


def check_arguments(args: Any, target: Target) -> None:
    """
    Refuse what `TrainingArguments` already tell, before a model is loaded.

    Args:
        args: The arguments.
        target: `OGPSAConfig.target`.

    Raises:
        ValueError: see `check_supported`, which looks at what they were made into.
    """
    if args.deepspeed_plugin is not None:
        _check_deepspeed(args.deepspeed_plugin.deepspeed_config, target)
    fsdp = args.fsdp_plugin_args  # of the key `fsdp`; the launcher's are in the environment
    if fsdp is not None or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        _check_fsdp(FullyShardedDataParallelPlugin(**(fsdp or {})))
    _check_arithmetic(
        args.mixed_precision, args.torch_compile_backend if args.torch_compile else None
    )
    _check_optimizer(str(args.optim.value))


def _check_arithmetic(precision: str, compile_backend: str | None) -> None:
    if precision not in ("no", "bf16"):
        raise ValueError(
            "OGPSA supports `bf16: true` and full precision, but mixed precision is "
            f"{precision!r}. Set `fp16: false`, and `bf16: true` where the device has it."
        )
    if compile_backend is not None:
        raise ValueError(
            f"OGPSA does not support `torch_compile`, but it is on (backend {compile_backend}). "
            "Set `torch_compile: false`."
        )


def _check_optimizer(name: str | None) -> None:
    if name and any(word in name for word in _UPDATES_DURING_BACKWARD):
        raise ValueError(
            f"OGPSA projects the accumulated gradient, but the optimizer {name!r} updates the "
            "parameters during the backward pass and never holds it. Set `optim: adamw_torch`."
        )


def _check_parallelism(accelerator: Accelerator) -> None:
    """FSDP2 may shard within groups of processes (HSDP); all else splits a sample or a matrix."""
    config = accelerator.parallelism_config
    if config is None:
        return
    splits = {"tp_size": config.tp_size, "cp_size": config.cp_size, "sp_size": config.sp_size}
    split = ", ".join(f"`{name}: {size}`" for name, size in splits.items() if (size or 1) > 1)
    if split:
        raise ValueError(
            f"OGPSA supports data parallelism only, but `parallelism_config` sets {split} (tensor, "
            "context or sequence parallelism). Leave it at 1, and shard the model with "
            "`configs/accelerate/fsdp2.yaml`."
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            "OGPSA supports a `parallelism_config` under FSDP2 only, where it shards within groups "
            f"of processes, but the engine of this run is {accelerator.distributed_type.value}. "
            "Unset it, or launch with `configs/accelerate/hsdp.yaml`."
        )


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(
            "OGPSA supports FSDP2, but this run uses FSDP1 (`fsdp_version: 1`), which its authors "
            "will remove. Set `fsdp_version: 2`, as in `configs/accelerate/fsdp2.yaml`."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "OGPSA needs the gradients on the device, but `fsdp_offload_params` keeps them on the "
            "CPU. Set `fsdp_offload_params: false`; with less memory train with LoRA."
        )


def _check_deepspeed(config: dict[str, Any], target: Target) -> None:
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise ValueError(
            f"OGPSA supports DeepSpeed with ZeRO stage 1, 2 or 3, but `zero_optimization.stage` is "
            f"{stage!r}. Set it to 1, or launch with `configs/accelerate/ddp.yaml`."
        )
    for setting, old in _OLD_OFFLOAD.items():
        # DeepSpeed still turns the old one into the setting.
        device = "cpu" if zero.get(old) else (zero.get(setting) or {}).get("device", "none")
        if device != "none":
            raise ValueError(
                "OGPSA needs the gradients on the device, but `zero_optimization."
                f"{setting}.device` is {device!r}. Set it to 'none', and leave out the old "
                f"`{old}`; with less memory train with LoRA."
            )
    for setting, off in _ZERO_OPTIONS.items():
        value = zero.get(setting, off)
        if value != off:
            raise ValueError(
                f"OGPSA is not tested with `zero_optimization.{setting}`, but it is {value!r}. "
                f"Leave it out of the DeepSpeed configuration."
            )
    if stage == 1 and target == "update" and _dtypes(config) == (True, True):
        raise ValueError(
            "`target: update` needs gradients that are sharded as the optimizer's weights are, but "
            "with `zero_optimization.stage` 1, bf16 and `grad_accum_dtype` 'fp32' DeepSpeed keeps "
            "them whole. Set the stage to 2, as in `configs/accelerate/zero2.yaml`."
        )


def _dtypes(config: dict[str, Any]) -> tuple[bool, bool]:
    """Whether parameters are in bfloat16, and whether gradients are kept in float32."""
    is_bf16 = config.get("bf16", {}).get("enabled") in (True, "true")
    return is_bf16, config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
