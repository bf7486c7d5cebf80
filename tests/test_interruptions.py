"""A step that breaks, a run that starts again: nothing is left behind, and nothing is forgotten."""

import datetime
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.utils import chat_template_utils

from ogpsa_trl import CapabilityGate, OGPSAConfig
from ogpsa_trl.capability_loss import CapabilityLoss
from ogpsa_trl.checkpoint import START_FILE_NAME
from ogpsa_trl.completeness import what_is_missing
from ogpsa_trl.gate import SAMPLES_NAME
from ogpsa_trl.toy_model import tiny_model, toy_tokenizer
from runs import (
    capability_groups,
    literal_nll,
    logged,
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


class Break(TrainerCallback):
    """Raises once, at one event of the third step."""

    def __init__(self, event, error):
        self.error = error
        setattr(self, event, self.at_event)

    def at_event(self, args, state, control, **kwargs):
        if self.error is not None and state.global_step == 2:
            error, self.error = self.error, None
            raise error


def break_clipping(trainer, error):
    clip = trainer._clip_grad_norm

    def broken(model):
        trainer._clip_grad_norm = clip
        if trainer.state.global_step == 2:
            raise error
        trainer._clip_grad_norm = broken
        return clip(model)

    trainer._clip_grad_norm = broken


class FullAtTheThirdStep(torch.optim.AdamW):
    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().step(closure)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")], ids=["stop", "error"])
@pytest.mark.parametrize(
    "place", ["on_step_begin", "clipping", "on_pre_optimizer_step", "on_optimizer_step"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_is_broken_off_leaves_nothing_on_the_optimizer(
    name, place, error, base_model_path, tmp_path
):
    """And the trainer trains again, from the weights as they are."""
    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(), config=CONFIGS[name],
        **ADAMW | {"max_grad_norm": 1.0},
    )  # fmt: skip
    if place == "clipping":
        break_clipping(trainer, error)
    else:
        trainer.add_callback(Break(place, error))
    with pytest.raises(type(error)):
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert max_difference(weights(trainer), before) > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_an_optimizer_without_memory_starts_the_run_again(name, tmp_path):
    """In its own step, where the hook is waiting for the end of it."""
    model = tiny_model(seed=0)
    optimizer = FullAtTheThirdStep(model.parameters(), lr=1e-3)
    config = OGPSAConfig(metric="euclidean") if name == "update" else CONFIGS[name]
    trainer = make_trainer(
        "sft", model, tmp_path, capability=capability_groups(), config=config,
        more={"processing_class": toy_tokenizer(), "optimizers": (optimizer, None)},
        **ADAMW | {"auto_find_batch_size": True},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert not optimizer._optimizer_step_post_hooks


class TestTheStartIsKept:
    def trained_after_a_restart(self, restart, tmp_path):
        """The trainer; and of every measurement, what was logged and the literal divergence."""
        model = tiny_model(seed=0)
        config = OGPSAConfig(samples_per_refresh=None, kl_tokens=9999, capability_ema=0.0)
        trainer = make_trainer(
            "sft", model, tmp_path, capability=capability_groups(), config=config,
            more={"processing_class": toy_tokenizer()}, **ADAMW | {"auto_find_batch_size": True},
        )  # fmt: skip
        if restart == "memory":
            error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            trainer.add_callback(Break("on_step_end", error))
        trainer.train()
        if restart == "train":
            trainer.train()
        return trainer

    @pytest.mark.parametrize("restart", ["memory", "train"])
    def test_when_training_starts_again_in_one_trainer(self, restart, tmp_path):
        """Drift goes on from what it was; from the drifted model it would begin at zero."""
        trainer = self.trained_after_a_restart(restart, tmp_path)
        first = next(e for e in trainer.state.log_history if "ogpsa/drift/skills" in e)
        assert first["step"] == 1
        assert first["ogpsa/drift/skills"] > 1e-6
        assert first["ogpsa/drift/skills"] == first["ogpsa/capability_loss/skills"]

    @pytest.mark.parametrize("restart", ["memory", "train"])
    def test_by_a_gate_too(self, restart, base_model_path, tmp_path):
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, **ADAMW | {"auto_find_batch_size": True}
        )
        gate = CapabilityGate(trainer, capability_groups())
        trainer.add_callback(gate)
        before = AutoModelForCausalLM.from_pretrained(base_model_path)
        if restart == "memory":
            error = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            trainer.add_callback(Break("on_step_end", error))
        trainer.train()
        if restart == "train":
            trainer.train()
        first = trainer.state.log_history[0]
        assert first["step"] == 0 and first["ogpsa/gate_largest_increase"] != 0
        with torch.no_grad():
            for name, rows in capability_groups().items():
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

    def run(self, folder, key, *, resumed=False, has_capability=True):
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = TEMPLATE_WITH_DATE
        trainer = make_trainer(
            "sft", tiny_model(seed=0), folder, data=safety_data("sft"),
            capability=self.chats("reverse", key=key) if has_capability else None,
            config=OGPSAConfig(samples_per_refresh=4) if has_capability else None,
            more={"processing_class": tokenizer}, save_strategy="steps", save_steps=2, **ADAMW,
        )  # fmt: skip
        trainer.add_callback(CapabilityGate(trainer, {"sums": self.chats("add", key=key)}))
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
        return trainer

    @pytest.mark.parametrize("has_capability", [True, False])
    @pytest.mark.parametrize("key", ["messages", "prompt"])
    @pytest.mark.parametrize("day", [30, 9], ids=["as long", "shorter"])
    def test_is_the_run_that_never_stopped(
        self, day, key, has_capability, set_day, tmp_path, caplog
    ):
        set_day(29)
        straight = self.run(tmp_path, key, has_capability=has_capability)
        set_day(day)
        with caplog.at_level(logging.WARNING):
            resumed = self.run(tmp_path, key, resumed=True, has_capability=has_capability)
        assert max_difference(weights(resumed), weights(straight)) == 0
        # TRL counts tokens from the resume on.
        without = ("runtime", "per_second", "seconds", "refresh_share", "num_tokens")
        assert logged(resumed, without)[:-1] == logged(straight, without)[:-1]
        assert "have other tokens now than in" in caplog.text


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
        assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
        assert (tmp_path / "checkpoint-1" / SAMPLES_NAME).is_file()

    def test_that_are_saved_twice_hold_nothing_unfinished(self, base_model_path, tmp_path):
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(),
            config=OGPSAConfig(samples_per_refresh=3), save_strategy="steps", save_steps=2, **ADAMW,
        )  # fmt: skip
        trainer.train()
        trainer._save_checkpoint(trainer.model, None)
        folder = tmp_path / "checkpoint-4"
        assert what_is_missing(folder) is None
        assert not [path for path in folder.iterdir() if path.name.endswith("unfinished")]

    def run(self, folder, **options):
        trainer = make_trainer(
            "sft", tiny_model(seed=0), folder, capability=capability_groups(),
            config=OGPSAConfig(samples_per_refresh=3), more={"processing_class": toy_tokenizer()},
            **ADAMW | {"save_strategy": "steps", "save_steps": 1, **options},
        )  # fmt: skip
        trainer.train()
        return trainer

    def test_hold_groups_of_several_formats(self, base_model_path, tmp_path):
        """Tokens without labels beside completions, on which alone the loss is."""
        tokenizer = toy_tokenizer()
        texts = [r["prompt"] + r["completion"] for r in capability_groups()["skills"]]
        tokens = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
        groups = {"tokens": tokens, "language": capability_groups()["language"]}

        def run(**resume):
            trainer = make_trainer(
                "sft", base_model_path, tmp_path, capability=groups,
                config=OGPSAConfig(samples_per_refresh=3), save_strategy="steps", save_steps=2,
                **ADAMW,
            )  # fmt: skip
            trainer.train(**resume)
            return trainer

        straight = run()
        resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert max_difference(weights(resumed), weights(straight)) == 0
        counts = [[s.num_tokens for s in g.samples] for g in resumed.capability_groups]
        assert counts == [[s.num_tokens for s in g.samples] for g in straight.capability_groups]

    def test_hold_one_starting_point_between_them(self, tmp_path):
        """It never changes: every checkpoint has the file, and the disk has its bytes once."""
        self.run(tmp_path)
        files = [tmp_path / f"checkpoint-{step}" / START_FILE_NAME for step in (1, 2, 3, 4)]
        assert len({file.stat().st_ino for file in files}) == 1

    def test_have_it_where_older_ones_are_deleted(self, tmp_path):
        self.run(tmp_path, save_total_limit=1)
        assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
        assert (tmp_path / "checkpoint-4" / START_FILE_NAME).stat().st_nlink == 1

    def test_have_it_where_files_have_one_name_only(self, tmp_path, monkeypatch):
        def no_link(*_):
            raise OSError("Operation not supported")

        monkeypatch.setattr("pathlib.Path.hardlink_to", no_link)
        self.run(tmp_path)
        files = [tmp_path / f"checkpoint-{step}" / START_FILE_NAME for step in (1, 4)]
        assert len({file.stat().st_ino for file in files}) == 2
        assert max_difference(*map(load_file, files)) == 0

    def test_are_pushed_when_they_are_whole(self, tmp_path, monkeypatch):
        pushed = []
        monkeypatch.setattr(
            Trainer, "_push_from_checkpoint",
            lambda trainer, folder: pushed.append((folder, what_is_missing(Path(folder)))),
        )  # fmt: skip
        monkeypatch.setattr(Trainer, "init_hf_repo", lambda *args, **kwargs: None)
        trainer = make_trainer(
            "sft", tiny_model(seed=0), tmp_path, capability=capability_groups(),
            config=OGPSAConfig(samples_per_refresh=3), more={"processing_class": toy_tokenizer()},
            save_strategy="steps", save_steps=2, **ADAMW,
        )  # fmt: skip
        trainer.args.push_to_hub = True
        trainer.train()
        assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (2, 4)]


def test_diagnostics_that_are_never_logged_do_not_grow(base_model_path, tmp_path):
    """Of every metric there is one number, whatever the number of steps."""
    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(),
        config=OGPSAConfig(samples_per_refresh=3), logging_strategy="no",
        **ADAMW | {"max_steps": 6},
    )  # fmt: skip
    sizes, counts = [], []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            sums = trainer.diagnostics.sums.values()
            sizes.append(sum(torch.as_tensor(total).numel() for total, _ in sums))
            counts.append(max(count for _, count in sums))

    trainer.add_callback(Watch())
    trainer.train()
    assert counts == [1, 2, 3, 4, 5, 6]
    assert sizes[2] == sizes[5]
