"""The starting point: what drift and divergence are measured from."""

import itertools
import logging

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from ogpsa_trl.method.subspace import CapabilitySubspace
from runs import (
    capability_groups,
    literal_kl,
    literal_nll,
    make_trainer,
    max_difference,
    paper,
    trained,
    weights,
)

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}


def make(stage, model_path, tmp_path, config, **options):
    return make_trainer(
        stage, model_path, tmp_path, capability=capability_groups(), config=config, **options
    )


def penalty(**settings):
    """A KL penalty with all probabilities of the starting model."""
    return paper(
        target="none", replay_weight=0.7, refresh_interval=1, capability_loss="kl", kl_tokens=9999,
        **settings,
    )  # fmt: skip


class TestDivergence:
    def test_as_replay_it_is_the_kl_penalty(self, base_model_path, tmp_path, monkeypatch):
        """Each step of SGD goes along the training gradient and that of the literal divergence."""
        rate, weight = 0.1, 0.7
        trainer = make("sft", base_model_path, tmp_path, penalty(), learning_rate=rate, max_steps=3)
        states, training_gradients = [], []
        replay = CapabilitySubspace.replay

        def watched(subspace):
            states.append(weights(trainer))
            gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
            training_gradients.append(gradients)
            return replay(subspace)

        monkeypatch.setattr(CapabilitySubspace, "replay", watched)
        trainer.train()
        states.append(weights(trainer))
        assert len(states) == 4
        model, start = (AutoModelForCausalLM.from_pretrained(base_model_path) for _ in range(2))
        tokenizer = AutoTokenizer.from_pretrained(base_model_path)
        for (before, after), gradients in zip(
            itertools.pairwise(states), training_gradients, strict=True
        ):
            model.load_state_dict(before)
            model.zero_grad()
            groups = capability_groups().values()
            sum(literal_kl(model, start, tokenizer, g) for g in groups).backward()
            expected = {
                n: before[n] - rate * (gradients[n] + weight * p.grad / len(groups))
                for n, p in model.named_parameters()
            }
            assert max_difference(after, expected) < 1e-6

    @pytest.mark.parametrize(("stage", "form"), [("sft", "lora"), ("dpo", "full")])
    def test_the_logged_loss_is_the_literal_divergence(
        self, stage, form, base_model_path, tmp_path
    ):
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        trainer = make(
            stage, base_model_path, tmp_path, penalty(), learning_rate=0.1, max_steps=3,
            more={"peft_config": lora} if form == "lora" else None,
        )  # fmt: skip
        trainer.train()
        trainer.refresh_subspace()
        tokenizer = AutoTokenizer.from_pretrained(base_model_path)
        start = AutoModelForCausalLM.from_pretrained(base_model_path)
        trainer.model.eval()
        logs = trainer.diagnostics.take_means()
        for name, rows in capability_groups().items():
            value = logs[f"ogpsa/capability_loss/{name}"]
            with torch.no_grad():
                expected = literal_kl(trainer.model, start, tokenizer, rows).item()
            assert value == pytest.approx(expected, rel=1e-3)
            assert value > 1e-5
            assert logs[f"ogpsa/drift/{name}"] == pytest.approx(value)

    @pytest.mark.parametrize("target", ["update", "gradient"])
    def test_the_first_step_is_free_and_the_next_are_not(self, target, base_model_path, tmp_path):
        """At the start no direction raises the divergence: nothing is held, nothing removed."""
        config = paper(target=target, capability_loss="kl", refresh_interval=3)
        trainer = make("sft", base_model_path, tmp_path, config, **ADAMW)
        trainer.train()
        entries = trainer.state.log_history[:-1]
        refreshed = ["ogpsa/rank" in entry for entry in entries]
        # Again after the first step, for which there was nothing to know, then every three.
        assert refreshed == [True, True, False, True]
        assert entries[0]["ogpsa/rank"] == 0 and entries[1]["ogpsa/rank"] > 1
        assert entries[0]["ogpsa/removed_fraction"] == 0
        assert entries[1]["ogpsa/removed_fraction"] > 0
        assert not any("ogpsa/held_parameters" in entry for entry in entries)


class TestDrift:
    def test_of_drawn_samples_counts_from_their_own_start(self, base_model_path, tmp_path):
        config = paper(samples_per_refresh=2, refresh_interval=1)
        trainer = make("sft", base_model_path, tmp_path, config, learning_rate=0.1, max_steps=3)
        start = AutoModelForCausalLM.from_pretrained(base_model_path)
        tokenizer = AutoTokenizer.from_pretrained(base_model_path)
        rows_used, original = [], trainer.refresh_subspace
        by_prompt = {r["prompt"].strip(): r for g in capability_groups().values() for r in g}

        def refresh():
            step = trainer.state.global_step
            drawn = {}
            for group in trainer.capability_groups:
                [part] = group.parts(2, f"{trainer.args.seed} {step}")
                texts = [tokenizer.decode(s.features["input_ids"]) for s in part.samples]
                drawn[group.name] = [
                    next(row for prompt, row in by_prompt.items() if text.startswith(prompt))
                    for text in texts
                ]
            rows_used.append((weights(trainer), drawn))
            original()

        trainer.refresh_subspace = refresh
        trainer.train()
        model = AutoModelForCausalLM.from_pretrained(base_model_path)
        for (state, drawn), entry in zip(rows_used, trainer.state.log_history[:-1], strict=True):
            model.load_state_dict(state)
            for name, rows in drawn.items():
                with torch.no_grad():
                    loss = literal_nll(model, tokenizer, rows).item()
                    first = literal_nll(start, tokenizer, rows).item()
                assert entry[f"ogpsa/capability_loss/{name}"] == pytest.approx(loss, abs=1e-5)
                assert entry[f"ogpsa/drift/{name}"] == pytest.approx(loss - first, abs=1e-5)
        draws = [str(drawn) for _, drawn in rows_used]
        assert len(set(draws)) == len(draws)


def test_a_run_that_only_measures_is_plain_training(base_model_path, tmp_path, caplog):
    """`target: none` without replay: diagnostics of what plain training does."""
    _, _, plain = trained("sft", base_model_path, tmp_path, plain=True, **ADAMW)
    with caplog.at_level(logging.WARNING):
        trainer = make("sft", base_model_path, tmp_path, paper(target="none"), **ADAMW)
    trainer.train()
    assert "OGPSA measures the run and changes nothing" in caplog.text
    assert max_difference(weights(trainer), plain) == 0
    assert "ogpsa/step_change/skills" in trainer.state.log_history[0]
