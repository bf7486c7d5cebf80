"""Numbers at the edge of float32, and zeros: no basis is poisoned, no weight is not a number."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from laws import ALONG, ZEROS, random_gradients, refresh, small_subspace, subspace_error, take_step
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.method.saved_start import START_FILE_NAME, load_start
from ogpsa_trl.method.saved_state import FILE_NAME, load_subspace
from runs import (
    ADAMW,
    capability_groups,
    change_losses,
    flat,
    make_trainer,
    max_difference,
    paper,
    weights,
)


def assert_sound_basis(subspace):
    """Orthonormal, to the rounding of its rows."""
    assert subspace_error(subspace) <= (2e-2 if subspace.dtype == torch.bfloat16 else 5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["parameter", "model"])
@pytest.mark.parametrize("target", ["gradient", "update"])
@pytest.mark.parametrize("scale", [1e30, 1e17, 1e-12, 1e-17, 1e-18, 1e-19, 1e-30, 0.0])
def test_the_length_of_a_gradient_does_not_spoil_the_basis(scale, target, scope, dtype):
    """Where its square does not fit into float32 it keeps its last one, or counts as zero."""
    settings = {"metric": "optimizer", "restoration": 1.0} if target == "update" else {}
    subspace = small_subspace(
        config=paper(target=target, scope=scope, basis_dtype=dtype, **settings)
    )
    rises = [0.0, 0.0]
    for step, factor in enumerate([1.0, scale, scale]):
        factors_R1 = torch.tensor([[factor], [1.0]])
        rows = [factors_R1 * rows_RN for rows_RN in random_gradients(seed=step)]
        gradients, _ = refresh(subspace, rows, rises)
        assert gradients.is_kept == [step > 0 and scale == 1e30, False]
        assert_sound_basis(subspace)
        if scope == "model" and step > 0:
            assert subspace.rank == (1 if scale < 1e-16 else 2)
        projection, update = take_step(subspace, ALONG)
        assert torch.cat(update).isfinite().all() and torch.cat(update).any()
        assert 0 <= projection.removed_fraction <= 1
        rises = [0.1 * max(factor, 1.0), 0.1]


@pytest.mark.parametrize("scope", ["parameter", "model"])
@pytest.mark.parametrize("target", ["gradient", "update"])
def test_without_a_gradient_nothing_is_projected_and_nothing_moves(target, scope):
    """Neither along a training gradient of zero, nor where no group has a direction."""
    metric = {"metric": "optimizer", "restoration": 1.0} if target == "update" else {}
    config = paper(target=target, scope=scope, **metric)
    subspace = small_subspace(config=config, weight_decay=0.0)
    refresh(subspace, random_gradients())
    projection, update = take_step(subspace, ZEROS)
    assert not torch.cat(update).any()
    assert projection.removed_fraction == projection.cosine == 0

    subspace, plain = small_subspace(config=config), small_subspace(config=paper(target="none"))
    subspace.was_held[:] = True
    refresh(subspace, [torch.zeros_like(rows_RN) for rows_RN in random_gradients()])
    assert subspace.rank == 0
    (projection, update), (_, expected) = (take_step(s, ALONG) for s in (subspace, plain))
    assert torch.equal(torch.cat(update), torch.cat(expected))
    assert projection.removed_fraction == 0


def assert_sound(trainer):
    """Finite weights and metrics; an orthonormal basis."""
    assert flat(weights(trainer)).isfinite().all()
    for entry in trainer.state.log_history:
        assert all(math.isfinite(v) for v in entry.values() if isinstance(v, float)), entry
    assert_sound_basis(trainer.subspace)


@pytest.mark.parametrize(
    ("loss", "scale", "groups"),
    [("kl", 1e30, ["skills"]), ("nll", 1e17, ["skills"]), ("kl", 0.0, ["skills", "language"])],
)
def test_a_capability_loss_that_explodes_or_vanishes_leaves_weights_finite(
    loss, scale, groups, make
):
    """Where no group has a direction, training goes on as plain training does."""
    trainer = make(config=OGPSAConfig(capability_loss=loss, samples_per_refresh=3), **ADAMW)
    change_losses(trainer, groups, lambda v: v * (scale if trainer.state.global_step else 1))
    before = weights(trainer)
    trainer.train()
    assert_sound(trainer)
    assert max_difference(weights(trainer), before) > 0
    last = trainer.state.log_history[2]
    assert last.get("ogpsa/kept_gradients") == (1 if scale == 1e30 else None)
    assert (last["ogpsa/rank"] == 0) == (scale == 0)


def test_a_training_loss_without_a_gradient_moves_nothing(make):
    """While no capability loss has risen, there is nothing to restore."""
    trainer = make(config=OGPSAConfig(samples_per_refresh=3), weight_decay=0.0, **ADAMW)
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute_loss(*args, **kwargs) * 0.0
    before = weights(trainer)
    trainer.train()
    assert max_difference(weights(trainer), before) == 0
    assert_sound(trainer)


@pytest.mark.parametrize(("loss", "value"), [("nll", math.nan), ("kl", math.inf)])
def test_a_start_that_is_not_finite_is_an_error_that_names_the_sample(loss, value, make):
    """A sample that the starting model makes no number of, drawn by a later refresh only."""
    config = OGPSAConfig(capability_loss=loss, samples_per_refresh=2, capability_batch_size=1)
    trainer = make(config=config, **ADAMW)
    log_probs, scores = trainer.capability_loss.log_probs, trainer.capability_loss.scores

    def factor(batch):
        return value if any(s.name == "language/3" for s in batch.samples) else 1.0

    trainer.capability_loss.log_probs = lambda batch: log_probs(batch) * factor(batch)
    trainer.capability_loss.scores = lambda batch, score: scores(
        batch, lambda logits_TV, positions: score(logits_TV * factor(batch), positions)
    )
    with pytest.raises(FloatingPointError, match=r"of capability sample 'language/3' .* not fini"):
        trainer.train()


# Of a file, what of it is changed, and how.
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
RUNS = {
    "paper": paper(refresh_interval=9),
    "preserve": OGPSAConfig(refresh_interval=9, basis_dtype="bfloat16"),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, base_model_path, tmp_path_factory):
    """A trained trainer, and its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(
        "sft", base_model_path, folder, capability=capability_groups(), config=RUNS[request.param],
        save_strategy="steps", save_steps=2, **ADAMW | {"max_steps": 2},
    )  # fmt: skip
    trainer.train()
    return trainer, folder / "checkpoint-2"


class TestADamagedCheckpoint:
    """The file is whole, but what is in it is not what was saved."""

    @pytest.fixture
    def changed(self, run, tmp_path):
        """Copy a file of the checkpoint, with one tensor changed."""

        def changed(file_name, name, change):
            path = run[1] / file_name
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            tensors = load_file(path)
            change(next(tensor for key, tensor in tensors.items() if key.startswith(name)))
            save_file(tensors, tmp_path / file_name, metadata)
            return str(tmp_path)

        return changed

    def test_a_basis_is_refused(self, run, changed):
        subspace = run[0].subspace
        for name, damage in DAMAGES.items():
            folder = changed(FILE_NAME, *damage)
            with pytest.raises(ValueError, match=r"ogpsa_subspace.*is damaged") as error:
                load_subspace(subspace, folder)
            way_out = ("Resume from another checkpoint", "delete this file: it is then made anew")
            assert all(piece in str(error.value) for piece in (folder, *way_out)), name
        subspace.is_due = True
        load_subspace(subspace, changed(FILE_NAME, "basis.", lambda rows: None))
        assert not subspace.is_due

    def test_a_starting_point_is_refused(self, run, changed):
        trainer = run[0]
        config = trainer.ogpsa_config
        name = "losses" if config.capability_loss == "nll" else "log_probs"
        folder = changed(START_FILE_NAME, name, lambda values: values[:1].fill_(math.nan))
        with pytest.raises(ValueError, match=rf"{START_FILE_NAME} is not finite.*delete this file"):
            load_start(trainer.subspace.backend, trainer.capability_groups, config, folder)
