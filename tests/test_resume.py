"""Training that stops and resumes is training that never stopped."""

import dataclasses
import logging

import pytest
import torch
from peft import LoraConfig

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.checkpoint import FILE_NAME, save_subspace
from ogpsa_trl.completeness import mark
from runs import capability_groups, logged, make_trainer, max_difference, paper, weights

NUM_STEPS = 5
LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def make(stage, path, tmp_path, config=None, lora=False, **options):
    return make_trainer(
        stage, path, tmp_path, capability=capability_groups(),
        config=config or paper(refresh_interval=3),
        more={"peft_config": LoraConfig(**LORA)} if lora else None,
        **{
            "max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 1,
            "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0,
            "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2, **options,
        },
    )  # fmt: skip


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("preset", ["paper", "paper-theorem", "preserve", "replay", "kl"])
def test_resume_at_any_step_is_bitwise_the_run_that_never_stopped(
    stage, preset, lora, base_model_path, tmp_path
):
    """Also within an interval, and with LoRA before, at and after the step that holds A."""
    config = OGPSAConfig.from_preset(preset, refresh_interval=3)
    if config.samples_per_refresh is not None:
        config = dataclasses.replace(config, samples_per_refresh=3)  # of 6
    straight = make(stage, base_model_path, tmp_path, config, lora)
    straight.train()
    for step in range(1, NUM_STEPS):
        resumed = make(stage, base_model_path, tmp_path, config, lora)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert max_difference(weights(resumed), weights(straight)) == 0, step
        # TRL counts tokens from zero after a resume; the last entry sums up this call only.
        without = ("runtime", "per_second", "seconds", "refresh_share", "num_tokens")
        assert logged(resumed, without)[:-1] == logged(straight, without)[:-1], step


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_that_is_resumed_at_its_end_takes_no_step(stage, base_model_path, tmp_path):
    """It was killed after the last save, say; transformers would take one step more."""
    straight = make(stage, base_model_path, tmp_path)
    straight.train()
    resumed = make(stage, base_model_path, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == NUM_STEPS
    assert max_difference(weights(resumed), weights(straight)) == 0
    assert (tmp_path / f"checkpoint-{NUM_STEPS}").is_dir()
    assert not (tmp_path / f"checkpoint-{NUM_STEPS + 1}").exists()


def test_resume_finds_the_last_checkpoint_by_itself(base_model_path, tmp_path):
    straight = make("sft", base_model_path, tmp_path)
    straight.train()
    resumed = make("sft", base_model_path, tmp_path, max_steps=NUM_STEPS)
    resumed.train(resume_from_checkpoint=True)
    before, after = straight.subspace.state_dict(), resumed.subspace.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bfloat16_basis_survives_a_checkpoint(base_model_path, tmp_path):
    config = paper(basis_dtype="bfloat16", refresh_interval=100)
    straight = make("sft", base_model_path, tmp_path, config)
    straight.train()
    resumed = make("sft", base_model_path, tmp_path, config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert max_difference(weights(resumed), weights(straight)) == 0


class TestCheckpointsWithoutAUsableBasis:
    def resume(self, base_model_path, tmp_path, config=None):
        """Resume after step 1 of an interval of 100: no refresh is scheduled any more."""
        trainer = make("sft", base_model_path, tmp_path, config or paper(refresh_interval=100))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        return [e["step"] - 1 for e in trainer.state.log_history if "ogpsa/rank" in e]

    @pytest.fixture(autouse=True)
    def checkpoint(self, base_model_path, tmp_path):
        config = paper(refresh_interval=100)
        make("sft", base_model_path, tmp_path, config, max_steps=1).train()
        return tmp_path / "checkpoint-1" / FILE_NAME

    def test_a_good_one_needs_no_refresh(self, base_model_path, tmp_path):
        assert self.resume(base_model_path, tmp_path) == [0]

    def test_none_at_all_is_a_warning_and_a_refresh_at_once(
        self, checkpoint, base_model_path, tmp_path, caplog
    ):
        checkpoint.unlink()
        with caplog.at_level(logging.WARNING):
            assert self.resume(base_model_path, tmp_path) == [0, 1]
        assert "holds no whole capability subspace" in caplog.text

    def test_other_settings_are_a_warning_and_a_refresh_at_once(
        self, base_model_path, tmp_path, caplog
    ):
        config = paper(refresh_interval=100, scope="model")
        with caplog.at_level(logging.WARNING):
            assert self.resume(base_model_path, tmp_path, config) == [0, 1]
        assert "'scope': 'parameter'" in caplog.text

    def test_a_damaged_file_is_an_error(self, checkpoint, base_model_path, tmp_path):
        content = checkpoint.read_bytes()
        for damaged in (b"", content[: len(content) // 2], b"x" * 100):
            checkpoint.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"has {len(damaged)} bytes instead of"):
                self.resume(base_model_path, tmp_path)
            mark(checkpoint.parent)  # as if it had been saved like that
            with pytest.raises(ValueError, match=r"cannot be read .* delete this file"):
                self.resume(base_model_path, tmp_path)

    def test_other_parameters_are_an_error(self, base_model_path, tmp_path):
        adapter = make("sft", base_model_path, tmp_path / "adapter", lora=True, max_steps=1)
        adapter.train()
        # As if the file had been copied from another run.
        adapter.subspace.config = paper(refresh_interval=100)
        save_subspace(adapter.subspace, str(tmp_path / "checkpoint-1"))
        mark(tmp_path / "checkpoint-1")
        with pytest.raises(ValueError, match=r"does not fit this model.*other parameters"):
            self.resume(base_model_path, tmp_path)


def test_checkpoints_of_the_model_only_hold_no_basis(base_model_path, tmp_path):
    make("sft", base_model_path, tmp_path, max_steps=1, save_only_model=True).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-1" / FILE_NAME).exists()
