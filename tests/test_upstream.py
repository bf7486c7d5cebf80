"""What we rely on in the libraries below. A failure here means: they moved, read their source."""

import inspect
import pkgutil
import re
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from transformers import RwkvConfig, RwkvForCausalLM, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOTrainer, RLOOTrainer

from runs import capability_groups, make_trainer


def source(function):
    return inspect.getsource(unwrapped(function))


def unwrapped(function):
    """DeepSpeed's profiling hides a function in that of its decorator."""
    is_hidden = getattr(function, "__name__", None) == "wrapped_fn"
    return inspect.getclosurevars(function).nonlocals["func"] if is_hidden else function


class Order(NamedTuple):
    """
    Pieces that stand in the source of something one after the other.

    Attributes:
        law: What we rely on.
        place: Module and name of what is read.
        pieces: What stands there. Spaces and line breaks count as one space.
    """

    law: str
    place: str
    pieces: tuple[str, ...]


TRAINER = "transformers:Trainer"
DEEPSPEED_ENGINE = "deepspeed:DeepSpeedEngine"
ZERO12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
ENGINE_OF_ACCELERATE = "accelerate.utils.deepspeed:DeepSpeedEngineWrapper"
BUFFER = "self.__param_id_to_grad_partition[param.ds_id]"

ORDERS = [
    Order("refresh before the first micro-batch, projection in the last, clipping, step",
        f"{TRAINER}._run_epoch",
        ("_set_sync_gradients(do_sync_step)", "on_step_begin", "self.training_step(",
        "_clip_grad_norm(", "on_pre_optimizer_step", "self.optimizer.step()", "on_optimizer_step",
        "model.zero_grad()")),
    Order("a refresh cannot change the order of the data",
        f"{TRAINER}._run_epoch", ("get_batch_samples(", "on_step_begin")),
    Order("a step ends for callbacks before it is logged and saved",
        f"{TRAINER}._run_epoch", ("on_step_end(", "_maybe_log_save_evaluate(")),
    Order("the model is wrapped before a checkpoint is loaded",
        f"{TRAINER}._prepare_for_training",
        ("self, max_steps, train_dataloader, resume_from_checkpoint):",
        "self.model_wrapped = model", "_load_optimizer_and_scheduler(")),
    Order("a checkpoint that has `trainer_state.json` has our files, and is deleted last",
        f"{TRAINER}._save_checkpoint",
        ("self._get_output_dir(trial=trial)", "if not self.args.save_only_model:",
        "_save_optimizer_and_scheduler(", "save_to_json(", "rotate_checkpoints(")),
    Order("the best checkpoint has its name before old ones go",
        f"{TRAINER}._save_checkpoint",
        ("self.save_model(", "self.state.best_global_step",
        "self.state.best_model_checkpoint = best_checkpoint_dir", "save_to_json(")),
    Order("without a name of its metric the mark of the best checkpoint is left to us",
        f"{TRAINER}._determine_best_metric",
        ("if self.args.metric_for_best_model is not None:", "best_global_step =")),
    Order("every process takes part in saving: none is left out before",
        f"{TRAINER}._maybe_log_save_evaluate",
        ("if self.control.should_save:", "self._save_checkpoint(model, trial)")),
    Order("only without an engine one process saves the optimizer alone",
        f"{TRAINER}._save_optimizer_and_scheduler",
        ("elif self.is_deepspeed_enabled:", "self.model_wrapped.save_checkpoint(output_dir)",
        "elif self.is_fsdp_enabled:", "save_fsdp_optimizer(", "elif self.args.should_save:")),
    Order("it takes the step of transformers",
        "trl:SFTTrainer.training_step", ("super().training_step(*args, **kwargs)",)),
    Order("it takes the step of transformers",
        "trl:DPOTrainer.training_step", ("super().training_step(*args, **kwargs)",)),
    Order("it logs as transformers does",
        "trl:SFTTrainer.log", ("self.model.training", "super().log(")),
    Order("it logs as transformers does",
        "trl:DPOTrainer.log", ("self.model.training", "super().log(")),
    # What `ogpsa_trl/engines/zero.py` reads and writes, and when.
    Order("the projection stands in front of `engine.step`, looked up on the engine",
        f"{ENGINE_OF_ACCELERATE}.backward",
        ("self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)",
        "self.engine.backward(loss, **kwargs)", "if sync_gradients:", "self.engine.step()")),
    Order("accelerate says which pass is the last", "accelerate:Accelerator.backward",
        ("deepspeed_engine_wrapped.backward(loss, sync_gradients=self.sync_gradients",)),
    Order("the trainer has divided the loss by the number of passes",
        f"{TRAINER}.training_step",
        ("== DistributedType.DEEPSPEED:", 'kwargs["scale_wrt_gas"] = False',
        "self.accelerator.backward(loss, **kwargs)")),
    Order("the engine can leave that out, in training and in a refresh",
        f"{DEEPSPEED_ENGINE}.backward",
        ("scale_wrt_gas=", "loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss")),
    Order("a boundary that was set decides when gradients are final, not a count of passes",
        f"{DEEPSPEED_ENGINE}.is_gradient_accumulation_boundary",
        ("if self._is_gradient_accumulation_boundary is None:",
        "(self.micro_steps + 1) % self.gradient_accumulation_steps()",
        "return self._is_gradient_accumulation_boundary")),
    Order("ZeRO-1 with bfloat16 parameters and float32 gradients is BF16_Optimizer",
        f"{DEEPSPEED_ENGINE}._do_optimizer_sanity_check",
        ("if zero_enabled:", "model_dtype == torch.bfloat16 and grad_accum_dtype == torch.float32",
        "== 1 and not self.zero_cpu_offload():", "return BFLOAT16", "return ZERO_OPTIMIZATION")),
    Order("made here", f"{DEEPSPEED_ENGINE}._configure_bf16_optimizer", ("BF16_Optimizer(",)),
    Order("`clear_gradients` does what a skipped step of ZeRO-1 and 2 does; clipping comes after",
        f"{ZERO12}.step",
        ("if self.overflow:", "self.zero_grad(set_to_none=True)",
        "self._release_preflattened_grad_buffers()", "for k in self.averaged_gradients.keys():",
        "self.averaged_gradients[k] = None", "self.all_grad_tensors[k] = None",
        "self.unscale_and_clip_grads(")),
    Order("gradients are complete when `engine.backward` returns, also with `overlap_comm`",
        f"{ZERO12}.independent_gradient_partition_epilogue",
        ("if self.overlap_comm:", "get_accelerator().synchronize()",
        "if self.is_gradient_accumulation_boundary():",
        "self.averaged_gradients[i] = self.get_flat_partition(")),
    Order("the part of a gradient is a view, not a copy",
        "deepspeed.utils.tensor_fragment:tensor_fragment",
        ("lp_fragment_address:", "param_group_index:", "def get_lp_grad_fragment(",
        "return gradient_dict[self.param_group_index][index_in_param_group]")),
    Order("which begins and ends here", "deepspeed.utils.tensor_fragment:fragment_address",
        ("numel: int", "start: int")),
    Order("where a process holds none of a parameter there is no mapping",
        "deepspeed.utils.mixed_precision_linkage:_init_lp_to_hp_mapping",
        ("lp_param._hp_mapping = None", "if in_partition:",
        "lp_param._index_in_param_group = index_in_param_group")),
    Order("BF16_Optimizer keeps whole gradients in float32, with a flag for each that has one",
        BF16,
        ("self.bf16_groups.append(trainable_parameters)",
        "self.fp32_groups_gradients[group_idx][param_idx]",
        "self.fp32_groups_has_gradients[group_idx][param_idx] = True")),
    Order("`zero_grad` clears them", f"{BF16}.zero_grad", ("self.clear_hp_grads()",)),
    Order("gradients and flags", f"{BF16}.clear_hp_grads",
        ("flat_gradients.zero_()", "self.fp32_groups_has_gradients[i] = [False]")),
    Order("ZeRO-3: `zero_grad` makes the next pass the first, and says that no gradient is there",
        f"{ZERO3}.zero_grad",
        ("self.micro_step_id = 0", "self._epilogue_ran_this_backward = False")),
    Order("the first pass overwrites the buffer, the others add; processes have equal ranges",
        f"{ZERO3}.partition_grads",
        ("param.partition_numel() * self._get_param_partition_rank(param) < param.ds_numel",
        "if self.micro_step_id == 0:", "grad_buffer.copy_(", "grad_buffer.add_(")),
    Order("it is there after the last", f"{ZERO3}.independent_gradient_partition_epilogue",
        ("self.reduce_and_partition_stream.synchronize()",
        "self._epilogue_ran_this_backward = True")),
    Order("every parameter has a range of one buffer", ZERO3,
        (f"{BUFFER} = self.grad_partitions_flat_buffer.narrow(",)),
    Order("which is returned, not a copy: it can be set to zero",
        f"{ZERO3}._get_fp32_grad_state_partition",
        (f"fp32_grad = {BUFFER}", "return fp32_grad, group_idx")),
    *(
        Order("what a parameter knows of its partition",
            "deepspeed.runtime.zero.partition_parameters:Init", (piece,))
        for piece in ("param.ds_numel = param.numel()", "param.ds_process_group = ",
            "param.partition_numel = partition_numel")
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "order", ORDERS, ids=lambda order: f"{order.place.partition(':')[2]}: {order.law}"
)
def test_the_source_still_says(order):
    if "deepspeed" in order.place:
        pytest.importorskip("deepspeed")
    text = " ".join(source(pkgutil.resolve_name(order.place)).split())
    positions = [text.index(piece) for piece in order.pieces]
    assert positions == sorted(positions)


def test_no_process_is_left_out_before_the_optimizer_is_saved():
    """Each writes its shards of the subspace there."""
    before, _, _ = source(Trainer._save_checkpoint).partition("_save_optimizer_and_scheduler(")
    assert "args.should_save" not in before
    assert "process_zero" not in source(Trainer._maybe_log_save_evaluate) + before


def test_gradient_checkpointing_needs_this_attribute_and_training_mode():
    assert GradientCheckpointingLayer.gradient_checkpointing is False
    text = source(GradientCheckpointingLayer)
    assert re.search(r"self\.gradient_checkpointing and self\.training", text)


def test_checkpointing_is_at_work_during_a_refresh(base_model_path, tmp_path):
    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(),
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer.train()
    calls = []
    layer = trainer.model.model.layers[0]
    original = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    trainer.refresh_subspace()
    parts = [part for group in trainer.capability_groups for part in group.parts()]
    assert len(calls) == sum(part.num_batches_of(1) for part in parts)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_trainer_accumulates_by_itself(stage, base_model_path, tmp_path):
    """A backward pass of one process is not scaled by the number of passes."""
    trainer = make_trainer(stage, base_model_path, tmp_path, gradient_accumulation_steps=4)
    assert isinstance(trainer.accelerator, Accelerator)
    assert trainer.accelerator.gradient_accumulation_steps == 1


def test_the_trainer_deletes_checkpoints_by_a_name_of_its_module():
    """Where the deletion is put off until the new checkpoint is marked."""
    module = inspect.getmodule(Trainer)
    assert vars(module)["rotate_checkpoints"] is rotate_checkpoints
    parameters = set(inspect.signature(rotate_checkpoints).parameters)
    assert {"save_total_limit", "best_model_checkpoint", "use_mtime"} <= parameters


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_moving_inputs_to_the_device_generates_nothing(trainer_class):
    """`_prepare_inputs` of these trainers makes completions; capability batches go past it."""
    assert trainer_class._prepare_inputs is not Trainer._prepare_inputs
    assert trainer_class._prepare_input is Trainer._prepare_input


def test_rwkv_mixes_up_the_rows_of_a_batch():
    """Where it goes on from its state. When this fails, `generation._ONE_BY_ONE` can go."""
    model = RwkvForCausalLM(RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2)).eval()
    state = model(torch.ones(3, 2, dtype=torch.long), use_cache=True).state
    step = model(torch.ones(3, 1, dtype=torch.long), state=state, use_cache=True)
    assert step.logits.shape == (3, 3, 9)
