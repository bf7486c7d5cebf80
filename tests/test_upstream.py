"""What we rely on in the libraries below. A failure here means: they moved, read their source."""

import inspect
import re

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import DPOTrainer, SFTTrainer

from runs import make_trainer


def source(function):
    return inspect.getsource(function)


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
    parts = [part for group in trainer.capability_groups for part in group.parts]
    assert len(calls) == sum(len(part.batches) for part in parts)


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
