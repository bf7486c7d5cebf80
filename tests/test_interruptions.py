"""A step that breaks, a run that starts again: nothing is left behind, and nothing is forgotten."""

import contextlib
import datetime
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.utils import chat_template_utils

from ogpsa_trl import CapabilityGate, OGPSAConfig
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from ogpsa_trl.method.capability_loss import CapabilityLoss
from ogpsa_trl.method.saved_start import START_FILE_NAME
from ogpsa_trl.method.starting_point import StartingPoint, all_samples
from ogpsa_trl.training.diagnostics import Diagnostics
from ogpsa_trl.training.gate import SAMPLES_NAME
from ogpsa_trl.training.whole_checkpoints import what_is_missing
from runs import (
    SaveAfter,
    assert_same_run,
    capability_groups,
    gated,
    literal_nll,
    make_trainer,
    max_difference,
    paper,
    safety_data,
    weights,
)

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}
CONFIGS = {
    "gradient": paper(refresh_interval=1),
    "update": OGPSAConfig(samples_per_refresh=3),
    "none": paper(target="none", replay_weight=1.0, refresh_interval=1),
}
# Callbacks' events, and methods of the trainer and of its optimizer, in the order of a step.
PLACES = (
    "on_step_begin", "_clip_grad_norm", "on_pre_optimizer_step", "step", "on_optimizer_step",
)  # fmt: skip


class Break(TrainerCallback):
    """Raises once, at one event of the third step."""

    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.at_event)

    def at_event(self, args, state, control, **kwargs):
        if self.error is not None and state.global_step == 2:
            error, self.error = self.error, None
            raise error


@contextlib.contextmanager
def broken(owner, name, trainer, error):
    """A method that raises in the third step."""
    method = getattr(owner, name)

    def breaking(*args, **kwargs):
        if trainer.state.global_step == 2:
            raise error
        return method(*args, **kwargs)

    setattr(owner, name, breaking)
    try:
        yield
    finally:
        setattr(owner, name, method)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_is_broken_off_leaves_nothing_on_the_optimizer(name, base_model_path, tmp_path):
    """Wherever, and whatever is raised; the trainer trains again, from the weights as they are."""
    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(), config=CONFIGS[name],
        **ADAMW | {"max_grad_norm": 1.0},
    )  # fmt: skip
    trainer.create_optimizer()
    optimizer = trainer.optimizer
    for place in PLACES:
        error = KeyboardInterrupt() if place == "_clip_grad_norm" else RuntimeError("x")
        with contextlib.ExitStack() as stack:
            if place.startswith("on_"):
                trainer.add_callback(Break(place, error))
            else:
                owner = optimizer if place == "step" else trainer
                stack.enter_context(broken(owner, place, trainer, error))
            stack.enter_context(pytest.raises(type(error)))
            trainer.train()
        assert trainer.state.global_step == 2, place
        assert not optimizer._optimizer_step_post_hooks, place
        assert not optimizer._optimizer_step_pre_hooks, place
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert max_difference(weights(trainer), before) > 0


class TestTheStartIsKept:
    @pytest.mark.parametrize("restart", ["memory", "train"])
    def test_when_training_starts_again_in_one_trainer(self, restart, base_model_path, tmp_path):
        """Drift and the gate go on from the start; from the drifted model they would from zero."""
        config = OGPSAConfig(samples_per_refresh=None, kl_tokens=9999, capability_ema=0.0)
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(), config=config,
            **ADAMW | {"auto_find_batch_size": True},
        )  # fmt: skip
        gate = gated(trainer, capability_groups())
        if restart == "memory":
            error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            trainer.add_callback(Break("on_step_end", error))
        trainer.train()
        if restart == "train":
            trainer.train()
        first = next(e for e in trainer.state.log_history if "ogpsa/drift/skills" in e)
        assert first["step"] == 1
        assert first["ogpsa/drift/skills"] > 1e-6
        assert first["ogpsa/drift/skills"] == first["ogpsa/capability_loss/skills"]

        before = AutoModelForCausalLM.from_pretrained(base_model_path)
        first = trainer.state.log_history[0]
        assert first["step"] == 0 and first["ogpsa/gate_largest_increase"] != 0
        for name, rows in capability_groups().items():
            with torch.no_grad():
                expected = literal_nll(before, trainer.processing_class, rows).item()
            assert gate.start[name] == pytest.approx(expected, abs=1e-5)
            increase = first[f"ogpsa/gate_increase/{name}"]
            loss = first[f"ogpsa/gate_loss/{name}"]
            assert loss - increase == pytest.approx(expected, abs=1e-5)

    def test_but_not_that_of_another_model(self):
        """`model_init` makes a new one for every `train`."""
        loss = CapabilityLoss(OGPSAConfig(), [], None, None)
        models, start = [tiny_model(seed=seed) for seed in (0, 1)], object()
        loss.begin(models[0])
        loss.start = start
        loss.begin(models[0])
        assert loss.start is start
        loss.begin(models[1])
        assert loss.start is None


TEMPLATE_WITH_DATE = (
    "{%- for c in strftime_now('%d') -%}{{ c + ' ' }}{%- endfor -%}"  # "3 0 "
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    "{{ ' => ' + m['content'] + eos_token }}"
    "{%- else -%}{{ m['content'] }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' =>' }}{%- endif -%}"
)


class TestATemplateThatWritesTheDate:
    """A run that is resumed on another day goes on with the tokens of its checkpoint."""

    @pytest.fixture
    def set_day(self, monkeypatch):
        real = datetime.datetime

        def set_day(day):
            class Clock(real):
                @classmethod
                def now(cls, tz=None):
                    return real(2026, 11, day, 12)

            monkeypatch.setattr(chat_template_utils, "datetime", Clock)

        return set_day

    def chats(self, verb, num_rows=8, key="messages"):
        rows = [
            [
                {"role": "user", "content": f"{verb} {i % 10} {i % 7}"},
                {"role": "assistant", "content": f"{i % 9} {i % 5}"},
            ]
            for i in range(num_rows)
        ]
        if key == "messages":
            return Dataset.from_list([{"messages": row} for row in rows])
        return Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in rows])

    def run(self, folder, key, *, resumed=False):
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = TEMPLATE_WITH_DATE
        trainer = make_trainer(
            "sft", tiny_model(seed=0), folder, data=safety_data("sft"),
            capability=self.chats("reverse", key=key), config=OGPSAConfig(samples_per_refresh=4),
            more={"processing_class": tokenizer, "callbacks": [SaveAfter(2)]}, **ADAMW,
        )  # fmt: skip
        gated(trainer, {"sums": self.chats("add", key=key)})
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
        return trainer

    @pytest.mark.parametrize(
        ("day", "key"), [(30, "messages"), (9, "prompt")], ids=["as long", "shorter"]
    )
    def test_is_the_run_that_never_stopped(self, day, key, set_day, tmp_path, caplog):
        set_day(29)
        straight = self.run(tmp_path, key)
        set_day(day)
        with caplog.at_level(logging.WARNING):
            resumed = self.run(tmp_path, key, resumed=True)
        assert_same_run(resumed, straight)
        assert "8 capability samples have other tokens now than in" in caplog.text
        assert "Gate group 'sums': 8 of its samples have other tokens now than in" in caplog.text


class TestCheckpoints:
    def test_of_a_gate_begin_when_the_trainer_saves(self, base_model_path, tmp_path):
        """An error between the step and the save leaves no folder that looks like a checkpoint."""
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, save_strategy="steps", save_steps=1, **ADAMW
        )
        trainer.add_callback(CapabilityGate(trainer, capability_groups()))
        trainer.add_callback(Break("on_step_end", ValueError("x")))
        with pytest.raises(ValueError, match="x"):
            trainer.train()
        assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {"checkpoint-1"}
        assert (tmp_path / "checkpoint-1" / SAMPLES_NAME).is_file()

    def run(self, folder, **options):
        trainer = make_trainer(
            "sft", tiny_model(seed=0), folder, capability=capability_groups(),
            config=OGPSAConfig(samples_per_refresh=3), more={"processing_class": toy_tokenizer()},
            **ADAMW | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **options},
        )  # fmt: skip
        trainer.train()
        return trainer

    def test_hold_groups_of_several_formats(self, base_model_path, tmp_path):
        """Tokens without labels beside completions, on which alone the loss is."""
        tokenizer = toy_tokenizer()
        texts = [r["prompt"] + r["completion"] for r in capability_groups()["skills"]]
        tokens = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
        groups = {"tokens": tokens, "language": capability_groups()["language"]}
        trainer = make_trainer("sft", base_model_path, tmp_path, capability=groups)
        samples = all_samples(trainer.capability_groups)
        start = StartingPoint(samples, torch.zeros(len(samples)).double())
        assert StartingPoint.from_state(samples, start.state_dict()).samples == samples

    def test_hold_one_starting_point_between_them(self, tmp_path):
        """Every one has the file, the disk has its bytes once; also where a step is saved twice."""
        trainer = self.run(tmp_path)
        trainer._save_checkpoint(trainer.model, None)
        folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
        assert len({(folder / START_FILE_NAME).stat().st_ino for folder in folders}) == 1
        for folder in folders:
            assert what_is_missing(folder) is None
            assert not list(folder.glob("*unfinished"))

    def test_are_pushed_when_they_are_whole(self, tmp_path, monkeypatch):
        """And hold the starting point where older ones are deleted."""
        pushed = []
        monkeypatch.setattr(
            Trainer, "_push_from_checkpoint",
            lambda trainer, folder: pushed.append((folder, what_is_missing(Path(folder)))),
        )  # fmt: skip
        monkeypatch.setattr(Trainer, "init_hf_repo", lambda *args, **kwargs: None)
        self.run(tmp_path, push_to_hub=True, save_total_limit=1)
        assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (1, 2)]
        (folder,) = tmp_path.glob("checkpoint-*")
        assert folder.name == "checkpoint-2"
        assert (folder / START_FILE_NAME).stat().st_nlink == 1


def test_diagnostics_that_are_never_logged_do_not_grow():
    """Of every metric there is one number, whatever the number of steps."""
    diagnostics = Diagnostics([])
    for value in range(6):
        diagnostics.record(cosine=torch.tensor(float(value)))
    ((total, count),) = diagnostics.sums.values()
    assert (total, count) == (15, 6)
    assert total.numel() == 1
