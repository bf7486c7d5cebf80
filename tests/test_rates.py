"""A correction moves a parameter only as far as its learning rate lets the optimizer."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from laws import SIZES, random_gradients, refresh, small_subspace, take_step
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from runs import capability_groups, make_trainer, weights


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
    us, As = [u.double() for u in updates], [rows_RN.double() for rows_RN in rows]
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
    rows, gradients = random_gradients(), random_gradients(num_gradients=2, seed=1)
    if still is not None:
        gradients[still].zero_()
    config = OGPSAConfig(metric=metric, scope=scope, restoration=0.0, capability_loss="nll")
    subspace, plain = (small_subspace(rates=rates, config=config) for _ in range(2))
    refresh(subspace, rows)
    _, updates = take_step(plain, [gradient_RN[0] for gradient_RN in gradients])
    _, found = take_step(subspace, [gradient_RN[0] for gradient_RN in gradients])
    # Moments of the first step of AdamW.
    moments = [0.001 * gradient_RN[0] ** 2 for gradient_RN in gradients]
    expected = literal_update(rates, moments, updates, rows, metric, scope)
    for index, (update, rate) in enumerate(zip(updates, rates, strict=True)):
        if rate == 0 or not update.any():
            assert not found[index].any()
        # A share of the update: the parameters' rates differ by up to 1e5.
        difference = (found[index] - expected[index]).abs().max()
        assert difference <= 1e-4 * max(update.abs().max(), 1e-30)


class Watch(TrainerCallback):
    """The weights after every step."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.states.append({n: p.detach().clone() for n, p in model.named_parameters()})

    on_step_end = on_train_begin

    def moved(self, start, end):
        """How far the embeddings went between two steps, and the others."""
        first, last = self.states[start], self.states[end]
        distances = {name: (last[name] - first[name]).norm().item() for name in first}
        watched = distances.pop("model.embed_tokens.weight")
        return watched, sum(distances.values())


def run(model, optimizer, folder, schedule=None, plain=False, **options):
    watch = Watch()
    trainer = make_trainer(
        "sft", model, folder, plain=plain, capability=None if plain else capability_groups(),
        config=None if plain else OGPSAConfig(samples_per_refresh=3),
        more={
            "processing_class": toy_tokenizer(), "optimizers": (optimizer, schedule),
            "callbacks": [watch],
        },
        **options,
    )  # fmt: skip
    trainer.train()
    return trainer, watch


def without_embeddings(model):
    return [p for n, p in model.named_parameters() if "embed_tokens" not in n]


def test_a_schedule_that_ends_a_group_freezes_it_bitwise(tmp_path):
    """The ratio of the rates changes in the run: after the second step it is zero."""
    model = tiny_model(seed=0)
    groups = [
        {"params": without_embeddings(model), "lr": 1e-3},
        {"params": [model.model.embed_tokens.weight], "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = LambdaLR(optimizer, [lambda _: 1.0, lambda step: float(step < 2)])
    _, watch = run(model, optimizer, tmp_path, schedule, max_steps=5)
    watched, others = watch.moved(0, 2)
    assert watched > 1e-4 and others > 1e-3
    watched, others = watch.moved(2, 5)
    assert watched == 0 and others > 1e-3


def test_what_the_optimizer_does_not_hold_has_no_direction_and_no_gradient(tmp_path):
    """
    It is trainable, but in no group: it is not moved, and capability passes leave it no gradient:
    the trainer clips by the length of all, and that of the first step is plain TRL's.
    """
    norms = []
    for plain in (True, False):
        model = tiny_model(seed=0)
        optimizer = torch.optim.AdamW(without_embeddings(model), lr=1e-3)
        trainer, watch = run(model, optimizer, tmp_path, plain=plain, max_grad_norm=1.0)
        watched, others = watch.moved(0, 1)
        assert watched == 0 and others > 1e-3
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == norms[1]
    assert len(trainer.subspace.basis) == len(weights(trainer)) - 1


def test_an_optimizer_that_finds_its_own_rates_counts_as_one_of_rate_one():
    backend = small_subspace().backend
    for group, rate in zip(
        backend.optimizer.param_groups, (None, torch.tensor(0.5), 0.25), strict=True
    ):
        group["lr"] = rate
    assert backend.learning_rates() == [1.0, 0.5, 0.25]
