"""What we rely on in the libraries below. A failure here means: they moved, read their source."""

import inspect
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from transformers import RwkvConfig, RwkvForCausalLM, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer

from runs import make_trainer


def source(function):
    return inspect.getsource(unwrapped(function))


def unwrapped(function):
    """DeepSpeed's profiling hides a function in that of its decorator."""
    is_hidden = getattr(function, "__name__", None) == "wrapped_fn"
    return inspect.getclosurevars(function).nonlocals["func"] if is_hidden else function


def assert_in_order(text, *pieces):
    positions = [text.index(piece) for piece in pieces]
    assert positions == sorted(positions)


def test_the_loop_calls_us_between_the_gradient_and_the_clipping():
    """Refresh before the first micro-batch, projection in the last one, clipping, step."""
    assert_in_order(
        source(Trainer._run_epoch),
        "_set_sync_gradients(do_sync_step)",
        "on_step_begin",
        "self.training_step(",
        "_clip_grad_norm(",
        "on_pre_optimizer_step",
        "self.optimizer.step()",
        "on_optimizer_step",
        "model.zero_grad()",
    )


def test_the_batches_of_a_step_are_fetched_before_the_refresh():
    """So a refresh cannot change the order of the data."""
    assert_in_order(source(Trainer._run_epoch), "get_batch_samples(", "on_step_begin")


def test_the_model_is_wrapped_before_a_checkpoint_is_loaded():
    body = source(Trainer._prepare_for_training)
    assert_in_order(body, "self.model_wrapped = model", "_load_optimizer_and_scheduler(")
    names = list(inspect.signature(Trainer._prepare_for_training).parameters)
    assert names == ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"]


def test_the_optimizer_is_saved_before_the_file_that_makes_a_checkpoint_complete():
    """`trainer_state.json` comes last: a checkpoint that has it has our file too."""
    body = source(Trainer._save_checkpoint)
    assert_in_order(body, "if not self.args.save_only_model:", "_save_optimizer_and_scheduler(")
    assert_in_order(body, "_save_optimizer_and_scheduler(", "save_to_json(")


def test_a_step_ends_for_callbacks_before_it_is_logged_and_saved():
    """So a gate can measure what is saved, and name the best checkpoint before old ones go."""
    assert_in_order(source(Trainer._run_epoch), "on_step_end(", "_maybe_log_save_evaluate(")
    assert_in_order(
        source(Trainer._save_checkpoint),
        "self.save_model(",
        "self.state.best_global_step",
        "self.state.best_model_checkpoint = best_checkpoint_dir",
        "save_to_json(",
        "rotate_checkpoints(",
    )


def test_the_best_metric_is_looked_for_only_where_it_has_a_name():
    """Without one the trainer leaves the mark of the best checkpoint to us."""
    body = source(Trainer._determine_best_metric)
    assert_in_order(body, "if self.args.metric_for_best_model is not None:", "best_global_step =")


@pytest.mark.parametrize("trainer_class", [SFTTrainer, DPOTrainer])
def test_the_trainers_take_the_same_step_as_transformers(trainer_class):
    """They wrap `training_step` and `log`, and leave the arguments to their parents."""
    assert "super().training_step(*args, **kwargs)" in source(trainer_class.training_step)
    assert_in_order(source(trainer_class.log), "self.model.training", "super().log(")


def test_gradient_checkpointing_needs_this_attribute_and_training_mode():
    assert GradientCheckpointingLayer.gradient_checkpointing is False
    text = source(GradientCheckpointingLayer)
    assert re.search(r"self\.gradient_checkpointing and self\.training", text)


def test_checkpointing_is_at_work_during_a_refresh(base_model_path, tmp_path):
    from runs import capability_groups

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


def test_backward_of_one_process_does_not_scale_by_accumulation(base_model_path, tmp_path):
    """`Trainer` accumulates by itself and leaves the accelerator's own accumulation at 1."""
    trainer = make_trainer("sft", base_model_path, tmp_path, gradient_accumulation_steps=4)
    assert isinstance(trainer.accelerator, Accelerator)
    assert trainer.accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_fused_head_gives_log_probabilities_of_the_labels(stage, base_model_path, tmp_path):
    """Zero on ignored positions, one position less than the input."""
    trainer = make_trainer(stage, base_model_path, tmp_path)
    ids = torch.randint(3, 100, (2, 7))
    labels = ids.clone()
    labels[:, :3] = -100
    model = trainer.model.eval()
    outputs = model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True)
    logits = model(input_ids=ids).logits.log_softmax(-1)
    expected = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    expected[:, :2] = 0
    assert torch.allclose(outputs.log_probs, expected, atol=1e-5)


def test_the_trainer_deletes_checkpoints_last_and_by_a_name_of_its_module():
    """Where the deletion is put off until the new checkpoint is marked."""
    assert_in_order(
        source(Trainer._save_checkpoint), "self._get_output_dir(trial=trial)", "save_to_json(",
        "rotate_checkpoints(",
    )  # fmt: skip
    module = inspect.getmodule(Trainer)
    assert vars(module)["rotate_checkpoints"] is rotate_checkpoints
    parameters = set(inspect.signature(rotate_checkpoints).parameters)
    assert {"save_total_limit", "best_model_checkpoint", "use_mtime"} <= parameters


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_moving_inputs_to_the_device_generates_nothing(trainer_class):
    """`_prepare_inputs` of these trainers makes completions; capability batches go past it."""
    assert trainer_class._prepare_inputs is not Trainer._prepare_inputs
    assert trainer_class._prepare_input is Trainer._prepare_input


def test_every_process_takes_part_in_saving_the_optimizer_of_an_engine():
    """Each writes its shards of the subspace there; only without an engine one process is alone."""
    body = source(Trainer._maybe_log_save_evaluate)
    assert_in_order(body, "if self.control.should_save:", "self._save_checkpoint(model, trial)")
    before, _, _ = source(Trainer._save_checkpoint).partition("_save_optimizer_and_scheduler(")
    assert "args.should_save" not in before
    assert "process_zero" not in body + before
    assert_in_order(
        source(Trainer._save_optimizer_and_scheduler),
        "elif self.is_deepspeed_enabled:",
        "self.model_wrapped.save_checkpoint(output_dir)",
        "elif self.is_fsdp_enabled:",
        "save_fsdp_optimizer(",
        "elif self.args.should_save:",
    )


class TestDeepSpeed:
    """What `ogpsa_trl/zero.py` reads and writes, and when."""

    @pytest.fixture(autouse=True)
    def deepspeed(self):
        pytest.importorskip("deepspeed")

    def test_accelerate_steps_right_after_the_last_backward_pass(self):
        """The projection stands in front of `engine.step`, looked up on the engine."""
        body = source(DeepSpeedEngineWrapper.backward)
        assert_in_order(
            body,
            "self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)",
            "self.engine.backward(loss, **kwargs)",
            "if sync_gradients:",
            "self.engine.step()",
        )
        call = "deepspeed_engine_wrapped.backward(loss, sync_gradients=self.sync_gradients"
        assert call in source(Accelerator.backward)

    def test_the_loss_is_not_divided_by_the_number_of_passes(self):
        """Neither in training, where `Trainer` has done so, nor in a refresh."""
        from deepspeed import DeepSpeedEngine

        assert_in_order(
            source(Trainer.training_step),
            "== DistributedType.DEEPSPEED:",
            'kwargs["scale_wrt_gas"] = False',
            "self.accelerator.backward(loss, **kwargs)",
        )
        assert "scale_wrt_gas" in inspect.signature(unwrapped(DeepSpeedEngine.backward)).parameters
        division = "loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss"
        assert division in source(DeepSpeedEngine.backward)

    def test_a_boundary_that_was_set_decides_when_gradients_are_final(self):
        """Not the engine's own count of passes, which a refresh would put out of step."""
        from deepspeed import DeepSpeedEngine

        assert_in_order(
            source(DeepSpeedEngine.is_gradient_accumulation_boundary),
            "if self._is_gradient_accumulation_boundary is None:",
            "(self.micro_steps + 1) % self.gradient_accumulation_steps()",
            "return self._is_gradient_accumulation_boundary",
        )

    def test_which_optimizer_serves_a_stage(self):
        """BF16_Optimizer is ZeRO-1's with parameters in bfloat16 and gradients in float32."""
        from deepspeed import DeepSpeedEngine

        assert_in_order(
            source(DeepSpeedEngine._do_optimizer_sanity_check),
            "if zero_enabled:",
            "model_dtype == torch.bfloat16 and grad_accum_dtype == torch.float32",
            "== 1 and not self.zero_cpu_offload():",
            "return BFLOAT16",
            "return ZERO_OPTIMIZATION",
        )
        assert_in_order(
            source(DeepSpeedEngine._configure_optimizer),
            "elif optimizer_wrapper == BFLOAT16:",
            "self.optimizer = self._configure_bf16_optimizer(",
        )
        assert "BF16_Optimizer(" in source(DeepSpeedEngine._configure_bf16_optimizer)

    def test_zero12_forgets_its_gradients_like_this_when_it_skips_a_step(self):
        """`clear_gradients` does the same; then comes the clipping, after the projection."""
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        assert_in_order(
            source(DeepSpeedZeroOptimizer.step),
            "if self.overflow:",
            "self.zero_grad(set_to_none=True)",
            "self._release_preflattened_grad_buffers()",
            "for k in self.averaged_gradients.keys():",
            "self.averaged_gradients[k] = None",
            "self.all_grad_tensors[k] = None",
            "self.unscale_and_clip_grads(",
        )

    def test_zero12_makes_gradients_final_in_the_last_pass_only(self):
        """They are complete when `engine.backward` returns, also with `overlap_comm`."""
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        assert_in_order(
            source(DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue),
            "if self.overlap_comm:",
            "get_accelerator().synchronize()",
            "if self.is_gradient_accumulation_boundary():",
            "self.averaged_gradients[i] = self.get_flat_partition(",
        )

    def test_zero12_maps_a_parameter_to_its_part_of_the_gradient(self):
        """A view, not a copy; no mapping where a process holds none of a parameter."""
        from deepspeed.utils.mixed_precision_linkage import _init_lp_to_hp_mapping
        from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

        returned = "return gradient_dict[self.param_group_index][index_in_param_group]"
        assert returned in source(tensor_fragment.get_lp_grad_fragment)
        assert {
            "lp_fragment_address",
            "param_group_index",
        } <= tensor_fragment.__annotations__.keys()
        assert fragment_address.__annotations__.keys() == {"start", "numel"}
        assert_in_order(
            source(_init_lp_to_hp_mapping),
            "lp_param._hp_mapping = None",
            "if in_partition:",
            "lp_param._index_in_param_group = index_in_param_group",
        )

    def test_zero1_in_bfloat16_keeps_whole_gradients_in_float32(self):
        """With a flag for each that has one; `zero_grad` clears gradients and flags."""
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        text = source(BF16_Optimizer)
        assert "self.fp32_groups_gradients[group_idx][param_idx]" in text
        assert "self.fp32_groups_has_gradients[group_idx][param_idx] = True" in text
        assert "self.bf16_groups.append(trainable_parameters)" in text
        assert "self.clear_hp_grads()" in source(BF16_Optimizer.zero_grad)
        assert_in_order(
            source(BF16_Optimizer.clear_hp_grads),
            "flat_gradients.zero_()",
            "self.fp32_groups_has_gradients[i] = [False]",
        )

    def test_zero3_overwrites_its_buffer_in_the_first_pass_and_adds_in_the_others(self):
        """`zero_grad` makes the next pass the first, and says that no gradient is there."""
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

        body = source(Stage3.zero_grad)
        assert_in_order(body, "self.micro_step_id = 0", "self._epilogue_ran_this_backward = False")
        assert_in_order(
            source(Stage3.partition_grads),
            "if self.micro_step_id == 0:",
            "grad_buffer.copy_(",
            "grad_buffer.add_(",
        )
        assert_in_order(
            source(Stage3.independent_gradient_partition_epilogue),
            "self.reduce_and_partition_stream.synchronize()",
            "self._epilogue_ran_this_backward = True",
        )

    def test_zero3_has_one_buffer_of_which_every_parameter_has_a_range(self):
        """`_get_fp32_grad_state_partition` returns it, not a copy; so it can be set to zero."""
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

        text = " ".join(source(Stage3).split())
        buffers = "self.__param_id_to_grad_partition[param.ds_id]"
        assert f"{buffers} = self.grad_partitions_flat_buffer.narrow(" in text
        assert_in_order(
            source(Stage3._get_fp32_grad_state_partition),
            f"fp32_grad = {buffers}",
            "return fp32_grad, group_idx",
        )

    def test_zero3_gives_every_process_an_equal_range_of_a_parameter(self):
        """In the order of the processes; the last may hold less than `partition_numel`."""
        from deepspeed.runtime.zero.partition_parameters import Init
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

        text = source(Init)
        assert "param.ds_numel = param.numel()" in text
        assert "param.ds_process_group = " in text
        assert "param.partition_numel = partition_numel" in text
        reads = "param.partition_numel() * self._get_param_partition_rank(param) < param.ds_numel"
        assert reads in source(Stage3.partition_grads)


def test_rwkv_mixes_up_the_rows_of_a_batch():
    """Where it goes on from its state. When this fails, `generation._ONE_BY_ONE` can go."""
    model = RwkvForCausalLM(RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2)).eval()
    state = model(torch.ones(3, 2, dtype=torch.long), use_cache=True).state
    step = model(torch.ones(3, 1, dtype=torch.long), state=state, use_cache=True)
    assert step.logits.shape == (3, 3, 9)
