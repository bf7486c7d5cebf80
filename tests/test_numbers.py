"""Numbers at the edge of float32, and zeros: no basis is poisoned, no weight is not a number."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from laws import assert_orthonormal
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.checkpoint import FILE_NAME, START_FILE_NAME
from runs import capability_groups, make_trainer, max_difference, paper, weights

CONFIGS = {
    "paper": paper(refresh_interval=1),
    "paper-theorem": OGPSAConfig.from_preset("paper-theorem", refresh_interval=1),
    "preserve": OGPSAConfig(samples_per_refresh=3),
    "nll": OGPSAConfig(capability_loss="nll", samples_per_refresh=None),
}


def make(model, folder, config, **options):
    return make_trainer(
        "sft", model, folder, capability=capability_groups(), config=config,
        **{"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, **options},
    )  # fmt: skip


def scale_losses(trainer, groups, scale, after=0):
    """Multiply the capability losses of some groups, from a step on."""
    original = trainer.capability_loss.sum

    def scaled(batch):
        loss = original(batch)
        is_meant = any(sample.name.split("/")[0] in groups for sample in batch.samples)
        return loss * scale if is_meant and trainer.state.global_step >= after else loss

    trainer.capability_loss.sum = scaled


def basis_of(trainer):
    """The rows of the basis, one matrix for every block."""
    rows = [rows.flatten(1) for rows in trainer.subspace.basis if rows is not None]
    if trainer.subspace.config.scope == "model":
        return [torch.cat(rows, dim=1)] if rows else []
    return rows


def assert_sound(trainer):
    """Finite weights and metrics; an orthonormal basis, to the rounding of its rows."""
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    for entry in trainer.state.log_history:
        assert all(math.isfinite(v) for v in entry.values() if isinstance(v, float)), entry
    is_rounded = trainer.subspace.dtype == torch.bfloat16
    for rows_KN in basis_of(trainer):
        assert_orthonormal(rows_KN.float(), atol=2e-2 if is_rounded else 5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["parameter", "model"])
@pytest.mark.parametrize("scale", [1e30, 1e17, 1e-12, 1e-17, 1e-18, 1e-19, 1e-30])
def test_the_length_of_a_gradient_does_not_spoil_the_basis(
    scale, scope, dtype, base_model_path, tmp_path
):
    """Where its square does not fit into float32 it keeps its last one, or counts as zero."""
    config = paper(scope=scope, refresh_interval=1, basis_dtype=dtype)
    trainer = make(base_model_path, tmp_path, config)
    scale_losses(trainer, ["skills"], scale, after=1)
    trainer.train()
    assert_sound(trainer)
    last = trainer.state.log_history[3]
    assert last.get("ogpsa/kept_gradients") == (1 if scale == 1e30 else None)
    if scope == "model":
        assert last["ogpsa/rank"] == (1 if scale < 1e-16 else 2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scale", [1e30, 1e17, 1e8, 1e-20])
def test_a_capability_loss_that_explodes_or_vanishes_leaves_weights_finite(
    name, scale, base_model_path, tmp_path
):
    trainer = make(base_model_path, tmp_path, CONFIGS[name])
    scale_losses(trainer, ["skills"], scale, after=2)
    trainer.train()
    assert_sound(trainer)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("groups", [["skills"], ["skills", "language"]], ids=["one", "all"])
def test_a_group_without_a_gradient_has_no_direction(name, groups, base_model_path, tmp_path):
    """The others keep theirs; without any, training goes on as plain training does."""
    trainer = make(base_model_path, tmp_path, CONFIGS[name])
    scale_losses(trainer, groups, 0.0)
    before = weights(trainer)
    trainer.train()
    assert_sound(trainer)
    assert max_difference(weights(trainer), before) > 0
    assert trainer.state.log_history[3]["ogpsa/rank"] <= 2 - len(groups)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_loss_without_a_gradient_moves_nothing(name, optim, base_model_path, tmp_path):
    """While no capability loss has risen, there is nothing to restore."""
    trainer = make(base_model_path, tmp_path, CONFIGS[name], optim=optim, weight_decay=0.0)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * 0.0
    before = weights(trainer)
    trainer.train()
    assert max_difference(weights(trainer), before) == 0
    assert_sound(trainer)


class TestAStartThatIsNotFinite:
    """A sample that the starting model makes no number of, drawn by a later refresh only."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("loss", ["nll", "kl"])
    def test_is_an_error_that_names_the_sample(self, loss, value, base_model_path, tmp_path):
        config = OGPSAConfig(capability_loss=loss, samples_per_refresh=1, capability_batch_size=1)
        trainer = make(base_model_path, tmp_path, config)
        log_probs, scores = trainer.capability_loss.log_probs, trainer.capability_loss.scores

        def factor(batch):
            return value if any(s.name == "language/3" for s in batch.samples) else 1.0

        trainer.capability_loss.log_probs = lambda batch: log_probs(batch) * factor(batch)
        trainer.capability_loss.scores = lambda batch, score: scores(
            batch, lambda logits_TV, positions: score(logits_TV * factor(batch), positions)
        )
        message = r"of capability sample 'language/3' .* not finite"
        with pytest.raises(FloatingPointError, match=message):
            trainer.train()

    def test_in_a_checkpoint_is_an_error(self, base_model_path, tmp_path):
        config = OGPSAConfig(samples_per_refresh=3)
        make(base_model_path, tmp_path, config, save_strategy="steps", save_steps=2).train()
        folder = tmp_path / "checkpoint-2"
        change(folder / START_FILE_NAME, "log_probs", lambda values: values[0].fill_(math.nan))
        with pytest.raises(ValueError, match=rf"{START_FILE_NAME} is not finite.*delete this file"):
            make(base_model_path, tmp_path, config).train(resume_from_checkpoint=str(folder))


def change(path, name, change_):
    """Change one tensor of a file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(key for key in tensors if key.startswith(name))
    change_(tensors[name])
    save_file(tensors, path, metadata)


DAMAGES = {
    "nan": ("basis.", lambda rows: rows[0, :1].fill_(math.nan)),
    "inf": ("basis.", lambda rows: rows[1, -1:].fill_(-math.inf)),
    "rows of zeros": ("basis.", torch.Tensor.zero_),
    "one entry": ("basis.", lambda rows: rows[0, :1].add_(0.5)),
    "scaled": ("basis.", lambda rows: rows.mul_(1.01)),
    "its Gram matrix": ("gram", lambda gram: gram.mul_(2)),
    "the inverse": ("inverse_gram", lambda inverse: inverse.mul_(1.01)),
    "coordinates": ("coordinates", lambda values: values[0].fill_(math.nan)),
    "drift": ("drift", lambda values: values.fill_(math.nan)),
}


@pytest.fixture(scope="module", params=[("paper", "float32"), ("paper-theorem", "bfloat16")])
def run(request, base_model_path, tmp_path_factory):
    preset, dtype = request.param
    folder = tmp_path_factory.mktemp("run")
    config = OGPSAConfig.from_preset(preset, refresh_interval=9, basis_dtype=dtype)
    make(base_model_path, folder, config, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2", config


class TestADamagedBasis:
    """The file is whole, but what is in it is not what was saved."""

    @pytest.mark.parametrize("name", DAMAGES)
    def test_is_refused(self, name, run, base_model_path, tmp_path):
        checkpoint, config = run
        path = checkpoint / FILE_NAME
        whole = path.read_bytes()
        change(path, *DAMAGES[name])
        try:
            with pytest.raises(ValueError) as error:
                make(base_model_path, tmp_path, config).train(
                    resume_from_checkpoint=str(checkpoint)
                )
        finally:
            path.write_bytes(whole)
        for piece in (
            str(checkpoint), "ogpsa_subspace", "is damaged", "Resume from another checkpoint",
            "delete this file: it is then made anew",
        ):  # fmt: skip
            assert piece in str(error.value)

    def test_without_damage_it_is_taken(self, run, base_model_path, tmp_path):
        checkpoint, config = run
        trainer = make(base_model_path, tmp_path, config)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert not any("ogpsa/rank" in entry for entry in trainer.state.log_history[2:])
