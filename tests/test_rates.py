"""A correction moves a parameter only as far as its learning rate lets the optimizer."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.backends import Shard
from ogpsa_trl.projection import project_update
from ogpsa_trl.subspace import CapabilitySubspace
from ogpsa_trl.toy_model import tiny_model, toy_tokenizer
from runs import capability_groups, make_trainer, paper, weights

SIZES = (7, 5, 4)
NUM_ROWS = 2


def make_subspace(rates, moments, updates, rows, **settings):
    """A subspace of parameters with these rates and updates, and the weights that it changes."""
    before = [torch.zeros_like(update) for update in updates]
    after = {index: update.clone() for index, update in enumerate(updates)}
    backend = SimpleNamespace(
        parameters=[(f"p{index}", index) for index in range(len(SIZES))],
        shards=[Shard(0, size, size) for size in SIZES],
        device=torch.device("cpu"),
        weights=after.__getitem__,
        optimizer_class=torch.optim.AdamW,
        second_moment=moments.__getitem__,
        learning_rates=lambda: rates,
        sum_over_shards=lambda values: values,
        same_on_all=lambda values: values,
        check_no_copy=lambda weights_before: None,
        publish_weights=lambda: None,
    )
    config = OGPSAConfig(**{"restoration": 0.0, **settings})
    subspace = CapabilitySubspace(backend, config)
    subspace.basis = list(rows)
    subspace.gram_PKK = torch.stack([rows_KN @ rows_KN.T for rows_KN in rows])
    subspace.gram = subspace.merge(subspace.gram_PKK)
    subspace.inverse_gram = torch.linalg.pinv(subspace.gram)
    num_blocks = len(subspace.gram)
    subspace.coordinates = torch.eye(NUM_ROWS).expand(num_blocks, -1, -1)
    subspace.mean_coordinates = torch.ones(num_blocks, NUM_ROWS)
    subspace.predicted_change = torch.zeros(NUM_ROWS)
    return subspace, before, after


def literal_update(rates, moments, updates, rows, metric, scope):
    """argmin |u' - u| in D^-1 over the parameters that move, with A u' = 0; all in float64."""

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
    us, As = [u.double() for u in updates], [rows_KN.double() for rows_KN in rows]
    if scope == "parameter":
        return [solved(*triple) for triple in zip(Ds, us, As, strict=True)]
    return solved(torch.cat(Ds), torch.cat(us), torch.cat(As, dim=1)).split(SIZES)


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
@pytest.mark.parametrize("scope", ["parameter", "model"])
@pytest.mark.parametrize(
    "rates", [(1e-3, 1e-3, 1e-3), (1e-3, 1e-5, 1.0), (2e-4, 0.0, 1e-4), (0.0, 0.0, 0.0)]
)
@pytest.mark.parametrize("still", [None, 2])
def test_the_update_is_the_nearest_in_the_metric_of_the_rates(still, rates, scope, metric):
    """A group at rate 0, and a parameter that the optimizer did not touch, stay where they are."""
    generator = torch.Generator().manual_seed(1)
    moments = [torch.rand(size, generator=generator) + 0.1 for size in SIZES]
    updates = [
        rate * torch.randn(size, generator=generator)
        for rate, size in zip(rates, SIZES, strict=True)
    ]
    rows = [torch.randn(NUM_ROWS, size, generator=generator) for size in SIZES]
    if still is not None:
        updates[still].zero_()
    subspace, before, after = make_subspace(
        rates, moments, updates, rows, metric=metric, scope=scope
    )
    project_update(subspace, before)
    expected = literal_update(rates, moments, updates, rows, metric, scope)
    for index, (update, rate) in enumerate(zip(updates, rates, strict=True)):
        if rate == 0 or not update.any():
            assert torch.equal(after[index], torch.zeros_like(update))
        # A share of the update: the parameters' rates differ by up to 1e5.
        difference = (after[index] - expected[index]).abs().max()
        assert difference <= 1e-4 * max(update.abs().max(), 1e-30)


def two_groups(optimizer_class, watched_rate):
    """A model whose embeddings have a rate of their own."""
    model = tiny_model(seed=0)
    watched = [model.model.embed_tokens.weight]
    others = [p for p in model.parameters() if p is not watched[0]]
    groups = [{"params": others, "lr": 1e-3}, {"params": watched, "lr": watched_rate}]
    return model, optimizer_class(groups)


def moved(model, optimizer, scheduler, folder, config, steps=4):
    """How far the embeddings went, and the others."""
    trainer = make_trainer(
        "sft", model, folder, capability=capability_groups(), config=config, max_steps=steps,
        more={"processing_class": toy_tokenizer(), "optimizers": (optimizer, scheduler)},
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    distances = {n: (w - before[n]).norm().item() for n, w in weights(trainer).items()}
    watched = distances.pop("model.embed_tokens.weight")
    return watched, sum(distances.values())


@pytest.mark.parametrize(
    ("metric", "scope", "optimizer_class"),
    [
        *itertools.product(["euclidean", "optimizer"], ["parameter", "model"], [torch.optim.AdamW]),
        ("euclidean", "model", torch.optim.Adafactor), ("optimizer", "model", torch.optim.SGD),
    ],
)  # fmt: skip
def test_a_group_at_rate_zero_is_frozen_bitwise(metric, scope, optimizer_class, tmp_path):
    model, optimizer = two_groups(optimizer_class, 0.0)
    config = OGPSAConfig(metric=metric, scope=scope, samples_per_refresh=3)
    watched, others = moved(model, optimizer, None, tmp_path, config)
    assert watched == 0
    assert others > 1e-3


def test_a_schedule_that_ends_a_group_freezes_it(tmp_path):
    """The ratio of the rates changes in the run: after the second step it is zero."""
    config = OGPSAConfig(samples_per_refresh=3)
    distances = {}
    for steps in (2, 5):
        model, optimizer = two_groups(torch.optim.AdamW, 1e-3)
        schedules = [lambda _: 1.0, lambda step: float(step < 2)]
        scheduler = LambdaLR(optimizer, schedules)
        distances[steps], others = moved(
            model, optimizer, scheduler, tmp_path / str(steps), config, steps
        )
        assert others > 1e-3
    assert distances[2] == distances[5] > 1e-4


def test_what_the_optimizer_does_not_hold_has_no_direction(tmp_path):
    """It is trainable, but in no group: neither a basis is kept of it, nor is it moved."""
    model = tiny_model(seed=0)
    held = [p for n, p in model.named_parameters() if "embed_tokens" not in n]
    config = OGPSAConfig(samples_per_refresh=3)
    watched, others = moved(model, torch.optim.AdamW(held, lr=1e-3), None, tmp_path, config)
    assert watched == 0
    assert others > 1e-3


def test_what_the_optimizer_does_not_hold_gets_no_capability_gradient(tmp_path):
    """The trainer clips by the length of all gradients: that of the first step is plain TRL's."""
    norms = []
    for plain in (True, False):
        model = tiny_model(seed=0)
        held = [p for n, p in model.named_parameters() if "embed_tokens" not in n]
        optimizer = torch.optim.SGD(held, lr=1e-3)
        trainer = make_trainer(
            "sft", model, tmp_path / str(plain), plain=plain, max_grad_norm=1.0,
            capability=None if plain else capability_groups(),
            config=None if plain else paper(target="none", refresh_interval=1),
            more={"processing_class": toy_tokenizer(), "optimizers": (optimizer, None)},
        )  # fmt: skip
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == norms[1]


def test_equal_rates_change_nothing(tmp_path):
    """Two groups of one rate are one group."""
    results = []
    for make in (lambda m: m.parameters(), lambda m: [{"params": [p]} for p in m.parameters()]):
        model = tiny_model(seed=0)
        optimizer = torch.optim.AdamW(make(model), lr=1e-3)
        config = paper(target="update", metric="optimizer", scope="model", refresh_interval=1)
        results.append(moved(model, optimizer, None, tmp_path / str(len(results)), config))
    assert results[0] == results[1]
