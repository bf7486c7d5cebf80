"""`target: update`: what the optimizer really did changes no capability loss, to first order."""

from types import SimpleNamespace

import pytest
import torch
from transformers import Adafactor

from laws import (
    ALONG,
    ONES,
    ZEROS,
    largest_cosine,
    random_gradients,
    refresh,
    small_subspace,
    take_step,
)
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.engines.adam_moments import check_keeps_no_weights
from ogpsa_trl.method.subspace import CapabilitySubspace
from runs import ADAMW, paper, step_cosines

DECAYING = {
    **ADAMW, "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, "max_steps": 3
}  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "metric", "optimizer", "options"),
    [
        ("parameter", "euclidean", torch.optim.AdamW, {"weight_decay": 0.1}),
        ("parameter", "optimizer", torch.optim.NAdam, {}),
        ("model", "euclidean", torch.optim.AdamW, {}),
        ("model", "optimizer", torch.optim.AdamW, {"weight_decay": 0.1}),
        ("model", "optimizer", torch.optim.Adam, {"amsgrad": True}),
        ("parameter", "euclidean", torch.optim.SGD, {"momentum": 0.9}),
        ("model", "euclidean", torch.optim.RMSprop, {}),
    ],
)
def test_the_step_of_an_optimizer_is_orthogonal_to_every_capability_gradient(
    scope, metric, optimizer, options
):
    config = paper(target="update", scope=scope, metric=metric)
    subspace = small_subspace(optimizer, config=config, **options)
    for step in range(4):
        rows = random_gradients(seed=step)
        refresh(subspace, rows)
        gradient = [gradient_RN[0] for gradient_RN in random_gradients(seed=9 + step)]
        projection, update = take_step(subspace, gradient)
        assert largest_cosine(update, rows, scope) < 1e-5
        assert 0 < projection.removed_fraction < 1
        assert torch.cat(update).any()


@pytest.mark.parametrize(
    ("stage", "scope", "metric"), [("sft", "parameter", "optimizer"), ("dpo", "model", "euclidean")]
)
def test_the_real_step_of_adamw_is_orthogonal_to_every_capability_gradient(
    stage, scope, metric, train, base_model_path
):
    """With momentum, weight decay and clipping. Weights of size 1 round steps of 1e-2 to 1e-5."""
    config = paper(target="update", scope=scope, metric=metric, refresh_interval=1)
    states = train(stage, config=config, **DECAYING).states
    cosines = list(step_cosines(states, base_model_path, scope))
    assert len(cosines) == 3 and max(cosines) < 1e-4


def test_the_projected_gradient_does_not_make_such_a_step(train, base_model_path):
    """What the guarantee of `target: gradient` is worth under AdamW: a hundredth, not 1e-4."""
    trainer = train(config=paper(scope="model", refresh_interval=1), **DECAYING)
    assert min(step_cosines(trainer.states, base_model_path, "model")) > 1e-2
    assert trainer.state.log_history[0]["ogpsa/update_in_subspace"] > 1e-3


@pytest.mark.parametrize("scope", ["parameter", "model"])
def test_under_plain_gradient_descent_gradient_and_update_are_the_same(scope):
    """It has no second moment: its metric is the Euclidean one."""
    results = []
    for settings in ({}, {"target": "update"}, {"target": "update", "metric": "optimizer"}):
        subspace = small_subspace(torch.optim.SGD, config=paper(scope=scope, **settings))
        refresh(subspace, random_gradients())
        results.append(torch.cat([*take_step(subspace, ALONG)[1], *take_step(subspace, ONES)[1]]))
    assert results[0].any()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-7)


def test_what_weight_decay_alone_moves_takes_no_part_in_a_correction():
    """No gradient has reached it: nothing is known of its metric."""
    config = paper(target="update", scope="model", metric="optimizer")
    subspace = small_subspace(config=config, weight_decay=0.1)
    subspace.backend.model[2].data.fill_(1.0)
    refresh(subspace, random_gradients())
    projection, update = take_step(subspace, [*ONES[:2], ZEROS[2]])
    torch.testing.assert_close(update[2], torch.full((4,), -1e-3), rtol=1e-3, atol=0.0)
    assert 0 < projection.removed_fraction < 1


@pytest.mark.parametrize(
    ("target", "metric", "optimizer", "options"),
    [
        ("update", "euclidean", torch.optim.AdamW, {"weight_decay": 0.1}),
        ("update", "optimizer", torch.optim.AdamW, {"weight_decay": 0.1}),
        ("gradient", "euclidean", torch.optim.SGD, {}),
    ],
)
@pytest.mark.parametrize("num_waiting", [1, 3])
def test_what_waits_for_a_direction_is_held_for_one_step(
    num_waiting, target, metric, optimizer, options
):
    """
    Weight decay and momentum would move it. Where all is held, all is removed. One that has no
    direction at the second look either is one that no capability loss needs.
    """
    subspace = small_subspace(optimizer, config=paper(target=target, metric=metric), **options)
    rows = random_gradients()
    for rows_RN in rows[:num_waiting]:
        rows_RN.zero_()
    for is_held in (True, False):
        refresh(subspace, rows)
        assert not subspace.is_due
        projection, update = take_step(subspace, ONES)
        moved = [bool(update_N.any()) for update_N in update]
        assert moved == [not is_held or index >= num_waiting for index in range(3)]
        assert projection.held == ([str(i) for i in range(num_waiting)] if is_held else [])
        assert subspace.is_due == is_held
        if is_held and num_waiting == 3:
            assert projection.removed_fraction.item() == pytest.approx(1, rel=1e-6)


class Keeping(torch.optim.SGD):
    """Keeps a copy of the weights of the start."""

    is_source = False  # or one that it makes the weights of

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                copy = self.state[p].setdefault("z", p.detach().clone())
                if self.is_source:
                    p.copy_(copy.sub_(p.grad * group["lr"]))
        return None if self.is_source else super().step(closure)


class OwnCopy(Keeping):
    is_source = True


def one_step_of(optimizer_class):
    subspace = small_subspace(optimizer_class, config=paper(target="update"))
    for parameter in subspace.backend.model:
        parameter.data.fill_(1.0)
    refresh(subspace, random_gradients())
    take_step(subspace, ONES)
    return subspace


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda p: p.bfloat16(), r"'weight' is torch.bfloat16. Load the model with `dtype: fl"),
            (lambda p: p.t(), r"'weight' is not contiguous in memory. Set `parameter.data = "),
        ],
    )
    def test_weights_that_cannot_be_corrected(self, change, message):
        weight = change(torch.zeros(3, 4))
        backend = SimpleNamespace(
            parameters=[("weight", weight)], weights=lambda weight: weight.reshape(-1)
        )
        with pytest.raises(ValueError, match=message):
            CapabilitySubspace(backend, OGPSAConfig())

    def test_optimizers_whose_metric_is_not_known(self):
        with pytest.raises(ValueError, match=r"is transformers.Adafactor. Set `optim` to one"):
            small_subspace(Adafactor, relative_step=False)

    def test_optimizers_that_are_known_to_hold_weights(self):
        optimizer_class = type("AdamWScheduleFree", (torch.optim.Optimizer,), {})
        optimizer_class.__module__ = "schedulefree.adamw_schedulefree"
        with pytest.raises(ValueError, match=r"schedulefree.AdamWScheduleFree holds weights of it"):
            check_keeps_no_weights(optimizer_class)

    def test_optimizers_that_turn_out_to_hold_weights(self):
        """Noticed in the first step, by a state that lies beside the weights."""
        with pytest.raises(ValueError, match=r"OwnCopy holds weights in its state 'z'"):
            one_step_of(OwnCopy)

    @pytest.mark.parametrize("optimizer_class", [Keeping, torch.optim.ASGD])
    def test_but_not_those_that_remember_or_average_them(self, optimizer_class):
        assert one_step_of(optimizer_class).is_optimizer_checked
