"""`target: update`: what the optimizer really did changes no capability loss, to first order."""

import functools
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import Adafactor, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from laws import SIZES, largest_cosine, random_gradients, refresh, small_subspace, take_step
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.engines.adam_moments import check_keeps_no_weights
from ogpsa_trl.method.subspace import CapabilitySubspace
from runs import capability_groups, literal_nll, make_trainer, paper, trained

ADAMW = {
    "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5,
    "max_steps": 3,
}  # fmt: skip


class StepProbe(TrainerCallback):
    """Every real parameter change, and separately computed capability gradients before it."""

    def __init__(self, model_path):
        self.model_path = model_path
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.gradients = literal_gradients(self.model_path, self.before)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        update = {n: p.detach() - self.before[n] for n, p in model.named_parameters()}
        self.steps.append((update, self.gradients))

    def cosines(self, scope):
        """Of the update with every capability gradient, the largest of each step."""
        for update, gradients in self.steps:
            rows = [torch.stack([g[n].flatten() for g in gradients]) for n in update]
            yield largest_cosine([update[n].flatten() for n in update], rows, scope)


@functools.cache
def loaded(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    return AutoModelForCausalLM.from_pretrained(model_path), tokenizer


def literal_gradients(model_path, state):
    """The gradient of every group at some weights, by autograd on the literal loss."""
    model, tokenizer = loaded(model_path)
    model.load_state_dict(state)
    gradients = []
    for group in capability_groups().values():
        model.zero_grad()
        literal_nll(model, tokenizer, group).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    return gradients


def flat(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names]).double()


def run(model_path, tmp_path, stage="sft", **settings):
    options = {key: settings.pop(key) for key in list(settings) if key in ADAMW}
    probe = StepProbe(model_path)
    trainer = make_trainer(
        stage, model_path, tmp_path, capability=capability_groups(),
        config=paper(refresh_interval=1, **settings), more={"callbacks": [probe]},
        **ADAMW | options,
    )  # fmt: skip
    trainer.train()
    return trainer, probe


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
)  # fmt: skip
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
    stage, scope, metric, base_model_path, tmp_path
):
    """With momentum, weight decay and clipping. Weights of size 1 round steps of 1e-2 to 1e-5."""
    _, probe = run(base_model_path, tmp_path, stage, target="update", scope=scope, metric=metric)
    assert len(probe.steps) == 3
    assert max(probe.cosines(scope)) < 1e-4


def test_the_projected_gradient_does_not_make_such_a_step(base_model_path, tmp_path):
    """What the guarantee of `target: gradient` is worth under AdamW: a hundredth, not 1e-4."""
    trainer, probe = run(base_model_path, tmp_path, target="gradient", scope="model", max_steps=2)
    assert min(probe.cosines("model")) > 1e-2
    assert trainer.state.log_history[0]["ogpsa/update_in_subspace"] > 1e-3


@pytest.mark.parametrize("scope", ["parameter", "model"])
def test_under_plain_gradient_descent_gradient_and_update_are_the_same(scope):
    """It has no second moment: its metric is the Euclidean one."""
    results = []
    for settings in ({}, {"target": "update"}, {"target": "update", "metric": "optimizer"}):
        subspace = small_subspace(torch.optim.SGD, config=paper(scope=scope, **settings))
        refresh(subspace, random_gradients())
        steps = [take_step(subspace, [g[0] for g in random_gradients(seed=s)])[1] for s in (1, 2)]
        results.append(torch.cat([torch.cat(update) for update in steps]))
    assert results[0].any()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-7)


def test_the_step_is_the_nearest_one_in_the_metric(base_model_path, tmp_path):
    """u - D A^T (A D A^T)^-1 A u, literally, from the step that plain TRL makes."""
    options = {**ADAMW, "max_steps": 1}
    plain, before, after = trained("sft", base_model_path, tmp_path, plain=True, **options)
    names = list(before)
    update = flat(after, names) - flat(before, names)
    state = plain.optimizer.state
    roots = [state[p]["exp_avg_sq"].double().sqrt() for _, p in plain.model.named_parameters()]
    diagonal = torch.cat([(1 / (s + s.square().mean().sqrt())).flatten() for s in roots])
    rows = torch.stack([flat(g, names) for g in literal_gradients(base_model_path, before)])
    multipliers = torch.linalg.solve(rows @ (diagonal[:, None] * rows.T), rows @ update)
    expected = update - diagonal * (rows.T @ multipliers)

    config = paper(target="update", scope="model", metric="optimizer")
    _, _, ours = trained(
        "sft", base_model_path, tmp_path, capability=capability_groups(), config=config, **options
    )
    actual = flat(ours, names) - flat(before, names)
    # float32 weights of size 1: 6e-8 is their rounding; steps of 1e-2 times rounded products.
    assert (actual - expected).abs().max() < 1e-6


def test_what_weight_decay_alone_moves_takes_no_part_in_a_correction():
    """No gradient has reached it: nothing is known of its metric."""
    config = paper(target="update", scope="model", metric="optimizer")
    subspace = small_subspace(config=config, weight_decay=0.1)
    subspace.backend.model[2].data.fill_(1.0)
    refresh(subspace, random_gradients())
    projection, update = take_step(subspace, [torch.ones(7), torch.ones(5), torch.zeros(4)])
    torch.testing.assert_close(update[2], torch.full((4,), -1e-3), rtol=1e-3, atol=0.0)
    assert 0 < projection.removed_fraction < 1


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
@pytest.mark.parametrize("num_waiting", [1, 3])
def test_what_waits_for_a_direction_is_held_for_one_step(num_waiting, metric):
    """Weight decay and momentum would move it. Where all is held, all is removed."""
    subspace = small_subspace(config=paper(target="update", metric=metric), weight_decay=0.1)
    rows = random_gradients()
    for rows_RN in rows[:num_waiting]:
        rows_RN.zero_()
    gradient = [torch.ones(size) for size in SIZES]
    for is_held in (True, False):
        refresh(subspace, rows)
        assert not subspace.is_due
        projection, update = take_step(subspace, gradient)
        moved = [bool(update_N.any()) for update_N in update]
        assert moved == [not is_held or index >= num_waiting for index in range(3)]
        assert projection.held == ([str(i) for i in range(num_waiting)] if is_held else [])
        assert subspace.is_due == is_held
        if is_held and num_waiting == 3:
            assert projection.removed_fraction.item() == pytest.approx(1, rel=1e-6)


def test_a_does_not_move_before_its_direction_is_known(base_model_path, tmp_path):
    """LoRA: AdamW's weight decay and first gradients would move A, which has no direction yet."""
    states = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            state = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
            states.append(flat(state, state))

    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(),
        config=paper(target="update", refresh_interval=100),
        more={
            "peft_config": LoraConfig(r=4, target_modules=["q_proj"]), "callbacks": [Watch()],
        },
        **ADAMW,
    )  # fmt: skip
    trainer.train()
    assert torch.equal(states[0], states[1])
    assert (states[2] - states[1]).abs().max() > 1e-4
    held = ["ogpsa/held_parameters" in entry for entry in trainer.state.log_history[:-1]]
    assert held == [True, False, False]


class OwnCopy(torch.optim.SGD):
    """Makes the weights anew from a copy of them."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                copy = self.state[p].setdefault("z", p.detach().clone())
                p.copy_(copy.sub_(p.grad * group["lr"]))


class Remembering(torch.optim.SGD):
    """Keeps the weights of the start."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("p0", p.detach().clone())
        return super().step(closure)


def one_step_of(optimizer_class):
    subspace = small_subspace(optimizer_class, config=paper(target="update"))
    for parameter in subspace.backend.model:
        parameter.data.fill_(1.0)
    refresh(subspace, random_gradients())
    take_step(subspace, [torch.ones(size) for size in SIZES])
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

    @pytest.mark.parametrize("optimizer_class", [Remembering, torch.optim.ASGD])
    def test_but_not_those_that_remember_or_average_them(self, optimizer_class):
        assert one_step_of(optimizer_class).is_optimizer_checked
