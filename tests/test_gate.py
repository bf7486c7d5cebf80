"""The capability gate: what it measures, that it changes nothing, what it does past tolerance."""

import json
import logging
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from ogpsa_trl import CapabilityGate, GateConfig
from ogpsa_trl.training.gate import Measurement
from ogpsa_trl.training.setup import check_gate_saving
from runs import (
    SAVES,
    WeightsCallback,
    arguments,
    assert_resume_is_bitwise,
    capability_groups,
    contradicted,
    gate_entries,
    gated,
    literal_losses,
    logged,
    make_trainer,
    max_difference,
    paper,
    safety_data,
    trl_entries,
    weights,
)

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
# OGPSA, and plain training.
WITH_AND_WITHOUT = pytest.mark.parametrize(
    ("stage", "capability"), [("sft", capability_groups()), ("dpo", None)], ids=["sft", "dpo"]
)


def contradicted_run(path, output_dir, config, *, lora=False, **options):
    """Plain training that contradicts the gate's data in every step, so that their loss rises."""
    if lora:
        options |= {"optim": "adamw_torch", "learning_rate": 0.1}
    trainer = make_trainer(
        "sft", path, output_dir, more={"peft_config": LoraConfig(**LORA)} if lora else None,
        **{"max_steps": 6, "learning_rate": 0.3, **options},
    )  # fmt: skip
    return trainer, gated(trainer, {"answers": contradicted()}, config)


@pytest.fixture(scope="module")
def known(base_model_path, tmp_path_factory):
    """The known case: weights and increase of the loss after every step, full training and LoRA."""
    results = {}
    for lora in (False, True):
        folder, config = tmp_path_factory.mktemp("known"), GateConfig(gate_interval=1)
        trainer, gate = contradicted_run(base_model_path, folder, config, lora=lora)
        watch = WeightsCallback()
        trainer.add_callback(watch)
        trainer.train()
        increases = [entry["ogpsa/gate_increase/answers"] for entry in gate_entries(trainer)]
        assert all(after - before > 0.005 for before, after in pairwise(increases[1:]))
        results[lora] = SimpleNamespace(
            trainer=trainer, gate=gate, states=watch.states, increases=increases
        )
    return results


def between(known, step):
    """A tolerance that the weights after `step` steps meet and those after the next do not."""
    return (known.increases[step] + known.increases[step + 1]) / 2


def test_the_log_of_a_gate_stands_apart_from_that_of_training(known):
    """So a plot of one has no values of the other, and every value its own step."""
    trainer = known[False].trainer
    assert [entry["step"] for entry in gate_entries(trainer)] == list(range(7))
    for entry in gate_entries(trainer):
        assert all(key.startswith("ogpsa/gate_") or key in ("epoch", "step") for key in entry)
    assert [entry["step"] for entry in logged(trainer) if "loss" in entry] == list(range(1, 7))


class TestMeasurement:
    @WITH_AND_WITHOUT
    def test_it_is_the_token_mean_over_all_samples(self, stage, capability, make, base_model_path):
        trainer = make(stage, capability=capability, max_steps=5, learning_rate=0.3)
        groups = capability_groups(7)
        gate = gated(trainer, groups, GateConfig(gate_interval=2, gate_batch_size=2))
        trainer.train()
        entries = gate_entries(trainer)
        assert [entry["step"] for entry in entries] == [0, 2, 4, 5]
        for state, entry in ((None, entries[0]), (weights(trainer), entries[-1])):
            for name, loss in literal_losses(base_model_path, state, groups).items():
                # Sums over samples are rounded in another order, in float32.
                assert entry[f"ogpsa/gate_loss/{name}"] == pytest.approx(loss, abs=1e-5)
                increase = entry[f"ogpsa/gate_loss/{name}"] - entries[0][f"ogpsa/gate_loss/{name}"]
                assert entry[f"ogpsa/gate_increase/{name}"] == increase
        assert entries[-1]["ogpsa/gate_largest_increase"] == max(gate.last.increases.values())
        assert entries[0]["ogpsa/gate_tokens/skills"] == gate.parts["skills"].num_tokens

    @WITH_AND_WITHOUT
    def test_it_leaves_no_trace_in_training(self, stage, capability, make, base_model_path):
        """Weights, metrics and their entries in the log are bit for bit those without a gate."""
        options, lora = {"disable_dropout": False}, None
        if stage == "sft":
            options, lora = {"neftune_noise_alpha": 5.0}, LoraConfig(**LORA, lora_dropout=0.3)

        def run(has_gate):
            trainer = make(
                stage, capability=capability, config=capability and paper(refresh_interval=2),
                model=AutoModelForCausalLM.from_pretrained(base_model_path, attention_dropout=0.3),
                more={
                    "processing_class": AutoTokenizer.from_pretrained(base_model_path),
                    "eval_dataset": safety_data(stage, 4), "peft_config": lora,
                },
                max_steps=3, optim="adamw_torch", learning_rate=1e-2, max_grad_norm=1.0,
                gradient_accumulation_steps=2, gradient_checkpointing=True, logging_steps=2,
                include_num_input_tokens_seen=True, eval_strategy="steps", eval_steps=2,
                **options, **SAVES | {"save_steps": 2},
            )  # fmt: skip
            if has_gate:
                gated(trainer, capability_groups(7), GateConfig(gate_interval=1))
            trainer.train()
            return trainer

        without, gate = run(has_gate=False), run(has_gate=True)
        assert len(gate_entries(gate)) == 4
        assert max_difference(weights(gate), weights(without)) == 0
        assert trl_entries(gate) == trl_entries(without)

    def test_nothing_is_random_where_modules_checkpoint(self, make):
        """No module is in training mode, where it may drop out in its own `forward`."""
        modes, more = set(), {"peft_config": LoraConfig(**LORA)}
        trainer = make(capability=None, more=more, gradient_checkpointing=True)
        gate = gated(trainer, capability_groups())
        trainer.train()
        for module in trainer.model.modules():
            module.register_forward_pre_hook(lambda module, _: modes.add(module.training))
        before = [module.training for module in trainer.model.modules()]
        gate._losses()
        assert modes == {False}
        assert [module.training for module in trainer.model.modules()] == before

    def test_checkpoints_and_the_last_weights_are_measured(self, base_model_path, tmp_path):
        """A checkpoint before it is saved, the last weights whoever ends training."""

        class Stop(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 2

        trainer, gate = contradicted_run(
            base_model_path, tmp_path, GateConfig(gate_interval=100), **SAVES | {"save_steps": 2}
        )
        trainer.add_callback(Stop())
        trainer.train()
        assert trainer.state.global_step == gate.last.step == 3
        assert [entry["step"] for entry in gate_entries(trainer)] == [0, 2, 3]
        state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
        steps = [e["step"] for e in state["log_history"] if "ogpsa/gate_largest_increase" in e]
        assert steps == [0, 2]

    def test_samples_that_training_protects_are_a_warning(self, make, caplog):
        trainer = make(capability=capability_groups(4))
        with caplog.at_level(logging.WARNING):
            CapabilityGate(trainer, capability_groups(6))
        assert "'skills': 4 of its 6 samples are among those of `capability_dataset`" in caplog.text


class TestResume:
    @WITH_AND_WITHOUT
    def test_a_resumed_run_logs_and_marks_what_the_straight_one_does(
        self, stage, capability, make, tmp_path
    ):
        best = {"max_capability_loss_increase": 10.0, "gate_action": "best"}

        def again():
            trainer = make(
                stage, capability=capability, config=capability and paper(refresh_interval=2),
                max_steps=4, learning_rate=0.3, gradient_accumulation_steps=2,
                **SAVES | {"save_steps": 3},
            )  # fmt: skip
            gated(trainer, capability_groups(7), GateConfig(gate_interval=2, **best))
            return trainer

        straight, resumed = assert_resume_is_bitwise(again, tmp_path, steps=(3,))
        assert [entry["step"] for entry in gate_entries(resumed)] == [0, 2, 3, 4]
        assert straight.state.best_global_step == 4
        for name in ("best_global_step", "best_metric", "best_model_checkpoint"):
            assert getattr(resumed.state, name) == getattr(straight.state, name)

    def test_a_checkpoint_without_the_losses_before_training_is_an_error(self, known):
        """An increase that is not known must not pass for a small one."""
        gate, (first, *_) = known[False].gate, gate_entries(known[False].trainer)
        assert gate._start_in([first]) == {"answers": first["ogpsa/gate_loss/answers"]}
        of_other_data = first | {"ogpsa/gate_tokens/answers": 5}
        for history in ([], [of_other_data], [first | {"step": 1}]):
            with pytest.raises(ValueError, match=r"does not hold them .*Resume with the gate data"):
                gate._start_in(history)


class TestPastTolerance:
    @pytest.fixture
    def run(self, known, base_model_path, tmp_path, caplog):
        """With a tolerance that is met after some steps and not after the next."""

        def run(step, **settings):
            settings["max_capability_loss_increase"] = between(known[False], step)
            trainer, gate = contradicted_run(base_model_path, tmp_path, GateConfig(**settings))
            with caplog.at_level(logging.WARNING):
                trainer.train()
            assert gate.is_exceeded
            return trainer.state.global_step, gate

        return run

    def test_stop_ends_training_at_the_first_measurement_past_it(self, run, known, caplog):
        num_steps, gate = run(2, gate_interval=2, gate_action="stop")
        assert num_steps == 4
        assert "Step 4: the held-out loss of gate group 'answers'" in caplog.text
        report = gate.report("runs/sft")
        assert "Training made 4 of 6 steps. The model is in runs/sft" in report
        assert f"({between(known[False], 2)})" in report

    def test_warn_trains_on(self, run, caplog):
        assert run(3, gate_interval=3)[0] == 6
        assert [line[:7] for line in caplog.messages if "held-out" in line] == ["Step 6:"]

    def test_without_a_tolerance_nothing_is_past_it(self, known):
        assert known[False].gate.last.largest_increase > 0
        assert not known[False].gate.is_exceeded

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_no_number_is(self, value, make):
        config = GateConfig(max_capability_loss_increase=1e9)
        gate = gated(make(capability=None), contradicted(), config)
        gate.last = Measurement(1, dict.fromkeys("abc", 1.0), {"a": 5.0, "b": value, "c": 7.0})
        assert gate.last.worst == "b"
        assert gate.is_exceeded


# Whether with LoRA, the step whose weights are the last within the tolerance, and options.
BEST = {
    "full": (False, 2, {}, [2, 6]),
    "lora": (True, 2, {}, [2, 6]),
    "last": (False, 5, {"max_steps": 5}, [4, 5]),
    # An epoch has four steps.
    "epochs": (
        False, 4, {"save_strategy": "epoch", "max_steps": 8, "save_total_limit": 1}, [4],
    ),
}  # fmt: skip


class TestBest:
    """The latest checkpoint within the tolerance is kept, and is the model in the end."""

    @pytest.fixture
    def run(self, base_model_path, tmp_path):
        def run(tolerance, **options):
            config = GateConfig(
                gate_interval=100, max_capability_loss_increase=tolerance, gate_action="best"
            )
            options = {**SAVES, "save_total_limit": 2, **options}
            trainer, gate = contradicted_run(base_model_path, tmp_path, config, **options)
            trainer.train()
            return trainer, gate

        return run

    @pytest.mark.parametrize("name", BEST)
    def test_it_survives_the_limit_and_is_loaded(self, name, known, run, tmp_path):
        lora, best, options, checkpoints = BEST[name]
        trainer, gate = run(between(known[lora], best), lora=lora, **options)
        folders = [tmp_path / f"checkpoint-{step}" for step in checkpoints]
        assert sorted(tmp_path.glob("checkpoint-*")) == folders
        state = json.loads((folders[-1] / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best}")
        assert state["best_metric"] == known[lora].increases[best]
        assert max_difference(weights(trainer), known[lora].states[best]) == 0
        assert not gate.is_exceeded
        assert gate.last.largest_increase == known[lora].increases[best]

    def test_where_none_is_within_the_tolerance_the_gate_is_not_passed(self, run, caplog):
        with caplog.at_level(logging.WARNING):
            trainer, gate = run(0.0, max_steps=2)
        assert "no checkpoint within the tolerance is there to be loaded" in caplog.text
        assert trainer.state.best_model_checkpoint is None
        assert gate.is_exceeded

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"metric_for_best_model": "loss"}, "is 'loss' and would mark another. Leave it out"),
            ({"load_best_model_at_end": True}, "`load_best_model_at_end`, which sets it"),
        ],
    )
    def test_another_choice_of_the_best_is_an_error(self, options, message, tmp_path):
        config = GateConfig(gate_action="best", max_capability_loss_increase=1.0)
        options |= {"eval_strategy": "steps", "eval_steps": 1}
        with pytest.raises(ValueError, match=f"`metric_for_best_model` .*{message}"):
            check_gate_saving(config, arguments("sft", tmp_path, **SAVES | options))


class TestErrors:
    """Each names the rule, the value and the way out."""

    @pytest.mark.parametrize(
        ("name", "value", "rule"),
        [
            ("gate_action", "halt", "must be one of 'warn', .* but got 'halt'"),
            ("gate_action", "stop", "'stop' needs a tolerance, .* Set it, in nats"),
            ("gate_interval", 0, "must be an integer of at least 1, but got 0"),
            ("gate_num_samples", 2.5, "must be an integer"),
            (
                "max_capability_loss_increase",
                -0.1,
                "must be a number of at least 0, or unset, but got",
            ),
        ],
    )
    def test_settings(self, name, value, rule):
        with pytest.raises(ValueError, match=f"`{name}` {rule}"):
            GateConfig(**{name: value})

    @pytest.mark.parametrize(
        ("plain", "data", "action", "message"),
        [
            (True, {}, "warn", r"needs an `OGPSASFTTrainer` .* got a SFTTrainer"),
            (False, [{"text": "a"}], "warn", r"`gate_dataset` must be a `Dataset`, .* got list"),
            (False, capability_groups(), "best", "`save_strategy` is 'no'"),
        ],
    )
    def test_what_the_gate_is_given(self, plain, data, action, message, make):
        config = GateConfig(gate_action=action, max_capability_loss_increase=1.0)
        with pytest.raises(ValueError, match=message):
            CapabilityGate(make(plain=plain, capability=None), data, config)
