"""Training that stops and resumes is training that never stopped."""

import logging

import pytest
import torch
from peft import LoraConfig

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.method.saved_start import START_FILE_NAME
from ogpsa_trl.method.saved_state import FILE_NAME
from runs import (
    SaveAfter,
    assert_resume_is_bitwise,
    assert_same_run,
    capability_groups,
    make_trainer,
    paper,
)

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def make(stage, path, folder, config, lora=False, **options):
    return make_trainer(
        stage, path, folder, capability=capability_groups(), config=config,
        more={"peft_config": LoraConfig(**LORA)} if lora else None,
        **{
            "max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0,
            "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, **options,
        },
    )  # fmt: skip


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
def test_resume_at_any_step_is_bitwise_the_run_that_never_stopped(name, base_model_path, tmp_path):
    """Within an interval and at its end; with LoRA before and at the refresh for A, held once."""
    preset, settings, stage, form, steps = RUNS[name]
    interval = 2 if form == "full" else 4
    config = OGPSAConfig.from_preset(preset, **settings | {"refresh_interval": interval})

    def again():
        return make(stage, base_model_path, tmp_path, config, lora=form == "lora")

    assert_resume_is_bitwise(again, tmp_path, steps)


def test_a_run_that_is_resumed_at_its_end_takes_no_step(base_model_path, tmp_path):
    """It was killed after the last save, say; transformers would take one step more."""

    def again():
        # An epoch has two steps.
        return make("sft", base_model_path, tmp_path, paper(refresh_interval=2), max_steps=3)

    straight = again()
    straight.add_callback(SaveAfter(2, 3))
    straight.train()
    resumed = again()
    resumed.train(resume_from_checkpoint=True)  # it finds the last checkpoint by itself
    assert resumed.state.global_step == 3
    assert_same_run(resumed, straight)
    before, after = straight.subspace.state_dict(), resumed.subspace.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-3",
    ]  # fmt: skip


def test_without_the_files_of_a_checkpoint_their_content_is_made_anew_at_once(
    base_model_path, tmp_path, caplog
):
    """It is said, and training goes on in the middle of an interval."""
    config = paper(refresh_interval=100, samples_per_refresh=3)
    first = make("sft", base_model_path, tmp_path, config, max_steps=1, save_strategy="steps")
    first.train()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / FILE_NAME).unlink()
    (checkpoint / START_FILE_NAME).unlink()
    resumed = make("sft", base_model_path, tmp_path, config, max_steps=2)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    refreshed = [entry["step"] for entry in resumed.state.log_history if "ogpsa/rank" in entry]
    assert refreshed == [1, 2]
    assert f"{checkpoint} holds no whole capability subspace (no {FILE_NAME})" in caplog.text
    assert f"starting point of {checkpoint} cannot be used (there is none): drift" in caplog.text


def test_checkpoints_of_the_model_only_hold_no_basis(base_model_path, tmp_path):
    make(
        "sft", base_model_path, tmp_path, paper(), max_steps=1, save_strategy="steps",
        save_only_model=True,
    ).train()  # fmt: skip
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-1" / FILE_NAME).exists()
