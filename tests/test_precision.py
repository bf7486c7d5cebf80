"""What bfloat16 leaves of a divergence: passes in float32 where that can be, a floor elsewhere."""

import copy
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.backends import TorchBackend
from runs import (
    assert_resume_is_bitwise,
    capability_groups,
    literal_kl,
    make_trainer,
    max_difference,
    weights,
)

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}


@pytest.fixture(autouse=True)
def no_mixed_precision_afterwards():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make(model, folder, *, bf16=True, more=None, **settings):
    config = OGPSAConfig(**{"samples_per_refresh": None, "kl_tokens": 9999, **settings})
    return make_trainer(
        "sft", model, folder, capability=capability_groups(), config=config, bf16=bf16, more=more,
        **ADAMW, save_strategy="steps", save_steps=1,
    )  # fmt: skip


def losses(trainer):
    """The measured divergence of every group before every step."""
    entries = [e for e in trainer.state.log_history if "ogpsa/rank" in e]
    return [[e[f"ogpsa/capability_loss/{g}"] for g in capability_groups()] for e in entries]


class TestMixedPrecision:
    """`bf16: true` on weights in float32: capability passes are in float32."""

    def test_the_divergence_is_that_of_float32(self, base_model_path, tmp_path):
        trainer = make(base_model_path, tmp_path)
        states, refresh = [], trainer.refresh_subspace

        def watched():
            states.append(weights(trainer))
            refresh()

        trainer.refresh_subspace = watched
        trainer.train()
        start = AutoModelForCausalLM.from_pretrained(base_model_path)
        tokenizer = AutoTokenizer.from_pretrained(base_model_path)
        model = copy.deepcopy(start)
        for state, measured in list(zip(states, losses(trainer), strict=True))[1:]:
            model.load_state_dict(state)
            for value, rows in zip(measured, capability_groups().values(), strict=True):
                with torch.no_grad():
                    expected = literal_kl(model, start, tokenizer, rows).item()
                assert value == pytest.approx(expected, rel=1e-3)
        assert trainer.subspace.backend.epsilon == 0
        assert trainer.capability_loss.start.losses.abs().max() == 0
        assert not any("divergence_floor" in k for e in trainer.state.log_history for k in e)

    def test_training_itself_stays_in_bfloat16(self, base_model_path, tmp_path):
        """Also after the passes of a refresh: the forward of the model is put back."""
        trainer = make(base_model_path, tmp_path)
        dtypes, compute_loss = set(), trainer.compute_loss
        layer = trainer.model.model.layers[0].mlp.up_proj

        def watched(*args, **kwargs):
            hook = layer.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
            loss = compute_loss(*args, **kwargs)
            hook.remove()
            return loss

        trainer.compute_loss = watched
        trainer.train()
        assert dtypes == {torch.bfloat16}

    @pytest.mark.parametrize("times", [1, 2])
    def test_what_accelerate_puts_around_the_model_is_taken_off_and_put_back(
        self, times, base_model_path, tmp_path
    ):
        """`auto_find_batch_size` prepares a model twice."""
        trainer = make(base_model_path, tmp_path)
        trainer.train()
        model, accelerator = trainer.model, trainer.accelerator
        for _ in range(times - 1):
            del model._is_accelerate_prepared
            accelerator.prepare_model(model)
        ids = torch.arange(4)[None]
        expected = type(model).forward(model, input_ids=ids).logits
        rounded = model(input_ids=ids).logits
        with trainer.subspace.backend.full_precision():
            exact = model(input_ids=ids).logits
        assert torch.equal(exact, expected)
        assert torch.equal(model(input_ids=ids).logits, rounded)
        assert not torch.equal(rounded, expected)

    def test_resume_is_bitwise(self, base_model_path, tmp_path):
        def again():
            return make(base_model_path, tmp_path)

        assert_resume_is_bitwise(again, tmp_path, steps=(1, 2, 3))

    def test_a_model_that_another_trainer_has_prepared_counts_from_a_floor(
        self, base_model_path, tmp_path
    ):
        """TRL keeps the forward of the first, which computes in bfloat16, within its own."""
        model = AutoModelForCausalLM.from_pretrained(base_model_path, dtype=torch.float32)
        more = {"processing_class": AutoTokenizer.from_pretrained(base_model_path)}
        make_trainer(
            "sft", model, tmp_path / "first", plain=True, bf16=True, more=more, **ADAMW
        ).train()
        trainer = make(model, tmp_path / "second", more=more)
        trainer.train()
        start = trainer.capability_loss.start
        assert start.epsilon == torch.finfo(torch.bfloat16).eps
        assert start.losses.min() > 0

    def test_a_start_that_was_measured_more_finely_is_given_a_floor(
        self, base_model_path, tmp_path
    ):
        """A run that began in float32 goes on where passes are made in bfloat16."""
        make(base_model_path, tmp_path).train()
        trainer = make(base_model_path, tmp_path)
        with mock.patch.object(TorchBackend, "_has_full_precision", False):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        start = trainer.capability_loss.start
        assert start.epsilon == torch.finfo(torch.bfloat16).eps
        assert start.losses.min() > 0

    @pytest.mark.parametrize("is_on", [False, True])
    @pytest.mark.parametrize("bf16", [False, True])
    def test_products_on_a_gpu_are_in_tf32_in_place_of_bfloat16(
        self, bf16, is_on, base_model_path, tmp_path
    ):
        """And as the user has set it (`tf32: true`) otherwise, and afterwards."""
        trainer = make(base_model_path, tmp_path, bf16=bf16)
        trainer.train()
        backend, matmul = trainer.subspace.backend, torch.backends.cuda.matmul
        backend.device = torch.device("cuda")
        before = torch.backends.fp32_precision
        try:
            torch.backends.fp32_precision = "tf32" if is_on else "ieee"
            own = matmul.fp32_precision
            with backend.full_precision():
                assert (matmul.fp32_precision == "tf32") == (bf16 or is_on)
            assert matmul.fp32_precision == own
            assert backend.epsilon == (2**-10 if bf16 or is_on else 0)
        finally:
            torch.backends.fp32_precision = before

    def test_kernels_without_float32_keep_bfloat16(self, base_model_path, tmp_path):
        trainer = make(base_model_path, tmp_path)
        trainer.train()
        trainer.model.config._attn_implementation = "flash_attention_2"
        assert trainer.subspace.backend.epsilon == torch.finfo(torch.bfloat16).eps


class TestFloor:
    """Weights in bfloat16, as those of ZeRO are: a divergence counts from what rounding makes."""

    def rounded_model(self, path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        return model, {"processing_class": AutoTokenizer.from_pretrained(path)}

    def test_it_is_what_a_step_of_rounding_shows(self, base_model_path, tmp_path):
        """Every weight is moved by half a digit of bfloat16, or left: few of them round away."""
        model, more = self.rounded_model(base_model_path)
        for parameter in model.parameters():  # the untrained model is nearly linear
            parameter.data *= 4 if parameter.dim() > 1 else 1
        before = copy.deepcopy(model.state_dict())
        trainer = make(
            model, tmp_path, bf16=False, more=more, target="gradient", metric="euclidean",
            restoration=0.0,
        )  # fmt: skip
        trainer.train()
        start, generator = trainer.capability_loss.start, torch.Generator().manual_seed(1)
        model.load_state_dict(before)
        for parameter in model.parameters():
            signs = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.data += signs * torch.finfo(torch.bfloat16).eps / 2 * parameter.data
        for group in trainer.capability_groups:
            whole = group.whole()
            with torch.no_grad():
                total = sum(trainer.capability_loss.sum(b).item() for b in whole.batches_of(0, 1))
            assert start.mean_loss(whole) > 1e-5
            assert 1 / 3 < total / whole.num_tokens / start.mean_loss(whole) < 3

    def test_drift_counts_from_it_and_a_resumed_run_knows_it(self, base_model_path, tmp_path):
        def again():
            model, more = self.rounded_model(base_model_path)
            return make(
                model, tmp_path, bf16=False, more=more, target="none", replay_weight=1.0,
                metric="euclidean", restoration=0.0, capability_ema=0.0,
            )  # fmt: skip

        trainer = again()
        trainer.train()
        start = trainer.capability_loss.start
        resumed = again()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert torch.equal(resumed.capability_loss.start.losses, start.losses)
        assert max_difference(weights(resumed), weights(trainer)) == 0
        for group in trainer.capability_groups:
            floor = start.mean_loss(group.whole())
            for entry in trainer.state.log_history[:-1]:
                assert entry[f"ogpsa/divergence_floor/{group.name}"] == pytest.approx(floor)
                drift = entry[f"ogpsa/drift/{group.name}"]
                loss = entry[f"ogpsa/capability_loss/{group.name}"]
                assert drift == pytest.approx(loss - floor, abs=1e-7)

    def test_measuring_it_leaves_no_trace(self, base_model_path, tmp_path):
        model, more = self.rounded_model(base_model_path)
        trainer = make(
            model, tmp_path, bf16=False, more=more, target="gradient", metric="euclidean",
            restoration=0.0,
        )  # fmt: skip
        trainer.train()
        state, part = torch.get_rng_state(), trainer.capability_groups[0].whole()
        floors = [
            trainer.capability_loss.measure_floor(trainer.subspace.backend, part, 2**-7)
            for _ in range(2)
        ]
        assert floors[0] == floors[1]
        assert torch.equal(torch.get_rng_state(), state)
        assert not trainer.model.get_input_embeddings()._forward_hooks
        assert isinstance(trainer.subspace.backend, TorchBackend)
