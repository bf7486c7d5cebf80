"""Training that stops and resumes is training that never stopped."""

import functools

import pytest
import torch
from peft import LoraConfig

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.method.saved_state import FILE_NAME
from runs import ADAMW, SAVES, SaveAfter, assert_resume_is_bitwise, assert_same_run, paper

OPTIONS = {
    **ADAMW, "max_steps": 5, "learning_rate": 1e-2, "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2,
}  # fmt: skip
# A preset, more settings, stage, form, and the steps to resume after.
RUNS = {
    "paper": ("paper", {}, "sft", "full", (3,)),
    "bfloat16 basis": ("paper", {"basis_dtype": "bfloat16"}, "dpo", "lora", (1, 2)),
    "paper-theorem": ("paper-theorem", {}, "sft", "lora", (2,)),
    "preserve": ("preserve", {"samples_per_refresh": 3, "kl_tokens": 5}, "dpo", "full", (3, 4)),
    "drawn samples": (
        "preserve", {"samples_per_refresh": 3, "capability_loss": "nll"}, "sft", "full", (3,),
    ),
    "replay": ("replay", {"samples_per_refresh": 3}, "dpo", "full", (3,)),
    "kl": ("kl", {"samples_per_refresh": 3}, "sft", "lora", (3,)),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_resume_at_any_step_is_bitwise_the_run_that_never_stopped(name, make, tmp_path):
    """Within an interval and at its end; with LoRA before and at the refresh for A, held once."""
    preset, settings, stage, form, steps = RUNS[name]
    interval = 2 if form == "full" else 4
    config = OGPSAConfig.from_preset(preset, **settings | {"refresh_interval": interval})
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    more = {"peft_config": lora} if form == "lora" else None
    again = functools.partial(make, stage, config=config, more=more, **OPTIONS)
    assert_resume_is_bitwise(again, tmp_path, steps)


def test_a_run_that_is_resumed_at_its_end_takes_no_step(make, tmp_path):
    """It was killed after the last save, say; transformers would take one step more."""
    again = functools.partial(
        make, config=paper(refresh_interval=2), **OPTIONS | {"max_steps": 3}
    )  # an epoch has two steps
    straight, resumed = again(), again()
    straight.add_callback(SaveAfter(2, 3))
    straight.train()
    resumed.train(resume_from_checkpoint=True)  # it finds the last checkpoint by itself
    assert resumed.state.global_step == 3
    assert_same_run(resumed, straight)
    before, after = straight.subspace.state_dict(), resumed.subspace.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-3"]


def test_checkpoints_of_the_model_only_hold_no_basis(train, tmp_path):
    train(save_only_model=True, **SAVES)
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-1" / FILE_NAME).exists()
