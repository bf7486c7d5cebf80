"""The trainers against TRL's, against the literal method, and with everything that TRL does."""

import contextlib
import itertools
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, RichProgressCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from laws import literal_basis, literal_projection
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.benchmark.toy_model import tiny_llama_config, toy_tokenizer
from ogpsa_trl.training import diagnostics, step
from runs import (
    CosineCallback,
    WeightsCallback,
    capability_groups,
    literal_nll,
    logged,
    make_trainer,
    max_difference,
    paper,
    safety_data,
    to_messages,
    trained,
    weights,
)

STAGES = ("sft", "dpo")
WITH_TOKENIZER = {"processing_class": toy_tokenizer()}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def literal_capability(path, groups):
    """The loss of every group, and its gradient by autograd on the literal loss; {name: [R, N]}."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    named = dict(model.named_parameters())
    losses = {name: literal_nll(model, tokenizer, group) for name, group in groups.items()}
    rows = [torch.autograd.grad(loss, list(named.values())) for loss in losses.values()]
    return losses, {
        name: torch.stack([row[index].flatten() for row in rows])
        for index, name in enumerate(named)
    }


@pytest.mark.parametrize("stage", STAGES)
def test_no_capability_dataset_is_bitwise_plain_trl(stage, base_model_path, tmp_path):
    options = {
        "max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0,
        "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    ours, _, our_weights = trained(stage, base_model_path, tmp_path / "run", **options)
    (tmp_path / "run").rename(tmp_path / "ours")
    plain, _, plain_weights = trained(
        stage, base_model_path, tmp_path / "run", plain=True, **options
    )
    assert max_difference(our_weights, plain_weights) == 0
    assert logged(ours) == logged(plain)
    our_files = {p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*")}
    assert our_files == {p.relative_to(tmp_path / "run") for p in (tmp_path / "run").rglob("*")}
    for file in our_files:
        if file.name not in ("trainer_state.json", "training_args.bin") and "." in file.name:
            ours_bytes = (tmp_path / "ours" / file).read_bytes()
            assert ours_bytes == (tmp_path / "run" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("stage", "scope", "accumulation"),
    [("sft", "parameter", 1), ("sft", "model", 2), ("dpo", "parameter", 2), ("dpo", "model", 1)],
)
def test_step_is_the_literal_method(stage, scope, accumulation, base_model_path, tmp_path):
    """SVD of the stacked capability gradients, subtract: what the weights of one real step lost."""
    groups = capability_groups()
    options = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
    }
    _, before, after = trained(stage, base_model_path, tmp_path, plain=True, **options)
    gradient = {name: before[name] - after[name] for name in before}
    losses, rows = literal_capability(base_model_path, groups)
    if scope == "parameter":
        expected = {
            name: literal_projection(g.flatten(), literal_basis(rows[name]))
            for name, g in gradient.items()
        }
    else:
        basis = literal_basis(torch.cat([rows[name] for name in gradient], dim=1))
        whole = literal_projection(flat(gradient.values()), basis)
        sizes = [g.numel() for g in gradient.values()]
        expected = dict(zip(gradient, whole.split(sizes), strict=True))

    trainer, before, after = trained(
        stage, base_model_path, tmp_path, capability=groups, config=paper(scope=scope),
        **options,
    )  # fmt: skip
    actual = {name: (before[name] - after[name]).flatten().double() for name in before}
    # float32 weights of size 1 and steps of size 1e-2: 1e-7 is rounding of the step.
    assert max_difference(actual, expected) < 5e-7

    entry = trainer.state.log_history[0]
    safety, kept = flat(gradient.values()).double(), flat(expected.values())
    removed = 1 - (kept.norm() / safety.norm()) ** 2
    assert entry["ogpsa/removed_fraction"] == pytest.approx(removed.item(), abs=1e-4)
    mean = torch.cat([rows[name] for name in gradient], dim=1).double().mean(dim=0)
    cosine = torch.cosine_similarity(safety, mean, dim=0)
    assert entry["ogpsa/cosine"] == pytest.approx(cosine.item(), abs=1e-4)
    for name, loss in losses.items():  # the mean over the tokens of all samples
        assert entry[f"ogpsa/capability_loss/{name}"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_refresh_leaves_no_trace_in_training(stage, base_model_path, tmp_path, monkeypatch):
    """A run that refreshes but does not project is plain TRL: weights, data order, metrics."""
    options = {
        "max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base_model_path, attention_dropout=0.3)
    options["more"] = {**WITH_TOKENIZER, "peft_config": LORA.__class__(**LORA.to_dict())}
    options |= {"disable_dropout": False} if stage == "dpo" else {}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random.seed(3), np.random.seed(3)
    plain, _, expected = trained(stage, model, tmp_path, plain=True, **options)

    model = AutoModelForCausalLM.from_pretrained(base_model_path, attention_dropout=0.3)
    model.load_state_dict(state)
    trainer = make_trainer(
        stage, model, tmp_path, capability=capability_groups(),
        config=paper(refresh_interval=1), **options,
    )  # fmt: skip
    monkeypatch.setattr(trainer.constrained_step, "project_gradient", lambda: None)
    trainer.train()
    assert max_difference(weights(trainer), expected) == 0
    without = ("runtime", "per_second", "seconds", "ogpsa/")
    assert logged(trainer, without) == logged(plain, without)


def test_capability_gradient_ignores_dropout_and_restores_the_modes(base_model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_model_path, attention_dropout=0.5)
    trainer = make_trainer(
        "sft", model, tmp_path, capability=capability_groups(), gradient_checkpointing=True,
        more=WITH_TOKENIZER, neftune_noise_alpha=5.0,
    )  # fmt: skip
    trainer.train()
    modes = [module.training for module in trainer.model.modules()]
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        trainer.refresh_subspace()
        assert torch.equal(torch.get_rng_state(), before)
        states.append(trainer.subspace.state_dict())
        with trainer.subspace.backend.preserved():
            torch.rand(1)  # as a module that is never without dropout
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(("stage", "scope"), [("sft", "parameter"), ("dpo", "model")])
def test_accumulation_does_not_change_the_trajectory(stage, scope, base_model_path, tmp_path):
    """Eight samples at once are eight accumulated ones; the capability batch size is free too."""
    results = []
    for batch_size, accumulation, capability_batch_size in ((8, 1, 1), (1, 8, 5)):
        config = paper(scope=scope, refresh_interval=2, capability_batch_size=capability_batch_size)
        _, _, after = trained(
            stage, base_model_path, tmp_path, capability=capability_groups(), config=config,
            max_steps=3, per_device_train_batch_size=batch_size, learning_rate=0.1,
            gradient_accumulation_steps=accumulation, max_grad_norm=0.5,
        )  # fmt: skip
        results.append(after)
    assert max_difference(*results) < 2e-6


def test_clipping_acts_on_the_projected_gradient(base_model_path, tmp_path):
    options = {"capability": capability_groups()}
    _, before, free = trained("sft", base_model_path, tmp_path, **options)
    trainer, _, clipped = trained("sft", base_model_path, tmp_path, max_grad_norm=0.1, **options)
    step = flat([before[name] - free[name] for name in before])
    clipped_step = flat([before[name] - clipped[name] for name in before])
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(step.norm().item(), rel=1e-4)
    assert (clipped_step - 0.1 * step / step.norm()).abs().max() < 1e-6


# Each stands in one run, beside others that TRL takes together.
SFT_FEATURES = {
    "packing, gradient checkpointing": {
        "packing": True, "max_length": 48, "gradient_checkpointing": True,
    },
    "padding-free, full sequence loss": {
        "padding_free": True, "max_length": None, "completion_only_loss": False,
    },
    "reentrant checkpointing, evaluation": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "eval_strategy": "steps", "eval_steps": 1,
    },
    "dft, epochs": {
        "loss_type": "dft", "max_steps": -1, "num_train_epochs": 1,
        "gradient_accumulation_steps": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("features", SFT_FEATURES)
def test_sft_feature_leaves_nothing_in_the_subspace(features, base_model_path, tmp_path):
    """Whatever TRL does before the gradient is there, no capability direction is left in it."""
    more = {"eval_dataset": safety_data("sft")} if "evaluation" in features else {}
    assert_no_component_left("sft", base_model_path, tmp_path, more=more, **SFT_FEATURES[features])


def test_assistant_only_loss_of_conversations(base_model_path, tmp_path):
    groups = {name: to_messages(group) for name, group in capability_groups().items()}
    trainer = assert_no_component_left(
        "sft", base_model_path, tmp_path, capability=groups,
        data=to_messages(safety_data("sft")), assistant_only_loss=True,
    )  # fmt: skip
    for group, rows in zip(trainer.capability_groups, capability_groups().values(), strict=True):
        # The loss is on the words of the answer and the end token, not on the question.
        assert group.num_tokens == sum(len(row["completion"].split()) + 1 for row in rows)


DPO_LOSS_TYPES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def test_dpo_loss_type_leaves_nothing_in_the_subspace(base_model_path, tmp_path):
    """TRL adds them up, and lists them in the help text of the option."""
    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(re.findall(r"`'(\w+)'`", text)) == set(DPO_LOSS_TYPES)
    assert_no_component_left(
        "dpo", base_model_path, tmp_path, loss_type=DPO_LOSS_TYPES, label_smoothing=0.1
    )


@pytest.mark.parametrize("has_reference", [False, True])
def test_dpo_feature_leaves_nothing_in_the_subspace(has_reference, base_model_path, tmp_path):
    """Log-probabilities of the reference in advance; a reference of one's own, and all the rest."""
    options, more = {"precompute_ref_log_probs": True}, {}
    if has_reference:
        options = {"gradient_checkpointing": True, "use_weighting": True, "ld_alpha": 0.5}
        more = {"ref_model": AutoModelForCausalLM.from_pretrained(base_model_path)}
    assert_no_component_left("dpo", base_model_path, tmp_path, more=more, **options)


def test_bf16_leaves_nothing_in_the_subspace(base_model_path, tmp_path):
    """Autocast computes in bf16, but the gradients and the basis are float32."""
    assert_no_component_left("sft", base_model_path, tmp_path, bf16=True)


def test_bfloat16_parameters_leave_their_rounding_only(base_model_path, tmp_path):
    """The gradient of a bf16 parameter is bf16: 8 bits, so cosines of 2 ** -9 may be left."""
    probe = assert_no_component_left(
        "dpo", base_model_path, tmp_path, largest_cosine=2**-9,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    assert next(iter(probe.model.parameters())).dtype == torch.bfloat16


def test_streams_are_taken_as_they_come(base_model_path, tmp_path):
    groups = {name: g.to_iterable_dataset() for name, g in capability_groups(9).items()}
    trainer = assert_no_component_left(
        "sft", base_model_path, tmp_path, capability=groups,
        data=safety_data("sft").to_iterable_dataset(),
    )  # fmt: skip
    assert [len(group.samples) for group in trainer.capability_groups] == [6, 6]


def assert_no_component_left(
    stage, model, tmp_path, *, more=None, capability=None, largest_cosine=1e-5, settings=None,
    **options,
):  # fmt: skip
    probe = CosineCallback()
    trainer = make_trainer(
        stage, model, tmp_path, capability=capability or capability_groups(9),
        config=paper(**{"num_samples": 6, "refresh_interval": 2, **(settings or {})}),
        more={"callbacks": [probe], **(more or {})},
        **{"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3, **options},
    )  # fmt: skip
    probe.trainer = trainer
    trainer.train()
    assert max(probe.cosines) < largest_cosine
    removed = [e["ogpsa/removed_fraction"] for e in trainer.state.log_history if "loss" in e]
    assert removed
    assert min(removed) > 1e-3
    return trainer


class TestLora:
    """At the start B is zero, so A has no gradient at all, and no known direction."""

    @pytest.mark.parametrize(("stage", "scope"), [("sft", "parameter"), ("dpo", "model")])
    def test_a_does_not_move_before_its_direction_is_known(
        self, stage, scope, base_model_path, tmp_path
    ):
        watch, refreshes = WeightsCallback(), []
        trainer = make_trainer(
            stage, base_model_path, tmp_path, capability=capability_groups(),
            config=paper(scope=scope, refresh_interval=10), max_steps=3,
            more={"peft_config": LORA, "callbacks": [watch]},
        )  # fmt: skip
        start = weights(trainer)
        original = trainer.refresh_subspace
        trainer.refresh_subspace = lambda: (refreshes.append(trainer.state.global_step), original())
        trainer.train()

        is_a = [name for name in start if "lora_A" in name]
        first, second, third = watch.states
        # Step 0: B is zero, A has no gradient. Step 1: A's gradient is there, its direction is not.
        assert all(torch.equal(start[name], second[name]) for name in is_a)
        assert any(not torch.equal(start[n], first[n]) for n in start if "lora_B" in n)
        # Before step 2 the subspace was refreshed, once more than scheduled, and A moves.
        assert refreshes == [0, 2]
        assert all(not torch.equal(second[name], third[name]) for name in is_a)
        assert all(rows is not None for rows in trainer.subspace.basis)
        held = [e.get("ogpsa/held_parameters") for e in trainer.state.log_history if "loss" in e]
        assert held == [None, len(is_a), None]

    def test_a_parameter_that_no_capability_loss_needs_is_held_for_one_step_only(
        self, base_model_path, tmp_path
    ):
        """Its gradient is zero even at the second look: no direction of it matters."""
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(), max_steps=3
        )
        original = trainer.capability_loss.sum
        unused, watch = trainer.model.model.norm.weight, WeightsCallback()

        def loss_without_one_parameter(batch):
            unused.requires_grad_(False)
            loss = original(batch)
            unused.requires_grad_(True)
            return loss

        trainer.capability_loss.sum = loss_without_one_parameter
        trainer.add_callback(watch)
        start = unused.detach().clone()
        trainer.train()
        first, second, third = (state["model.norm.weight"] for state in watch.states)
        assert torch.equal(start, first)
        assert not torch.equal(first, second)
        assert not torch.equal(second, third)

    def test_only_the_adapter_has_a_basis(self, base_model_path, tmp_path):
        trainer = assert_no_component_left(
            "dpo", base_model_path, tmp_path, more={"peft_config": LORA}
        )
        names = [name for name, _ in trainer.subspace.backend.parameters]
        assert names
        assert all("lora_" in name for name in names)


def test_tied_weights_count_once(tmp_path):
    config = tiny_llama_config(hidden_size=32, num_layers=2, num_heads=2, ffn_size=64)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    trainer = assert_no_component_left("sft", model, tmp_path, more=WITH_TOKENIZER)
    names = [name for name, _ in trainer.subspace.backend.parameters]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_frozen_parameters_are_left_alone(base_model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_model_path)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = assert_no_component_left("sft", model, tmp_path, more=WITH_TOKENIZER)
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert len(frozen) > 1
    assert all(torch.equal(before[name], weights(trainer)[name]) for name in frozen)


def test_the_layout_of_a_parameter_in_memory_changes_nothing(base_model_path, tmp_path):
    results = []
    for transpose in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base_model_path)
        weight = model.lm_head.weight
        if transpose:
            weight.data = weight.data.T.contiguous().T
        assert weight.is_contiguous() is not transpose
        _, _, after = trained(
            "sft", model, tmp_path, capability=capability_groups(), learning_rate=0.1,
            more=WITH_TOKENIZER,
        )  # fmt: skip
        results.append(after)
    assert max_difference(*results) < 1e-6


def test_the_basis_has_the_rank_and_the_type_that_are_set(base_model_path, tmp_path):
    """Rounded rows are not orthonormal, and still nothing is left along them."""
    settings = {"gradients_per_group": 3, "rank": 2, "basis_dtype": "bfloat16"}
    trainer = assert_no_component_left("sft", base_model_path, tmp_path, settings=settings)
    entry = trainer.state.log_history[0]
    assert entry["ogpsa/rank"] == 2  # of six
    assert {(len(rows), rows.dtype) for rows in trainer.subspace.basis} == {(2, torch.bfloat16)}
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert trainer.subspace.basis_bytes == 2 * 2 * num_parameters
    assert entry["ogpsa/basis_megabytes"] == trainer.subspace.basis_bytes / 1e6


@pytest.mark.parametrize("has_panel", [False, True])
def test_a_long_refresh_shows_its_progress(
    has_panel, base_model_path, tmp_path, monkeypatch, capsys
):
    """But not beside the panel of rich: a bar would put a line above it at each of its updates."""
    monkeypatch.setattr(step, "_SECONDS_WITHOUT_BAR", 0)
    trained(
        "sft", base_model_path, tmp_path, capability=capability_groups(), disable_tqdm=False,
        more={"callbacks": [RichProgressCallback()]} if has_panel else None,
    )  # fmt: skip
    shown = "".join(capsys.readouterr())
    assert "removed_fraction" in shown
    # Two groups of six samples, four at a time.
    has_bar = re.search(r"Refreshing the capability subspace.*/4 ", shown) is not None
    assert has_bar is not has_panel


def test_a_collator_of_ones_own_leaves_the_tokenizer_without_padding(base_model_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base_model_path)
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    tokenizer.pad_token = None
    assert_no_component_left(
        "sft", base_model_path, tmp_path,
        more={"processing_class": tokenizer, "data_collator": collator},
    )  # fmt: skip
    assert tokenizer.pad_token is None


def test_refreshes_come_at_every_interval_and_metrics_are_means_since_the_last_log(
    base_model_path, tmp_path, monkeypatch
):
    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(),
        config=paper(refresh_interval=3), max_steps=8, learning_rate=0.1, logging_steps=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    refreshes, cosines = [], []
    refresh, record = trainer.refresh_subspace, trainer.diagnostics.record

    def recording(**metrics):
        cosines.extend(metrics[name] for name in metrics if name == "cosine")
        record(**metrics)

    monkeypatch.setattr(trainer.diagnostics, "record", recording)
    trainer.refresh_subspace = lambda: (refreshes.append(trainer.state.global_step), refresh())
    trainer.train()
    assert refreshes == [0, 3, 6]
    means = [e["ogpsa/cosine"] for e in trainer.state.log_history if "loss" in e]
    pairs = zip(cosines[::2], cosines[1::2], strict=True)
    assert means == pytest.approx([(float(a) + float(b)) / 2 for a, b in pairs])
    assert len(set(means)) == 4


def test_the_refresh_share_is_that_of_the_time_between_two_logs(
    base_model_path, tmp_path, monkeypatch
):
    """By a clock that goes on by a second whenever it is read: twice a refresh, once a log."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(step, "time", clock)
    monkeypatch.setattr(diagnostics, "time", clock)
    trainer, _, _ = trained(
        "sft", base_model_path, tmp_path, capability=capability_groups(),
        config=paper(refresh_interval=2), max_steps=4,
    )  # fmt: skip
    # Of the start or the log before, reads lie 1 (refresh begins), 2 (ends) and 3 later (log).
    shares = [entry.get("ogpsa/refresh_share") for entry in trainer.state.log_history]
    assert shares == [1 / 3, 0, 1 / 3, 0, None]


def test_model_card_names_the_method_the_settings_and_the_data(base_model_path, tmp_path):
    trainer = make_trainer("dpo", base_model_path, tmp_path, capability=capability_groups())
    trainer.create_model_card(model_name="toy")
    card = (tmp_path / "README.md").read_text()
    for expected in ("2602.07892", "sun2026safety", "| `refresh_interval` | 30 |", "| language |"):
        assert expected in card
    assert "ogpsa" in card.split("---")[1]


@pytest.mark.parametrize(
    ("capability", "config", "message"),
    [
        (None, paper(), "`ogpsa_config` needs a `capability_dataset`"),
        (
            capability_groups(), {"rank": 1},
            "`ogpsa_config` must be an `OGPSAConfig`, but got {'rank': 1}",
        ),
    ],
)  # fmt: skip
def test_what_the_trainer_is_given_is_checked(
    capability, config, message, base_model_path, tmp_path
):
    with pytest.raises(ValueError, match=message):
        make_trainer("sft", base_model_path, tmp_path, capability=capability, config=config)


LOSING = {
    "gradient": paper(refresh_interval=1),
    "update": OGPSAConfig(samples_per_refresh=3),
    "replay": paper(target="none", replay_weight=0.5, refresh_interval=1),
}


class TestLostGradients:
    """A training gradient that is not finite is one of zero, whatever is projected."""

    def run(self, base_model_path, tmp_path, config, values, max_steps=5):
        """Train with a gradient that holds these values in these steps, or is zero for `None`."""
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(), config=config,
            max_steps=max_steps, optim="adamw_torch", learning_rate=1e-2, max_grad_norm=1.0,
            weight_decay=0.1, logging_steps=1,
        )  # fmt: skip
        around_optimizer = trainer.constrained_step.around_optimizer

        @contextlib.contextmanager
        def broken_step():
            value = values.get(trainer.state.global_step, 1.0)
            if value is None:
                for parameter in trainer.model.parameters():
                    parameter.grad.zero_()
            elif value != 1.0:
                trainer.model.model.embed_tokens.weight.grad[5, 3] = value
            with around_optimizer():
                yield

        trainer.constrained_step.around_optimizer = broken_step
        trainer.train()
        return trainer

    @pytest.mark.parametrize("name", LOSING)
    def test_the_step_is_that_of_a_zero_gradient(self, name, base_model_path, tmp_path, caplog):
        """The last value is too long for its square."""
        values = {1: float("nan"), 2: -float("inf"), 3: 1e30}
        zeros = dict.fromkeys(values)
        expected = weights(self.run(base_model_path, tmp_path, LOSING[name], zeros))
        trainer = self.run(base_model_path, tmp_path, LOSING[name], values)
        assert max_difference(weights(trainer), expected) == 0
        assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
        logs = trainer.state.log_history[:5]
        assert [entry.get("ogpsa/lost_gradients") for entry in logs] == [None, 1, 1, 1, None]
        assert "Step 2: the training gradient is not finite and counts as zero" in caplog.text

    def test_too_many_in_a_row_end_the_run(self, base_model_path, tmp_path):
        """Those before the last finite one do not count."""
        values = dict.fromkeys({*range(20)} - {1}, float("nan"))
        with pytest.raises(FloatingPointError, match=r"Step 12: .* not been finite in 11 steps"):
            self.run(base_model_path, tmp_path, paper(), values, max_steps=20)


class TestExplosion:
    """A capability loss, or its gradient alone, that is not finite."""

    def break_group(self, trainer, monkeypatch, groups, how):
        original = trainer.capability_loss.sum

        def broken(batch):
            loss = original(batch)
            if not any(sample.name.split("/")[0] in groups for sample in batch.samples):
                return loss
            # The second has a finite value, and a gradient that is not.
            return loss * float("inf") if how == "loss" else loss + (loss - loss.detach()).sqrt()

        monkeypatch.setattr(trainer.capability_loss, "sum", broken)

    @pytest.mark.parametrize(
        ("how", "ema", "dtype"), [("loss", 0.0, "bfloat16"), ("gradient", 0.5, "float32")]
    )
    def test_a_group_keeps_its_last_gradient(
        self, how, ema, dtype, base_model_path, tmp_path, monkeypatch, caplog
    ):
        trainer, _, _ = trained(
            "sft", base_model_path, tmp_path, capability=capability_groups(),
            config=paper(scope="model", capability_ema=ema, basis_dtype=dtype),
        )  # fmt: skip
        before = self.gradients(trainer)
        self.break_group(trainer, monkeypatch, ["skills"], how)
        trainer.refresh_subspace()
        skills, language = self.gradients(trainer)
        # Rows are multiplied out of the basis and in again: their rounding, twice.
        tolerance = 1e-5 if dtype == "float32" else 1e-2
        assert (skills - before[0]).norm() < tolerance * before[0].norm()
        assert (language - before[1]).norm() > 0.1 * before[1].norm()
        assert "gradient of capability group 'skills' is not finite" in caplog.text
        logs = trainer.diagnostics.take_means()
        assert logs["ogpsa/kept_gradients"] == 1
        assert logs["ogpsa/drift/skills"] == 0
        assert ("ogpsa/capability_loss/skills" in logs) == (how == "gradient")
        assert all(math.isfinite(value) for value in logs.values())

    def gradients(self, trainer):
        coordinates = trainer.subspace.coordinates[0]
        rows = torch.cat(trainer.subspace.basis, dim=1).float()
        return (coordinates @ rows).unbind()

    def test_of_all_groups_is_an_error(self, base_model_path, tmp_path, monkeypatch):
        trainer, _, _ = trained("sft", base_model_path, tmp_path, capability=capability_groups())
        self.break_group(trainer, monkeypatch, capability_groups(), "loss")
        with pytest.raises(FloatingPointError, match=r"'skills' .* nor is that of any other group"):
            trainer.refresh_subspace()
        assert trainer.subspace.is_due
        assert all(rows is None for rows in trainer.subspace.basis)

    def test_in_the_first_refresh_is_an_error(self, base_model_path, tmp_path, monkeypatch):
        trainer = make_trainer("sft", base_model_path, tmp_path, capability=capability_groups())
        self.break_group(trainer, monkeypatch, ["language"], "loss")
        message = r"group 'language' \(loss inf\) is not finite, and there is no older one"
        with pytest.raises(FloatingPointError, match=message):
            trainer.train()
