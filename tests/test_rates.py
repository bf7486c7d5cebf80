"""A correction moves a parameter only as far as its learning rate lets the optimizer."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from laws import ALONG, SIZES, ZEROS, random_gradients, refresh, small_subspace, take_step
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
    config = OGPSAConfig(metric=metric, scope=scope, restoration=0.0, capability_loss="nll")
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


@pytest.fixture
def run(train):
    """Train with an optimizer that is made of the embeddings and all other parameters."""

    def run(make_optimizer, schedules=None, **options):
        model = tiny_model(seed=0)
        others = [p for n, p in model.named_parameters() if "embed_tokens" not in n]
        optimizer = make_optimizer(model.model.embed_tokens.weight, others)
        schedule = schedules and LambdaLR(optimizer, schedules)
        more = {"processing_class": toy_tokenizer(), "optimizers": (optimizer, schedule)}
        return train(
            model=model, more=more, config=OGPSAConfig(samples_per_refresh=3), **options
        )  # fmt: skip

    return run


def moved(trainer, start, end):
    """How far the embeddings went between two steps, and the others."""
    first, last = trainer.states[start], trainer.states[end]
    distances = {name: (last[name] - first[name]).norm().item() for name in first}
    return distances.pop("model.embed_tokens.weight"), sum(distances.values())


def test_a_schedule_that_ends_a_group_freezes_it_bitwise(run):
    """The ratio of the rates changes in the run: after the second step it is zero."""
    trainer = run(
        lambda embeddings, others: torch.optim.AdamW(
            [{"params": others, "lr": 1e-3}, {"params": [embeddings], "lr": 1e-3}]
        ),
        [lambda _: 1.0, lambda step: float(step < 2)],
        max_steps=5,
    )
    watched, others = moved(trainer, 0, 2)
    assert watched > 1e-4 and others > 1e-3
    watched, others = moved(trainer, 2, 5)
    assert watched == 0 and others > 1e-3


def test_what_the_optimizer_does_not_hold_has_no_direction_and_no_gradient(run):
    """
    It is trainable, but in no group: it is not moved, and capability passes leave it no gradient:
    the trainer clips by the length of all, and that of the first step is plain TRL's.
    """
    norms = []
    for plain in (True, False):
        trainer = run(
            lambda _, others: torch.optim.AdamW(others, lr=1e-3), plain=plain, max_grad_norm=1.0
        )
        watched, others = moved(trainer, 0, 1)
        assert watched == 0 and others > 1e-3
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == norms[1]
    assert len(trainer.subspace.basis) == len(trainer.states[0]) - 1


def test_an_optimizer_that_finds_its_own_rates_counts_as_one_of_rate_one():
    backend = small_subspace().backend
    rates = (None, torch.tensor(0.5), 0.25)
    for group, rate in zip(backend.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    assert backend.learning_rates() == [1.0, 0.5, 0.25]
