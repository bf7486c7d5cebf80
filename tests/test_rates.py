"""A correction moves a parameter only as far as its learning rate lets the optimizer."""

import pytest
import torch

from laws import ALONG, EXACT, SIZES, ZEROS, random_gradients, refresh, small_subspace, take_step
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer


def literal_update(rates, moments, updates, rows, metric, scope):
    """u - D A^T (A D A^T)^-1 A u, the nearest u' in D^-1 with A u' = 0; all in float64."""

    def metric_of(rate, moment, update):
        if rate == 0 or not update.any():
            return torch.zeros(len(update), dtype=torch.float64)
        if metric == "euclidean":
            return torch.full((len(update),), rate, dtype=torch.float64)
        root = moment.double().sqrt()
        return rate / (root + moment.double().mean().sqrt())

    def solved(D, u, A):
        return u - D * (A.T @ torch.linalg.pinv(A @ (D[:, None] * A.T)) @ (A @ u))

    Ds = [metric_of(*triple) for triple in zip(rates, moments, updates, strict=True)]
    us, As = [u.double() for u in updates], [rows_RN.double() for rows_RN in rows]
    if scope == "parameter":
        return list(map(solved, Ds, us, As))
    return solved(torch.cat(Ds), torch.cat(us), torch.cat(As, dim=1)).split(SIZES)


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
@pytest.mark.parametrize("scope", ["parameter", "model"])
@pytest.mark.parametrize(
    "rates", [(1e-3, 1e-3, 1e-3), (1e-3, 1e-5, 1.0), (2e-4, 0.0, 1e-4), (0.0, 0.0, 0.0)]
)
@pytest.mark.parametrize("still", [None, 2])
def test_the_update_is_the_nearest_in_the_metric_of_the_rates(still, rates, scope, metric):
    """A group at rate 0, and a parameter that the optimizer did not touch, stay where they are."""
    rows = random_gradients()
    gradient = ALONG if still is None else [*ALONG[:still], ZEROS[still]]
    config = OGPSAConfig(metric=metric, scope=scope, restoration=0.0, **EXACT)
    subspace, plain = (small_subspace(rates=rates, config=config) for _ in range(2))
    refresh(subspace, rows)
    (_, updates), (_, found) = (take_step(s, gradient) for s in (plain, subspace))
    # Moments of the first step of AdamW.
    moments = [0.001 * gradient_N**2 for gradient_N in gradient]
    expected = literal_update(rates, moments, updates, rows, metric, scope)
    for index, (update, rate) in enumerate(zip(updates, rates, strict=True)):
        if rate == 0 or not update.any():
            assert not found[index].any()
        # A share of the update: the parameters' rates differ by up to 1e5.
        difference = (found[index] - expected[index]).abs().max()
        assert difference <= 1e-4 * max(update.abs().max(), 1e-30)


def test_a_schedule_that_ends_a_group_freezes_it_bitwise():
    """The ratio of the rates changes in the run: after the second step it is zero."""
    subspace = small_subspace(config=OGPSAConfig(**EXACT))
    for step in range(5):
        if step == 2:
            subspace.backend.optimizer.param_groups[0]["lr"] = 0.0
        refresh(subspace, random_gradients(seed=step), rises=[0.01, 0.02])
        _, (watched, *others) = take_step(subspace, ALONG)
        assert watched.any() == (step < 2)
        assert all(other.any() for other in others)


def test_what_the_optimizer_does_not_hold_has_no_direction_and_no_gradient(train):
    """
    It is trainable, but in no group: it is not moved, and capability passes leave it no gradient:
    the trainer clips by the length of all, and that of the first step is plain TRL's.
    """
    norms, unheld = [], "model.embed_tokens.weight"
    for plain in (True, False):
        model = tiny_model(seed=0)
        held = [parameter for name, parameter in model.named_parameters() if name != unheld]
        more = {"optimizers": (torch.optim.AdamW(held, lr=1e-3), None)}
        trainer = train(
            plain=plain, model=model, more={"processing_class": toy_tokenizer(), **more},
            config=OGPSAConfig(samples_per_refresh=3), max_grad_norm=1.0,
        )  # fmt: skip
        before, after = trainer.states
        assert all(torch.equal(before[name], after[name]) == (name == unheld) for name in before)
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == norms[1]
    assert len(trainer.subspace.basis) == len(before) - 1


def test_an_optimizer_that_finds_its_own_rates_counts_as_one_of_rate_one():
    backend = small_subspace().backend
    rates = (None, torch.tensor(0.5), 0.25)
    for group, rate in zip(backend.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert backend.learning_rates() == [1.0, 0.5, 0.25]
