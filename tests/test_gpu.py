"""The same laws on one GPU: `pytest -m gpu`."""

import pytest
import torch

from engine_worker import CELLS, ENGINES, NUM_PROCESSES, main, make, name_of
from processes import launch
from runs import (
    CosineCallback,
    capability_groups,
    make_trainer,
    max_difference,
    paper,
    trained,
    weights,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
STAGES = ("sft", "dpo")


@pytest.mark.parametrize("scope", ["parameter", "model"])
@pytest.mark.parametrize("stage", STAGES)
def test_gpu_takes_the_steps_of_the_cpu(stage, scope, base_model_path, tmp_path):
    results = []
    for use_cpu in (True, False):
        _, _, after = trained(
            stage, base_model_path, tmp_path, capability=capability_groups(), use_cpu=use_cpu,
            config=paper(scope=scope, refresh_interval=2), max_steps=3, learning_rate=0.1,
            gradient_accumulation_steps=2, max_grad_norm=0.5,
        )  # fmt: skip
        results.append({name: tensor.cpu() for name, tensor in after.items()})
    # TRL's fused head sums in another order on a GPU; float32 on both.
    assert max_difference(*results) < 2e-5


FEATURES = {
    "plain": {},
    "tf32": {"tf32": True},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "bf16": True},
    "offloading": {"activation_offloading": True},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_left_in_the_subspace(stage, feature, base_model_path, tmp_path):
    """TF32 matrix products would leave three digits; the projection does not use them."""
    probe = CosineCallback()
    trainer = make_trainer(
        stage, base_model_path, tmp_path, capability=capability_groups(), use_cpu=False,
        config=paper(refresh_interval=2), more={"callbacks": [probe]},
        **{"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3, **FEATURES[feature]},
    )  # fmt: skip
    probe.trainer = trainer
    trainer.train()
    assert trainer.subspace.basis[0].is_cuda
    assert max(probe.cosines) < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_refresh_leaves_the_random_states_alone(stage, base_model_path, tmp_path):
    trainer, _, _ = trained(
        stage, base_model_path, tmp_path, capability=capability_groups(), use_cpu=False
    )
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    trainer.refresh_subspace()
    after = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_resume_is_the_run_that_never_stopped(base_model_path, tmp_path):
    options = {
        "capability": capability_groups(), "use_cpu": False, "max_steps": 4, "save_steps": 1,
        "save_strategy": "steps", "optim": "adamw_torch", "learning_rate": 1e-2,
        "config": paper(refresh_interval=3),
    }  # fmt: skip
    _, _, straight = trained("sft", base_model_path, tmp_path, **options)
    resumed = make_trainer("sft", base_model_path, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # Kernels of a GPU may add up in an order of their own: 1e-6 is rounding.
    assert max_difference(weights(resumed), straight) < 1e-6


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ENGINES)
def test_gpus_take_the_steps_of_one_process_on_the_cpu(engine, base_model_path, tmp_path):
    """The table of tests/test_engines.py with NCCL."""
    if torch.cuda.device_count() < NUM_PROCESSES[engine]:
        pytest.skip(f"{engine} needs {NUM_PROCESSES[engine]} GPUs")
    arguments = (engine, base_model_path, tmp_path, "all")
    launch(NUM_PROCESSES[engine], main, *arguments, folder=tmp_path, on_gpu=True)
    for cell in CELLS:
        result = torch.load(tmp_path / f"{name_of(cell)}.pt", weights_only=True)
        one = make("one", cell, base_model_path, tmp_path / "one", 1, save_strategy="no")
        one.train()
        assert max_difference(weights(one), result["weights"]) < 2e-5, cell
        assert result["cosine"] < 1e-5, cell
