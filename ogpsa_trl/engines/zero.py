"""
Gradients under DeepSpeed: ZeRO-1, ZeRO-2 and ZeRO-3.

DeepSpeed's optimizers keep averaged gradients in buffers of their own, and accelerate calls
`engine.step` right after `engine.backward`, inside the training step. So the gradients are read and
written in those buffers, and between those two calls. Read in deepspeed 0.19.8; what is used of its
internals is pinned by tests/test_upstream.py.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ogpsa_trl.engines.backend import GradientBackend, Shard, StepContext


class DeepSpeedBackend(GradientBackend):
    """
    What the stages share: backward pass and step are methods of the engine.

    Args:
        accelerator: The trainer's accelerator.
        engine: The `DeepSpeedEngine`.
    """

    def __init__(self, accelerator: Accelerator, engine: Any) -> None:
        self.engine = engine
        super().__init__(accelerator, engine.module, engine, engine.optimizer)

    @property
    def optimizer_class(self) -> type[Optimizer]:
        return type(self.optimizer.optimizer)

    def accumulation(self, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """The engine makes gradients final in a pass that it knows to be the last."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def around_step(self, context: StepContext) -> Iterator[None]:
        """
        Clipping is a part of `engine.step`.

        Raises:
            RuntimeError: the training step ended without `engine.step`.
        """
        step = self.engine.step
        is_done = False

        def step_in_context(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_done
            is_done = True
            with context():
                return step(*args, **kwargs)

        self.engine.step = step_in_context
        try:
            yield
        finally:
            del self.engine.step  # the method of the class comes back
        if self.accelerator.sync_gradients and not is_done:
            raise RuntimeError(
                "The training step ended without a step of the DeepSpeed engine, so no gradient "
                "was projected. This version of accelerate or deepspeed calls it elsewhere: use "
                "the versions that `pip show ogpsa_trl` requires."
            )


class Zero12Backend(DeepSpeedBackend):
    """
    ZeRO-1 and ZeRO-2: each process holds one range of all trained parameters laid end to end.

    A parameter may lie in it with all, some or none of its entries.
    """

    def __init__(self, accelerator: Accelerator, engine: Any) -> None:
        self._group_of = {
            parameter: index
            for index, parameters in enumerate(engine.optimizer.bit16_groups)
            for parameter in parameters
        }
        super().__init__(accelerator, engine)

    def _shard(self, parameter: Any) -> Shard:
        mapping = parameter._hp_mapping
        if mapping is None:
            return Shard(0, 0, parameter.numel())
        address = mapping.lp_fragment_address
        return Shard(address.start, address.numel, parameter.numel())

    def _shard_group(self, parameter: Any) -> ProcessGroup | None:  # noqa: ARG002
        return self.optimizer.dp_process_group

    def gradient(self, parameter: Any) -> Tensor | None:
        mapping, gradients = parameter._hp_mapping, self.optimizer.averaged_gradients
        if mapping is None or gradients.get(mapping.param_group_index) is None:
            return None
        gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        assert gradient.numel() == mapping.lp_fragment_address.numel
        return gradient.view(-1)

    def weights(self, parameter: Any) -> Tensor:
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.zeros(0, device=self.device)
        return mapping.hp_fragment.data.view(-1)

    def publish_weights(self) -> None:
        self.optimizer.update_lp_params()

    def _optimizer_group(self, parameter: Any) -> Mapping[str, Any]:
        return self.optimizer.param_groups[self._group_of[parameter]]

    def _optimizer_state(self, parameter: Any) -> tuple[Mapping[str, Any], int]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return {}, 0
        flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return self.optimizer.optimizer.state.get(flat, {}), mapping.hp_fragment_address.start

    def clear_gradients(self) -> None:
        """What the optimizer itself does when it skips a step; otherwise it would add up."""
        optimizer = self.optimizer
        optimizer.zero_grad()
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None


class Zero1BF16Backend(DeepSpeedBackend):
    """
    ZeRO-1 with parameters in bfloat16 and gradients in float32: an optimizer of its own.

    It shards its weights and state only: all gradients are whole on every process, and clipped
    there.
    """

    holds_weights = False

    def __init__(self, accelerator: Accelerator, engine: Any) -> None:
        self._position = {
            parameter: (group, index)
            for group, parameters in enumerate(engine.optimizer.bf16_groups)
            for index, parameter in enumerate(parameters)
        }
        super().__init__(accelerator, engine)

    def _shard(self, parameter: Any) -> Shard:
        return Shard(0, parameter.numel(), parameter.numel())

    def _shard_group(self, parameter: Any) -> ProcessGroup | None:  # noqa: ARG002
        return None

    def gradient(self, parameter: Any) -> Tensor | None:
        group, index = self._position[parameter]
        if not self.optimizer.fp32_groups_has_gradients[group][index]:
            return None
        return self.optimizer.fp32_groups_gradients[group][index].view(-1)

    def weights(self, parameter: Any) -> Tensor:
        raise NotImplementedError("The weights of this optimizer are not sharded as its gradients.")

    publish_weights = _optimizer_state = _optimizer_group = weights  # pyright: ignore[reportAssignmentType]

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad()


class Zero3Backend(DeepSpeedBackend):
    """ZeRO-3: each process holds one range of every parameter; the last ranges may be short."""

    def _shard(self, parameter: Any) -> Shard:
        total: int = parameter.ds_numel
        per_process: int = parameter.partition_numel()
        start = min(dist.get_rank(self._shard_group(parameter)) * per_process, total)
        return Shard(start, min(per_process, total - start), total)

    def _shard_group(self, parameter: Any) -> ProcessGroup | None:
        return parameter.ds_process_group

    def gradient(self, parameter: Any) -> Tensor | None:
        if not self.optimizer._epilogue_ran_this_backward:
            return None  # the buffers are there, but hold what an earlier step left
        buffer, _ = self.optimizer._get_fp32_grad_state_partition(
            parameter, release_swap_buffers=False
        )
        return buffer.narrow(0, 0, self._shard(parameter).size)

    def weights(self, parameter: Any) -> Tensor:
        weights, _ = self.optimizer._get_fp32_opt_state_partition(
            parameter, release_swap_buffers=False
        )
        return weights.data.view(-1).narrow(0, 0, self._shard(parameter).size)

    def publish_weights(self) -> None:
        """To the partitions of the model, and from there to the parameters kept whole."""
        optimizer = self.optimizer
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        persistent = optimizer.persistent_parameters
        if persistent:  # marked as gathered: `all_gather` alone would skip them
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)

    @contextlib.contextmanager
    def other_passes(self) -> Iterator[None]:
        """
        DeepSpeed gathers parameters ahead in the order of the last pass. What a pass of another
        order is given ahead is taken from it again before its backward pass. Where the order is
        forgotten the next pass gathers as it goes, and is recorded.
        """
        coordinator = self.optimizer.parameter_offload.get_param_coordinator()

        def forget_order() -> None:
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

        forget_order()
        try:
            yield
        finally:
            forget_order()

    def _optimizer_state(self, parameter: Any) -> tuple[Mapping[str, Any], int]:
        group, start, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        flat = self.optimizer.fp32_partitioned_groups_flat[group]
        return self.optimizer.optimizer.state.get(flat, {}), start

    def _optimizer_group(self, parameter: Any) -> Mapping[str, Any]:
        group, _, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return self.optimizer.param_groups[self.optimizer.sub_group_to_group_id[group]]

    def clear_gradients(self) -> None:
        """
        The next backward pass overwrites what it reaches. The rest is set to zero, as a parameter
        that no capability loss reaches would keep the gradient of the last training step.
        """
        self.optimizer.zero_grad()
        self.optimizer.grad_partitions_flat_buffer.zero_()


def make_zero_backend(accelerator: Accelerator, engine: Any) -> DeepSpeedBackend:
    """The backend of a `DeepSpeedEngine` of stage 1, 2 or 3."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    if isinstance(engine.optimizer, BF16_Optimizer):
        return Zero1BF16Backend(accelerator, engine)
    if engine.zero_optimization_stage() == 3:
        return Zero3Backend(accelerator, engine)
    return Zero12Backend(accelerator, engine)
