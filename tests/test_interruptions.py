"""A step that breaks, a run that starts again: nothing is left behind, and nothing is forgotten."""

import contextlib
import datetime
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback
from transformers.utils import chat_template_utils

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from ogpsa_trl.method.capability_loss import CapabilityLoss
from ogpsa_trl.method.saved_start import START_FILE_NAME
from ogpsa_trl.method.starting_point import StartingPoint, all_samples
from ogpsa_trl.training.diagnostics import Diagnostics
from ogpsa_trl.training.gate import SAMPLES_NAME
from ogpsa_trl.training.whole_checkpoints import what_is_missing
from runs import (
    ADAMW,
    SAVES,
    SaveAfter,
    assert_same_run,
    capability_groups,
    gated,
    literal_losses,
    max_difference,
    paper,
    weights,
)

CONFIGS = {
    "gradient": paper(refresh_interval=1),
    "update": OGPSAConfig(samples_per_refresh=3),
    "none": paper(target="none", capability_weight=1.0, refresh_interval=1),
}
# Callbacks' events, and methods of the trainer and of its optimizer, in the order of a step.
PLACES = (
    "on_step_begin", "_clip_grad_norm", "on_pre_optimizer_step", "step", "on_optimizer_step",
)  # fmt: skip


@contextlib.contextmanager
def broken(trainer, place, error, *, once=False):
    """Raise in the third step."""
    owner = trainer
    if place == "step":  # of the optimizer that accelerate has wrapped in the meantime
        owner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if place.startswith("on_"):
        owner = TrainerCallback()
        trainer.add_callback(owner)
    method, errors = getattr(owner, place), [error] * (1 if once else 99)

    def breaking(*args, **kwargs):
        if errors and trainer.state.global_step == 2:
            raise errors.pop()
        return method(*args, **kwargs)

    setattr(owner, place, breaking)
    try:
        yield
    finally:
        setattr(owner, place, method)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_is_broken_off_leaves_nothing_on_the_optimizer(name, make):
    """Wherever, and whatever is raised; the trainer trains again, from the weights as they are."""
    trainer = make(config=CONFIGS[name], max_grad_norm=1.0, **ADAMW)
    optimizer = trainer.create_optimizer()
    for place in PLACES:
        error = KeyboardInterrupt() if place == "_clip_grad_norm" else RuntimeError("x")
        with broken(trainer, place, error), pytest.raises(type(error)):
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
    def test_when_training_starts_again_in_one_trainer(self, restart, make, base_model_path):
        """Drift and the gate go on from the start; from the drifted model they would from zero."""
        config = OGPSAConfig(capability_token_share=None, kl_tokens=9999, capability_ema=0.0)
        trainer = make(config=config, auto_find_batch_size=True, **ADAMW)
        gate = gated(trainer, capability_groups())
        if restart == "train":
            trainer.train()
            trainer.train()
        else:
            error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            with broken(trainer, "on_step_end", error, once=True):
                trainer.train()
        entry = next(e for e in trainer.state.log_history if "ogpsa/drift/skills" in e)
        assert entry["step"] == 1
        assert entry["ogpsa/drift/skills"] == entry["ogpsa/capability_loss/skills"] > 1e-6

        first = trainer.state.log_history[0]
        assert first["step"] == 0 and first["ogpsa/gate_largest_increase"] != 0
        for name, loss in literal_losses(base_model_path).items():
            start = first[f"ogpsa/gate_loss/{name}"] - first[f"ogpsa/gate_increase/{name}"]
            assert (start, gate.start[name]) == pytest.approx((loss, loss), abs=1e-5)

    def test_but_not_that_of_another_model(self):
        """`model_init` makes a new one for every `train`."""
        loss = CapabilityLoss(OGPSAConfig(), [], None, None)
        model, start = tiny_model(seed=0), object()
        loss.begin(model)
        loss.start = start
        loss.begin(model)
        assert loss.start is start
        loss.begin(tiny_model(seed=1))
        assert loss.start is None


TEMPLATE_WITH_DATE = (
    "{%- for c in strftime_now('%d') -%}{{ c + ' ' }}{%- endfor -%}"  # "3 0 "
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    "{{ ' => ' + m['content'] + eos_token }}"
    "{%- else -%}{{ m['content'] }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' =>' }}{%- endif -%}"
)


def chats(verb, key):
    rows = [
        [
            {"role": "user", "content": f"{verb} {i % 10} {i % 7}"},
            {"role": "assistant", "content": f"{i % 9} {i % 5}"},
        ]
        for i in range(8)
    ]
    if key == "messages":
        return Dataset.from_list([{"messages": row} for row in rows])
    return Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in rows])


class TestATemplateThatWritesTheDate:
    """A run that is resumed on another day goes on with the tokens of its checkpoint."""

    @pytest.mark.parametrize(
        ("day", "key"), [(30, "messages"), (9, "prompt")], ids=["as long", "shorter"]
    )
    def test_is_the_run_that_never_stopped(self, day, key, make, monkeypatch, tmp_path, caplog):
        def run(today, checkpoint=None):
            class Clock(datetime.datetime):
                @classmethod
                def now(cls, tz=None):
                    return cls(2026, 11, today, 12)

            monkeypatch.setattr(chat_template_utils, "datetime", Clock)
            tokenizer = toy_tokenizer()
            tokenizer.chat_template = TEMPLATE_WITH_DATE
            trainer = make(
                capability=chats("reverse", key), config=OGPSAConfig(samples_per_refresh=4),
                more={"processing_class": tokenizer, "callbacks": [SaveAfter(2)]}, **ADAMW,
            )  # fmt: skip
            gated(trainer, {"sums": chats("add", key)})
            trainer.train(resume_from_checkpoint=checkpoint)
            return trainer

        straight = run(29)
        with caplog.at_level(logging.WARNING):
            assert_same_run(run(day, str(tmp_path / "checkpoint-2")), straight)
        assert "8 capability samples have other tokens now than in" in caplog.text
        assert "Gate group 'sums': 8 of its samples have other tokens now than in" in caplog.text


class TestCheckpoints:
    def test_of_a_gate_begin_when_the_trainer_saves(self, make, tmp_path):
        """An error between the step and the save leaves no folder that looks like a checkpoint."""
        trainer = make(capability=None, **ADAMW | SAVES)
        gated(trainer, capability_groups())
        error = ValueError("x")
        with broken(trainer, "on_step_end", error), pytest.raises(ValueError, match="x"):
            trainer.train()
        assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {"checkpoint-1"}
        assert (tmp_path / "checkpoint-1" / SAMPLES_NAME).is_file()

    def test_hold_groups_of_several_formats(self, make):
        """Tokens without labels beside completions, on which alone the loss is."""
        groups, tokenizer = capability_groups(), toy_tokenizer()
        texts = [row["prompt"] + row["completion"] for row in groups["skills"]]
        tokens = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
        trainer = make(capability={"tokens": tokens, "language": groups["language"]})
        samples = all_samples(trainer.capability_groups)
        start = StartingPoint(samples, torch.zeros(len(samples)).double())
        assert StartingPoint.from_state(samples, start.state_dict()).samples == samples

    @pytest.mark.parametrize("limit", [None, 1])
    def test_are_pushed_when_they_are_whole(self, limit, train, tmp_path, monkeypatch):
        """And hold one starting point between them, also where older ones are deleted."""
        pushed = []
        monkeypatch.setattr(
            Trainer, "_push_from_checkpoint",
            lambda trainer, folder: pushed.append((folder, what_is_missing(Path(folder)))),
        )  # fmt: skip
        monkeypatch.setattr(Trainer, "init_hf_repo", lambda *args, **kwargs: None)
        trainer = train(
            config=CONFIGS["update"], push_to_hub=True, save_total_limit=limit,
            **ADAMW | SAVES | {"max_steps": 2},
        )  # fmt: skip
        assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (1, 2)]
        trainer._save_checkpoint(trainer.model, None)  # where a step is saved twice
        folders = sorted(tmp_path.glob("checkpoint-*"))
        assert len(folders) == (limit or 2) and folders[-1].name == "checkpoint-2"
        files = [(folder / START_FILE_NAME).stat() for folder in folders]
        # Every one has the file, the disk has its bytes once.
        assert {(file.st_ino, file.st_nlink) for file in files} == {(files[0].st_ino, len(files))}
        for folder in folders:
            assert what_is_missing(folder) is None
            assert not list(folder.glob("*unfinished"))


def test_diagnostics_that_are_never_logged_do_not_grow():
    """Of every metric there is one number, whatever the number of steps."""
    diagnostics = Diagnostics([])
    for value in range(6):
        diagnostics.record(cosine=torch.tensor(float(value)))
    [(total, count)] = diagnostics.sums.values()
    assert (total.tolist(), count) == (15, 6)
