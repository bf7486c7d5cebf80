"""`target: update`: what the optimizer really did keeps the constraint."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.backends import Shard
from ogpsa_trl.optimizers import check_keeps_no_weights
from ogpsa_trl.projection import project_update
from ogpsa_trl.subspace import CapabilitySubspace
from ogpsa_trl.toy_model import tiny_model, toy_tokenizer
from runs import (
    assert_resume_is_bitwise,
    capability_groups,
    literal_nll,
    make_trainer,
    max_difference,
    paper,
    trained,
    weights,
)

ADAMW = {
    "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5,
    "max_steps": 4,
}  # fmt: skip


class StepProbe(TrainerCallback):
    """Every real parameter change, and separately computed capability gradients before it."""

    def __init__(self, model_path):
        self.model = AutoModelForCausalLM.from_pretrained(model_path)
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.model.load_state_dict(self.before)
        self.gradients = []
        for group in capability_groups().values():
            self.model.zero_grad()
            literal_nll(self.model, self.tokenizer, group).backward()
            self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters()})

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        update = {n: p.detach() - self.before[n] for n, p in model.named_parameters()}
        self.steps.append((update, self.gradients))

    def cosines(self, scope):
        """Of the update with every capability gradient, the largest of each step."""
        for update, gradients in self.steps:
            blocks = [[name] for name in update] if scope == "parameter" else [list(update)]
            yield max(
                cosine(flat(update, names), flat(gradient, names))
                for names in blocks
                for gradient in gradients
            )


def flat(tensors, names):
    return torch.cat([tensors[name].flatten() for name in names]).double()


def cosine(left, right):
    lengths = left.norm() * right.norm()
    return ((left @ right).abs() / lengths).item() if lengths > 0 else 0.0


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


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
@pytest.mark.parametrize("scope", ["parameter", "model"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_real_step_of_adamw_is_orthogonal_to_every_capability_gradient(
    stage, scope, metric, base_model_path, tmp_path
):
    """With momentum, weight decay and clipping. Weights of size 1 round steps of 1e-2 to 1e-5."""
    _, probe = run(base_model_path, tmp_path, stage, target="update", scope=scope, metric=metric)
    assert len(probe.steps) == 4
    assert max(probe.cosines(scope)) < 1e-4


@pytest.mark.parametrize("scope", ["parameter", "model"])
def test_the_projected_gradient_does_not_make_such_a_step(scope, base_model_path, tmp_path):
    """What the guarantee of `target: gradient` is worth under AdamW: a tenth, not 1e-4."""
    trainer, probe = run(base_model_path, tmp_path, target="gradient", scope=scope)
    assert min(probe.cosines(scope)) > 1e-2
    entry = trainer.state.log_history[0]
    assert entry["ogpsa/update_in_subspace"] > 1e-3


def test_without_an_optimizers_state_update_and_gradient_are_the_same(base_model_path, tmp_path):
    """Plain SGD: the update is the gradient times the learning rate."""
    results = [
        trained(
            "sft", base_model_path, tmp_path, capability=capability_groups(), max_steps=3,
            config=paper(target=target, refresh_interval=2), learning_rate=0.1,
        )[2]
        for target in ("gradient", "update")
    ]  # fmt: skip
    assert max_difference(*results) < 1e-6


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_the_step_is_the_nearest_one_in_the_metric(metric, base_model_path, tmp_path):
    """u - D A^T (A D A^T)^-1 A u, literally, from the step that plain TRL makes."""
    options = {**ADAMW, "max_steps": 1}
    plain, before, after = trained("sft", base_model_path, tmp_path, plain=True, **options)
    names = list(before)
    update = flat(after, names) - flat(before, names)
    diagonal = torch.ones_like(update)
    if metric == "optimizer":
        state = plain.optimizer.state
        roots = [state[p]["exp_avg_sq"].double().sqrt() for _, p in plain.model.named_parameters()]
        diagonal = torch.cat([(1 / (s + s.square().mean().sqrt())).flatten() for s in roots])
    model = AutoModelForCausalLM.from_pretrained(base_model_path)
    tokenizer = AutoTokenizer.from_pretrained(base_model_path)
    rows = []
    for group in capability_groups().values():
        model.zero_grad()
        literal_nll(model, tokenizer, group).backward()
        rows.append(flat({n: p.grad for n, p in model.named_parameters()}, names))
    rows = torch.stack(rows)
    multipliers = torch.linalg.solve(rows @ (diagonal[:, None] * rows.T), rows @ update)
    expected = update - diagonal * (rows.T @ multipliers)

    config = paper(target="update", scope="model", metric=metric)
    _, _, ours = trained(
        "sft", base_model_path, tmp_path, capability=capability_groups(), config=config, **options
    )
    actual = flat(ours, names) - flat(before, names)
    # float32 weights of size 1: 6e-8 is their rounding; steps of 1e-2 times rounded products.
    assert (actual - expected).abs().max() < 1e-6


def test_a_does_not_move_before_its_direction_is_known(base_model_path, tmp_path):
    """LoRA: AdamW's weight decay and first gradients would move A, which has no direction yet."""
    from peft import LoraConfig

    def train(max_steps):
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(),
            config=paper(target="update", refresh_interval=100),
            more={"peft_config": LoraConfig(r=4, target_modules=["q_proj"])},
            **ADAMW | {"max_steps": max_steps},
        )  # fmt: skip
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        return trainer, max_difference(
            *({n: p for n, p in w.items() if "lora_A" in n} for w in (before, after))
        )

    trainer, moved = train(1)
    assert moved < 1e-7
    assert trainer.state.log_history[0]["ogpsa/held_parameters"] > 0
    trainer, moved = train(3)
    assert moved > 1e-4
    assert sum("ogpsa/held_parameters" in entry for entry in trainer.state.log_history) == 1


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_where_every_parameter_is_held_all_is_removed(metric):
    before_N, weights_N = torch.randn(2, 10)
    backend = SimpleNamespace(
        parameters=[("weight", None)],
        shards=[Shard(0, 10, 10)],
        device=torch.device("cpu"),
        weights=lambda _: weights_N,
        optimizer_class=torch.optim.AdamW,
        second_moment=lambda _: torch.full((10,), 100.0),
        learning_rates=lambda: [1e-3],
        sum_over_shards=lambda values: values,
        same_on_all=lambda values: values,
        check_no_copy=lambda weights_before: None,
        publish_weights=lambda: None,
    )
    config = OGPSAConfig.from_preset("preserve", metric=metric, restoration=0.0)
    subspace = CapabilitySubspace(backend, config)
    subspace.is_waiting[:] = True
    projection = project_update(subspace, [before_N])
    assert projection.held == ["weight"]
    assert projection.removed_fraction.item() == pytest.approx(1, rel=1e-6)
    assert torch.equal(weights_N, before_N)


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_resume_is_bitwise(metric, base_model_path, tmp_path):
    def make():
        config = paper(target="update", metric=metric, refresh_interval=3, scope="model")
        return make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(), config=config,
            save_strategy="steps", save_steps=1, **ADAMW,
        )  # fmt: skip

    assert_resume_is_bitwise(make, tmp_path, steps=(1, 2, 3))


class TestErrors:
    def test_weights_in_bfloat16(self, base_model_path, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(base_model_path, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(base_model_path)
        trainer = make_trainer(
            "sft", model, tmp_path, capability=capability_groups(),
            config=paper(target="update"), more={"processing_class": tokenizer},
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"is torch.bfloat16. Load the model with `dtype: fl"):
            trainer.train()

    def test_weights_that_are_not_contiguous(self, base_model_path, tmp_path):
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(),
            config=paper(target="update"),
        )  # fmt: skip
        weight = trainer.model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.data.t().contiguous().t()
        with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj.weight' is not contig"):
            trainer.train()

    def test_optimizers_that_are_known_to_hold_weights(self):
        optimizer_class = type("AdamWScheduleFree", (torch.optim.Optimizer,), {})
        optimizer_class.__module__ = "schedulefree.adamw_schedulefree"
        with pytest.raises(ValueError, match=r"schedulefree.AdamWScheduleFree holds weights of it"):
            check_keeps_no_weights(optimizer_class)

    @pytest.mark.parametrize("key", ["z", "master"])
    def test_optimizers_that_turn_out_to_hold_weights(self, key, tmp_path):
        """Noticed in the first step, by a state that lies beside the weights."""

        class OwnCopy(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        copy = self.state[p].setdefault(key, p.detach().clone())
                        p.copy_(copy.sub_(p.grad * group["lr"]))

        model = tiny_model(seed=0)
        trainer = make_trainer(
            "sft", model, tmp_path, capability=capability_groups(),
            config=OGPSAConfig(metric="euclidean"),
            more={
                "processing_class": toy_tokenizer(),
                "optimizers": (OwnCopy(model.parameters(), lr=0.1), None),
            },
        )  # fmt: skip
        with pytest.raises(ValueError, match=rf"OwnCopy holds weights in its state {key!r}"):
            trainer.train()

    def test_but_not_those_that_remember_or_average_them(self, base_model_path, tmp_path):
        class Remembering(torch.optim.SGD):
            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        self.state[p].setdefault("p0", p.detach().clone())
                return super().step(closure)

        for optimizer_class in (Remembering, torch.optim.ASGD):
            model = tiny_model(seed=0)
            trainer = make_trainer(
                "sft", model, tmp_path / optimizer_class.__name__, max_steps=2,
                capability=capability_groups(), config=OGPSAConfig(metric="euclidean"),
                more={
                    "processing_class": toy_tokenizer(),
                    "optimizers": (optimizer_class(model.parameters(), lr=0.1), None),
                },
            )  # fmt: skip
            trainer.train()
            assert trainer.state.global_step == 2

    def test_optimizers_with_another_state(self, base_model_path, tmp_path):
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(), optim="adafactor",
            config=paper(target="update", metric="optimizer"),
        )  # fmt: skip
        with pytest.raises(ValueError, match=r"is transformers.Adafactor. Set `optim` to one"):
            trainer.train()


def test_an_optimizer_without_a_second_moment_has_the_euclidean_metric(base_model_path, tmp_path):
    results = [
        trained(
            "sft", base_model_path, tmp_path, capability=capability_groups(), max_steps=3,
            config=paper(target="update", metric=metric, refresh_interval=2),
            learning_rate=0.1,
        )[2]
        for metric in ("euclidean", "optimizer")
    ]  # fmt: skip
    assert max_difference(*results) < 1e-6


def test_a_fused_adamw_has_the_same_metric(base_model_path, tmp_path):
    results = [
        trained(
            "sft", base_model_path, tmp_path, capability=capability_groups(), optim=optimizer,
            config=paper(target="update", metric="optimizer"), max_steps=3,
            learning_rate=1e-3,
        )[2]
        for optimizer in ("adamw_torch", "adamw_torch_fused")
    ]  # fmt: skip
    # Two forms of Adam round differently where its denominator is small.
    assert max_difference(*results) < 1e-4
