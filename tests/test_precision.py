"""What bfloat16 leaves of a divergence: passes in float32 where that can be, a floor elsewhere."""

import copy
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.engines.torch_engines import TorchBackend
from runs import (
    SaveAfter,
    assert_same_run,
    capability_groups,
    literal_kl,
    make_trainer,
    weights,
)

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}


@pytest.fixture(autouse=True, scope="class")
def no_mixed_precision_afterwards():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make(model, folder, *, bf16=True, more=None, **settings):
    config = OGPSAConfig(**{"capability_token_share": None, "kl_tokens": 9999, **settings})
    trainer = make_trainer(
        "sft", model, folder, capability=capability_groups(), config=config, bf16=bf16, more=more,
        **ADAMW,
    )  # fmt: skip
    trainer.add_callback(SaveAfter(2))
    return trainer


def losses(trainer):
    """The measured divergence of every group before every step."""
    entries = [e for e in trainer.state.log_history if "ogpsa/rank" in e]
    return [[e[f"ogpsa/capability_loss/{g}"] for g in capability_groups()] for e in entries]


def assert_has_a_floor(trainer):
    start = trainer.capability_loss.start
    assert start.epsilon == torch.finfo(torch.bfloat16).eps
    assert start.losses.min() > 0


class TestMixedPrecision:
    """`bf16: true` on weights in float32: capability passes are in float32."""

    @pytest.fixture(scope="class")
    def run(self, base_model_path, tmp_path_factory):
        """A trained trainer, its weights at every refresh, types in its own passes."""
        trainer = make(base_model_path, tmp_path_factory.mktemp("run"))
        states, refresh = [], trainer.refresh_subspace
        dtypes, compute_loss = set(), trainer.compute_loss
        layer = trainer.model.model.layers[0].mlp.up_proj

        def watched_refresh():
            states.append(weights(trainer))
            refresh()

        def watched_loss(*args, **kwargs):
            hook = layer.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
            loss = compute_loss(*args, **kwargs)
            hook.remove()
            return loss

        trainer.refresh_subspace, trainer.compute_loss = watched_refresh, watched_loss
        trainer.train()
        return trainer, states, dtypes

    def test_the_divergence_is_that_of_float32(self, run, base_model_path):
        trainer, states, _ = run
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

    def test_training_itself_stays_in_bfloat16(self, run):
        """Also after the passes of a refresh: the forward of the model is put back."""
        _, _, dtypes = run
        assert dtypes == {torch.bfloat16}

    def test_resume_is_bitwise(self, run, base_model_path, tmp_path):
        straight, _, _ = run
        resumed = make(base_model_path, tmp_path)
        resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-2")
        assert_same_run(resumed, straight)

    def test_a_start_that_was_measured_more_finely_is_given_a_floor(
        self, run, base_model_path, tmp_path
    ):
        """A run that began in float32 goes on where passes are made in bfloat16."""
        trainer = make(base_model_path, tmp_path)
        with mock.patch.object(TorchBackend, "_has_full_precision", False):
            trainer.train(resume_from_checkpoint=f"{run[0].args.output_dir}/checkpoint-2")
        assert_has_a_floor(trainer)

    def test_a_model_that_another_trainer_has_prepared_counts_from_a_floor(
        self, base_model_path, tmp_path
    ):
        """TRL keeps the forward of the first, which computes in bfloat16, within its own."""
        model = AutoModelForCausalLM.from_pretrained(base_model_path, dtype=torch.float32)
        more = {"processing_class": AutoTokenizer.from_pretrained(base_model_path)}
        options = {"plain": True, "bf16": True, "more": more}
        make_trainer("sft", model, tmp_path / "first", **options).train()
        trainer = make(model, tmp_path / "second", more=more)
        trainer.train()
        assert_has_a_floor(trainer)

    def test_products_on_a_gpu_are_in_tf32_in_place_of_bfloat16(self, run, monkeypatch):
        assert_products_are_in_tf32(run[0].subspace.backend, monkeypatch, [True, True])

    def test_kernels_without_float32_keep_bfloat16(self, run, monkeypatch):
        trainer = run[0]
        monkeypatch.setattr(trainer.model.config, "_attn_implementation", "flash_attention_2")
        assert trainer.subspace.backend.epsilon == torch.finfo(torch.bfloat16).eps

    def test_what_accelerate_puts_around_the_model_is_taken_off_and_put_back(self, run):
        """`auto_find_batch_size` prepares a model twice."""
        trainer = run[0]
        model, ids = trainer.model, torch.arange(4)[None]
        expected = type(model).forward(model, input_ids=ids).logits
        for _ in range(2):
            rounded = model(input_ids=ids).logits
            with trainer.subspace.backend.full_precision():
                exact = model(input_ids=ids).logits
            assert torch.equal(exact, expected)
            assert torch.equal(model(input_ids=ids).logits, rounded)
            assert not torch.equal(rounded, expected)
            vars(model).pop("_is_accelerate_prepared", None)  # accelerate 1.13 has none
            trainer.accelerator.prepare_model(model)


def assert_products_are_in_tf32(backend, monkeypatch, expected):
    """Where the user has `tf32: false` and `true`; afterwards it is as it was."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.fp32_precision
    monkeypatch.setattr(backend, "device", torch.device("cuda"))
    try:
        for own, is_tf32 in zip(("ieee", "tf32"), expected, strict=True):
            torch.backends.fp32_precision = own  # products take it over
            assert matmul.fp32_precision == own
            with backend.full_precision():
                assert (matmul.fp32_precision == "tf32") == is_tf32
            assert matmul.fp32_precision == own
            assert backend.epsilon == (2**-10 if is_tf32 else 0)
    finally:
        torch.backends.fp32_precision, matmul.fp32_precision = before, "none"


def test_without_mixed_precision_products_are_as_the_user_has_set_them(
    base_model_path, tmp_path, monkeypatch
):
    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(), bf16=False
    )
    trainer.train()
    assert_products_are_in_tf32(trainer.subspace.backend, monkeypatch, [False, True])


class TestFloor:
    """Weights in bfloat16, as those of ZeRO are: a divergence counts from what rounding makes."""

    def make(self, path, folder, factor=1, **settings):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        for parameter in model.parameters():
            parameter.data *= factor if parameter.dim() > 1 else 1
        more = {"processing_class": AutoTokenizer.from_pretrained(path)}
        return make(
            model, folder, bf16=False, more=more, metric="euclidean", restoration=0.0, **settings
        )

    def test_it_is_what_a_step_of_rounding_shows(self, base_model_path, tmp_path):
        """Every weight is moved by half a digit of bfloat16, or left: few of them round away."""
        # The untrained model is nearly linear.
        trainer = self.make(base_model_path, tmp_path, factor=4, target="gradient")
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        start, generator = trainer.capability_loss.start, torch.Generator().manual_seed(1)
        trainer.model.load_state_dict(before)
        for parameter in trainer.model.parameters():
            signs = torch.randint(-1, 2, parameter.shape, generator=generator)
            parameter.data += signs * torch.finfo(torch.bfloat16).eps / 2 * parameter.data
        for group in trainer.capability_groups:
            whole = group.whole()
            with torch.no_grad():
                total = sum(trainer.capability_loss.sum(b).item() for b in whole.batches_of(0, 1))
            assert start.mean_loss(whole) > 5e-6  # of float32 it is 1e-8
            assert 1 / 3 < total / whole.num_tokens / start.mean_loss(whole) < 3

    def test_drift_counts_from_it_and_a_resumed_run_knows_it(self, base_model_path, tmp_path):
        def again():
            return self.make(
                base_model_path, tmp_path, target="none", capability_weight=1.0, capability_ema=0.0
            )

        trainer = again()
        trainer.train()
        start = trainer.capability_loss.start
        resumed = again()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert torch.equal(resumed.capability_loss.start.losses, start.losses)
        assert_same_run(resumed, trainer)
        for group in trainer.capability_groups:
            floor = start.mean_loss(group.whole())
            for entry in trainer.state.log_history[:-1]:
                assert entry[f"ogpsa/divergence_floor/{group.name}"] == pytest.approx(floor)
                drift = entry[f"ogpsa/drift/{group.name}"]
                loss = entry[f"ogpsa/capability_loss/{group.name}"]
                assert drift == pytest.approx(loss - floor, abs=1e-7)

        # Measuring it leaves no trace.
        state, part = torch.get_rng_state(), trainer.capability_groups[0].whole()
        floors = [
            trainer.capability_loss.measure_floor(trainer.subspace.backend, part, 2**-7)
            for _ in range(2)
        ]
        assert floors[0] == floors[1]
        assert torch.equal(torch.get_rng_state(), state)
        assert not trainer.model.get_input_embeddings()._forward_hooks
