"""The trainers against TRL's, against the literal method, and with everything that TRL does."""

import contextlib
import itertools
import math
import re
from types import SimpleNamespace

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
    ADAMW,
    SAVES,
    CosineCallback,
    capability_groups,
    change_losses,
    flat,
    literal_gradients,
    literal_losses,
    logged,
    max_difference,
    paper,
    safety_data,
    to_messages,
    weights,
)

STAGES = ("sft", "dpo")
WITH_TOKENIZER = {"processing_class": toy_tokenizer()}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("stage", STAGES)
def test_no_capability_dataset_is_bitwise_plain_trl(stage, train, tmp_path):
    ours, plain = (
        train(
            stage, plain=plain, capability=None, folder=tmp_path / str(plain) / "run",
            **ADAMW | SAVES | {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2},
        )
        for plain in (False, True)
    )  # fmt: skip
    assert max_difference(ours.states[-1], plain.states[-1]) == 0
    assert logged(ours) == logged(plain)
    our_files, files = (
        {path.relative_to(folder): path for path in folder.rglob("*")}
        for folder in (tmp_path / "False/run", tmp_path / "True/run")
    )
    assert our_files.keys() == files.keys()
    for name, path in files.items():
        # These hold times, and the folder.
        if path.is_file() and name.name not in ("trainer_state.json", "training_args.bin"):
            assert our_files[name].read_bytes() == path.read_bytes(), name


@pytest.mark.parametrize(
    ("stage", "scope", "accumulation"),
    [("sft", "parameter", 1), ("sft", "model", 2), ("dpo", "parameter", 2), ("dpo", "model", 1)],
)
def test_step_is_the_literal_method(stage, scope, accumulation, train, base_model_path):
    """SVD of the stacked capability gradients, subtract: what the weights of one real step lost."""
    batches = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
    }
    before, after = train(stage, plain=True, **batches).states
    gradient, rows = flat(before) - flat(after), literal_gradients(base_model_path, before)
    sizes = [tensor.numel() for tensor in before.values()]
    blocks = sizes if scope == "parameter" else [sum(sizes)]
    pairs = zip(gradient.split(blocks), rows.split(blocks, dim=1), strict=True)
    expected = torch.cat([literal_projection(g, literal_basis(rows_RN)) for g, rows_RN in pairs])

    trainer = train(stage, config=paper(scope=scope), **batches)
    before, after = map(flat, trainer.states)
    # float32 weights of size 1 and steps of size 1e-2: 1e-7 is rounding of the step.
    assert (before - after - expected).abs().max() < 5e-7
    entry = trainer.state.log_history[0]
    removed = 1 - (expected.norm() / gradient.norm()) ** 2
    assert entry["ogpsa/removed_fraction"] == pytest.approx(removed.item(), abs=1e-4)
    cosine = torch.cosine_similarity(gradient, rows.double().mean(dim=0), dim=0)
    assert entry["ogpsa/cosine"] == pytest.approx(cosine.item(), abs=1e-4)
    for name, loss in literal_losses(base_model_path).items():
        assert entry[f"ogpsa/capability_loss/{name}"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_refresh_leaves_no_trace_in_training(stage, train, base_model_path, caplog):
    """A run that refreshes but does not project is plain TRL: weights, data order, metrics."""
    results = []
    for plain in (True, False):
        trainer = train(
            stage, plain=plain, config=paper(target="none", refresh_interval=1),
            model=AutoModelForCausalLM.from_pretrained(base_model_path, attention_dropout=0.3),
            more={**WITH_TOKENIZER, "peft_config": LoraConfig(**LORA)},
            gradient_accumulation_steps=2, gradient_checkpointing=True,
            **ADAMW, **({"disable_dropout": False} if stage == "dpo" else {}),
        )  # fmt: skip
        log = logged(trainer, ("runtime", "per_second", "seconds", "ogpsa/"))
        results.append((trainer.states[-1], log))
    (expected, plain_log), (found, log) = results
    assert max_difference(found, expected) == 0
    assert log == plain_log
    assert "OGPSA measures the run and changes nothing" in caplog.text
    assert "ogpsa/step_change/skills" in trainer.state.log_history[0]


def test_capability_gradient_ignores_dropout_and_restores_the_modes(train, base_model_path):
    model = AutoModelForCausalLM.from_pretrained(base_model_path, attention_dropout=0.5)
    trainer = train(
        model=model, gradient_checkpointing=True, more=WITH_TOKENIZER, neftune_noise_alpha=5.0
    )
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
    [first, second] = states
    assert second.pop("num_refreshes") == first.pop("num_refreshes") + 1
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(("stage", "scope"), [("sft", "parameter"), ("dpo", "model")])
def test_accumulation_does_not_change_the_trajectory(stage, scope, train):
    """Eight samples at once are eight accumulated ones; the capability batch size is free too."""
    results = [
        train(
            stage, max_steps=3, learning_rate=0.1, max_grad_norm=0.5,
            config=paper(scope=scope, refresh_interval=2, capability_batch_size=capability_size),
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=8 // batch_size,
        ).states[-1]
        for batch_size, capability_size in ((8, 1), (1, 5))
    ]  # fmt: skip
    assert max_difference(*results) < 2e-6


def test_clipping_acts_on_the_projected_gradient(train):
    free, clipped = train(), train(max_grad_norm=0.1)
    step, clipped_step = (flat(t.states[0]) - flat(t.states[1]) for t in (free, clipped))
    assert clipped.state.log_history[0]["grad_norm"] == pytest.approx(step.norm().item(), rel=1e-4)
    assert (clipped_step - 0.1 * step / step.norm()).abs().max() < 1e-6


@pytest.fixture
def leaves_nothing(make):
    """Whatever TRL does before the gradient is there, no capability direction is left in it."""

    def leaves_nothing(stage="sft", *, more=None, largest_cosine=1e-5, settings=None, **options):
        probe = CosineCallback()
        trainer = probe.trainer = make(
            stage, config=paper(**{"num_samples": 6, "refresh_interval": 2, **(settings or {})}),
            more={"callbacks": [probe], **(more or {})},
            **{"capability": capability_groups(9), **ADAMW, "max_steps": 3, **options},
        )  # fmt: skip
        trainer.train()
        assert max(probe.cosines) < largest_cosine
        removed = [e["ogpsa/removed_fraction"] for e in trainer.state.log_history if "loss" in e]
        assert min(removed) > 1e-3
        return trainer

    return leaves_nothing


# Each stands in one run, beside others that TRL takes together.
FEATURES = {
    "packing, gradient checkpointing": ("sft", {
        "packing": True, "max_length": 48, "gradient_checkpointing": True,
    }),
    "padding-free, full sequence loss": ("sft", {
        "padding_free": True, "max_length": None, "completion_only_loss": False,
    }),
    "reentrant checkpointing, evaluation": ("sft", {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "eval_strategy": "steps", "eval_steps": 1, "more": {"eval_dataset": safety_data("sft")},
    }),
    "dft, epochs": ("sft", {
        "loss_type": "dft", "max_steps": -1, "num_train_epochs": 1,
        "gradient_accumulation_steps": 3,
    }),
    "log-probabilities of the reference in advance": ("dpo", {"precompute_ref_log_probs": True}),
    "weighting, length": ("dpo", {
        "gradient_checkpointing": True, "use_weighting": True, "ld_alpha": 0.5,
    }),
    # Autocast computes in bf16, but the gradients and the basis are float32.
    "bf16": ("sft", {"bf16": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_feature_leaves_nothing_in_the_subspace(name, leaves_nothing, base_model_path):
    stage, options = FEATURES[name]
    if name == "weighting, length":  # and a reference of one's own
        reference = AutoModelForCausalLM.from_pretrained(base_model_path)
        options = {**options, "more": {"ref_model": reference}}
    leaves_nothing(stage, **options)


def test_assistant_only_loss_of_conversations(leaves_nothing):
    trainer = leaves_nothing(
        capability={name: to_messages(group) for name, group in capability_groups().items()},
        data=to_messages(safety_data("sft")), assistant_only_loss=True,
    )  # fmt: skip
    for group, rows in zip(trainer.capability_groups, capability_groups().values(), strict=True):
        # The loss is on the words of the answer and the end token, not on the question.
        assert group.num_tokens == sum(len(row["completion"].split()) + 1 for row in rows)


DPO_LOSS_TYPES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


def test_dpo_loss_type_leaves_nothing_in_the_subspace(leaves_nothing):
    """TRL adds them up, and lists them in the help text of the option."""
    text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(re.findall(r"`'(\w+)'`", text)) == set(DPO_LOSS_TYPES)
    leaves_nothing("dpo", loss_type=DPO_LOSS_TYPES, label_smoothing=0.1)


def test_bfloat16_parameters_leave_their_rounding_only(leaves_nothing):
    """The gradient of a bf16 parameter is bf16: 8 bits, so cosines of 2 ** -9 may be left."""
    options = {"model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = leaves_nothing("dpo", largest_cosine=2**-9, **options)
    assert next(iter(trainer.model.parameters())).dtype == torch.bfloat16


def test_streams_are_taken_as_they_come(leaves_nothing):
    trainer = leaves_nothing(
        capability={name: g.to_iterable_dataset() for name, g in capability_groups(9).items()},
        data=safety_data("sft").to_iterable_dataset(),
    )
    assert [len(group.samples) for group in trainer.capability_groups] == [6, 6]


def test_only_the_adapter_has_a_basis(leaves_nothing):
    trainer = leaves_nothing("dpo", more={"peft_config": LoraConfig(**LORA)})
    names = [name for name, _ in trainer.subspace.backend.parameters]
    assert names and all("lora_" in name for name in names)


def test_tied_weights_count_once(leaves_nothing):
    config = tiny_llama_config(hidden_size=32, num_layers=2, num_heads=2, ffn_size=64)
    config.tie_word_embeddings = True
    trainer = leaves_nothing(model=AutoModelForCausalLM.from_config(config), more=WITH_TOKENIZER)
    names = [name for name, _ in trainer.subspace.backend.parameters]
    assert "lm_head.weight" not in names and "model.embed_tokens.weight" in names


def test_frozen_parameters_are_left_alone(leaves_nothing, base_model_path):
    model = AutoModelForCausalLM.from_pretrained(base_model_path)
    frozen = [model.model.embed_tokens.weight, *model.model.layers[0].parameters()]
    before = [parameter.requires_grad_(False).clone() for parameter in frozen]
    leaves_nothing(model=model, more=WITH_TOKENIZER)
    assert not any(parameter.requires_grad for parameter in frozen)
    assert all(map(torch.equal, before, frozen))


def test_the_basis_has_the_rank_and_the_type_that_are_set(leaves_nothing):
    """Rounded rows are not orthonormal, and still nothing is left along them."""
    settings = {"gradients_per_group": 3, "rank": 2, "basis_dtype": "bfloat16"}
    trainer = leaves_nothing(settings=settings)
    entry = trainer.state.log_history[0]
    assert entry["ogpsa/rank"] == 2  # of six
    assert {(len(rows), rows.dtype) for rows in trainer.subspace.basis} == {(2, torch.bfloat16)}
    num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert trainer.subspace.basis_bytes == 2 * 2 * num_parameters
    assert entry["ogpsa/basis_megabytes"] == trainer.subspace.basis_bytes / 1e6


def test_a_collator_of_ones_own_leaves_the_tokenizer_without_padding(
    leaves_nothing, base_model_path
):
    tokenizer = AutoTokenizer.from_pretrained(base_model_path)
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    tokenizer.pad_token = None
    leaves_nothing(more={"processing_class": tokenizer, "data_collator": collator})
    assert tokenizer.pad_token is None


@pytest.mark.parametrize(
    ("stage", "settings", "options"),
    [
        ("sft", {}, {}),
        ("dpo", {"scope": "model"}, {}),
        # Weight decay and the first moments would move it.
        ("sft", {"target": "update"}, {**ADAMW, "learning_rate": 1e-2, "weight_decay": 0.1}),
    ],
)
def test_a_does_not_move_before_its_direction_is_known(stage, settings, options, train):
    """LoRA: at the start B is zero, so A has no gradient at all, and no known direction."""
    trainer = train(
        stage, config=paper(refresh_interval=10, **settings),
        more={"peft_config": LoraConfig(**LORA)}, **{**options, "max_steps": 4},
    )  # fmt: skip
    is_a = [name for name in trainer.states[0] if "lora_A" in name]
    moves = [
        [not torch.equal(before[name], after[name]) for name in is_a]
        for before, after in itertools.pairwise(trainer.states)
    ]
    held = [e.get("ogpsa/held_parameters") for e in trainer.state.log_history[:-1]]
    refreshed = ["ogpsa/rank" in entry for entry in trainer.state.log_history[:-1]]
    # Step 0: B is zero. Step 1: A's gradient is there, its direction is not. Before step 2 the
    # subspace is refreshed, once more than scheduled, and A moves. Decay would move it in step 0.
    first = 0 if options else 1
    assert held == [len(is_a) if index == first else None for index in range(4)]
    assert refreshed == [index in (0, first + 1) for index in range(4)]
    assert not any(moves[0] + moves[first]) and all(moves[first + 1])
    assert any(not torch.equal(trainer.states[0][n], trainer.states[1][n])
               for n in trainer.states[0] if "lora_B" in n)  # fmt: skip
    assert all(rows is not None for rows in trainer.subspace.basis)


def test_the_layout_of_a_parameter_in_memory_changes_nothing(train, base_model_path):
    results = []
    for transpose in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base_model_path)
        weight = model.lm_head.weight
        if transpose:
            weight.data = weight.data.T.contiguous().T
        assert weight.is_contiguous() is not transpose
        results.append(train(model=model, learning_rate=0.1, more=WITH_TOKENIZER).states[-1])
    assert max_difference(*results) < 1e-6


@pytest.mark.parametrize("has_panel", [False, True])
def test_a_long_refresh_shows_its_progress(has_panel, train, monkeypatch, capsys):
    """But not beside the panel of rich: a bar would put a line above it at each of its updates."""
    monkeypatch.setattr(step, "_SECONDS_WITHOUT_BAR", 0)
    train(disable_tqdm=False, more={"callbacks": [RichProgressCallback()]} if has_panel else None)
    shown = "".join(capsys.readouterr())
    assert "removed_fraction" in shown
    # Two groups of six samples, four at a time.
    has_bar = re.search(r"Refreshing the capability subspace.*/4 ", shown) is not None
    assert has_bar is not has_panel


def test_refreshes_come_at_every_interval_and_metrics_are_means_since_the_last_log(make):
    trainer = make(
        config=paper(refresh_interval=3), max_steps=8, learning_rate=0.1, logging_steps=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    refreshes, recorded = [], []
    refresh, record = trainer.refresh_subspace, trainer.diagnostics.record
    trainer.diagnostics.record = lambda **metrics: (recorded.append(metrics), record(**metrics))
    trainer.refresh_subspace = lambda: (refreshes.append(trainer.state.global_step), refresh())
    trainer.train()
    assert refreshes == [0, 3, 6]
    means = [e["ogpsa/cosine"] for e in trainer.state.log_history if "loss" in e]
    cosines = torch.stack([metrics["cosine"] for metrics in recorded if "cosine" in metrics])
    assert means == pytest.approx(cosines.view(4, 2).mean(dim=1).tolist())
    assert len(set(means)) == 4


def test_the_refresh_share_is_that_of_the_time_between_two_logs(train, monkeypatch):
    """By a clock that goes on by a second whenever it is read: twice a refresh, once a log."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(step, "time", clock)
    monkeypatch.setattr(diagnostics, "time", clock)
    trainer = train(config=paper(refresh_interval=2), max_steps=4)
    # Of the start or the log before, reads lie 1 (refresh begins), 2 (ends) and 3 later (log).
    shares = [entry.get("ogpsa/refresh_share") for entry in trainer.state.log_history]
    assert shares == [1 / 3, 0, 1 / 3, 0, None]


def test_model_card_names_the_method_the_settings_and_the_data(make, tmp_path):
    make("dpo").create_model_card(model_name="toy")
    card = (tmp_path / "README.md").read_text()
    for expected in ("2602.07892", "sun2026safety", "| `refresh_interval` | 30 |", "| language |"):
        assert expected in card
    assert "ogpsa" in card.split("---")[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capability": None, "config": paper()}, "`ogpsa_config` needs a `capability_dataset`"),
        ({"config": {"rank": 1}}, "must be an `OGPSAConfig`, but got {'rank': 1}"),
    ],
)
def test_what_the_trainer_is_given_is_checked(given, message, make):
    with pytest.raises(ValueError, match=message):
        make(**given)


LOSING = {
    "gradient": paper(refresh_interval=1),
    "update": OGPSAConfig(samples_per_refresh=3),
    "replay": paper(target="none", capability_weight=0.5, refresh_interval=1),
}


def train_on(values, trainer):
    """Train with a gradient that holds these values in these steps, or is zero for `None`."""
    around_optimizer = trainer.constrained_step.around_optimizer

    @contextlib.contextmanager
    def broken_step():
        step = trainer.state.global_step
        if step in values and values[step] is None:
            trainer.model.zero_grad(set_to_none=False)
        elif step in values:
            trainer.model.model.embed_tokens.weight.grad[5, 3] = values[step]
        with around_optimizer():
            yield

    trainer.constrained_step.around_optimizer = broken_step
    trainer.train()
    return weights(trainer)


class TestLostGradients:
    """A training gradient that is not finite is one of zero, whatever is projected."""

    @pytest.mark.parametrize("name", LOSING)
    def test_the_step_is_that_of_a_zero_gradient(self, name, make, caplog):
        """The last value is too long for its square."""
        values = {1: float("nan"), 2: -float("inf"), 3: 1e30}
        options = {**ADAMW, "max_steps": 5, "max_grad_norm": 1.0, "weight_decay": 0.1}
        expected = train_on(dict.fromkeys(values), make(config=LOSING[name], **options))
        trainer = make(config=LOSING[name], **options)
        assert max_difference(train_on(values, trainer), expected) == 0
        assert flat(expected).isfinite().all()
        logs = trainer.state.log_history[:5]
        assert [entry.get("ogpsa/lost_gradients") for entry in logs] == [None, 1, 1, 1, None]
        assert "Step 2: the training gradient is not finite and counts as zero" in caplog.text

    def test_too_many_in_a_row_end_the_run(self, make):
        """Those before the last finite one do not count."""
        values = dict.fromkeys({*range(20)} - {1}, float("nan"))
        with pytest.raises(FloatingPointError, match=r"Step 12: .* not been finite in 11 steps"):
            train_on(values, make(max_steps=20))


# A capability loss that is not finite; one with a finite value, and a gradient that is not.
EXPLOSIONS = {
    "loss": lambda loss: loss * float("inf"),
    "gradient": lambda loss: loss + (loss - loss.detach()).sqrt(),
}


class TestExplosion:
    @pytest.mark.parametrize(
        ("how", "ema", "dtype"), [("loss", 0.0, "bfloat16"), ("gradient", 0.5, "float32")]
    )
    def test_a_group_keeps_its_last_gradient(self, how, ema, dtype, train, caplog):
        trainer = train(config=paper(scope="model", capability_ema=ema, basis_dtype=dtype))

        def gradients():
            rows = torch.cat(trainer.subspace.basis, dim=1).float()
            return (trainer.subspace.coordinates[0] @ rows).unbind()

        before = gradients()
        change_losses(trainer, ["skills"], EXPLOSIONS[how])
        trainer.refresh_subspace()
        skills, language = gradients()
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

    def test_without_an_older_one_or_of_all_groups_it_is_an_error(self, make):
        trainer = make()
        change_losses(trainer, ["language"], EXPLOSIONS["loss"])
        message = r"group 'language' \(loss inf\) is not finite, and there is no older one"
        with pytest.raises(FloatingPointError, match=message):
            trainer.train()
        trainer = make()
        trainer.train()
        change_losses(trainer, capability_groups(), EXPLOSIONS["loss"])
        with pytest.raises(FloatingPointError, match=r"'skills' .* nor is that of any other group"):
            trainer.refresh_subspace()
        assert trainer.subspace.is_due
        assert all(rows is None for rows in trainer.subspace.basis)
