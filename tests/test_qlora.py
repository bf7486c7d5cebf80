"""QLoRA: an adapter on a base in 4 bits, on the CPU backend of bitsandbytes."""

import pytest
import torch
from transformers import TrainerCallback

import qlora_worker
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from processes import launch
from qlora_worker import adapter_of, losses_of, make_qlora_trainer
from runs import (
    CosineCallback,
    assert_resume_is_bitwise,
    capability_groups,
    gated,
    literal_nll,
    logged,
    max_difference,
    paper,
)

pytest.importorskip("bitsandbytes")

CONFIGS = {"gradient": paper(refresh_interval=1), "update": OGPSAConfig()}


@pytest.fixture(scope="module")
def wide_model_path(tmp_path_factory):
    """On the CPU bitsandbytes packs 64 columns at least."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_model(seed=0, hidden_size=64, ffn_size=128).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(wide_model_path, tmp_path):
    def make(stage="sft", config=None, **options):
        return make_qlora_trainer(stage, wide_model_path, tmp_path, config, **options)

    return make


def base_of(trainer):
    """All tensors of the base as they are stored, those that undo the quantisation too."""
    state = trainer.model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if "lora_" not in name}


@pytest.mark.parametrize(("stage", "target"), [("sft", "gradient"), ("dpo", "update")])
def test_the_base_stays_as_it_is_bit_for_bit(stage, target, make):
    """And all that OGPSA has lies in the adapter."""
    probe = CosineCallback()
    trainer = probe.trainer = make(
        stage, CONFIGS[target], gradient_checkpointing=True, callbacks=[probe]
    )
    gated(trainer, capability_groups())
    base, adapter = base_of(trainer), adapter_of(trainer)
    assert sum(tensor.dtype == torch.uint8 for tensor in base.values()) > 14
    trainer.train()
    after = base_of(trainer)
    assert base.keys() == after.keys()
    assert all(torch.equal(base[name], after[name]) for name in base)
    assert max_difference(adapter, adapter_of(trainer)) > 1e-3

    assert all(tensor.dtype == torch.float32 for tensor in adapter.values())
    assert [name for name, _ in trainer.subspace.backend.parameters] == list(adapter)
    num_entries = sum(tensor.numel() for tensor in adapter.values())
    assert trainer.subspace.basis_bytes == (
        len(capability_groups()) * trainer.subspace.dtype.itemsize * num_entries
    )
    frozen = [p for n, p in trainer.model.named_parameters() if "lora_" not in n]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    if target == "gradient":
        assert len(probe.cosines) > 4
        assert max(probe.cosines) < 1e-5

    # A CPU with AVX512-BF16 packs weights outside training mode, and then no gradient passes: on
    # others there is nothing to see.
    layers = [m for m in trainer.model.modules() if type(m).__name__ == "Linear4bit"]
    states = [m.weight.quant_state for m in layers if hasattr(m.weight, "quant_state")]
    assert len(states) >= 14
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)


class StepProbe(TrainerCallback):
    """Cosines of every real step with the capability gradients before it, computed separately."""

    def __init__(self):
        self.cosines = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.adapter(model)
        adapter = [p for p in model.parameters() if p.requires_grad]
        self.gradients = [
            flat(torch.autograd.grad(literal_nll(model, toy_tokenizer(), rows), adapter))
            for rows in capability_groups().values()
        ]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = self.adapter(model) - self.before
        for gradient in self.gradients:
            if step.norm() > 0:
                self.cosines.append((step @ gradient).abs() / step.norm() / gradient.norm())

    def adapter(self, model):
        return flat([p.detach() for p in model.parameters() if p.requires_grad])


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def test_the_real_step_is_orthogonal_to_every_capability_gradient(make):
    """The weights of an adapter are of size .1, so that steps of 1e-2 are rounded to 1e-6."""
    probe = StepProbe()
    config = paper(refresh_interval=1, target="update", metric="optimizer", scope="model")
    make(config=config, callbacks=[probe]).train()
    assert len(probe.cosines) >= 6
    assert max(probe.cosines) < 1e-4


def test_a_resumed_run_is_the_run_that_never_stopped(make, tmp_path):
    def saved():
        return make(config=CONFIGS["update"], save_strategy="steps", save_steps=2)

    assert_resume_is_bitwise(saved, tmp_path, (2,))


def test_without_capability_data_it_is_trl(make):
    ours, plain = make(), make(plain=True)
    assert all(tensor.dtype == torch.bfloat16 for tensor in adapter_of(ours).values())
    for trainer in (ours, plain):
        trainer.train()
    assert max_difference(adapter_of(ours), adapter_of(plain)) == 0
    assert logged(ours) == logged(plain)


def test_small_steps_are_not_lost(make):
    """In bfloat16, as TRL has them, adapter weights of size .1 would not move by 1e-5."""
    trainer = make(config=CONFIGS["update"], bits=8, learning_rate=1e-5, weight_decay=0.0)
    before = adapter_of(trainer)
    assert all(tensor.dtype == torch.float32 for tensor in before.values())
    trainer.train()
    after = adapter_of(trainer)
    moved = torch.cat([(after[n] != before[n]).flatten() for n in before if "lora_A" in n])
    assert moved.double().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_take_the_steps_of_one_on_a_base_in_4_bits(
    engine, make, wide_model_path, tmp_path
):
    """And divide the basis of the adapter, where they divide gradients."""
    launch(2, qlora_worker.main, engine, wide_model_path, str(tmp_path), folder=tmp_path)
    two = torch.load(tmp_path / "result.pt")
    one = make(config=qlora_worker.SAME_SAMPLES)
    one.train()
    assert two["losses"] == pytest.approx(losses_of(one), abs=1e-4)
    assert two["basis_bytes"] == one.subspace.basis_bytes / (1 if engine == "ddp" else 2)
