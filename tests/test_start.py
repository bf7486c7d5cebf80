"""The starting point: what drift and divergence are measured from."""

import itertools

import pytest
import torch
from peft import LoraConfig

from ogpsa_trl.method.subspace import CapabilitySubspace
from runs import (
    ADAMW,
    capability_groups,
    flat,
    literal_kl,
    literal_losses,
    literal_model,
    paper,
)

# A KL penalty with all probabilities of the starting model.
PENALTY = paper(
    target="none", capability_weight=0.7, refresh_interval=1, capability_loss="kl", kl_tokens=9999
)  # fmt: skip


class TestDivergence:
    def test_as_replay_it_is_the_kl_penalty(self, train, base_model_path, monkeypatch):
        """Each step of SGD goes along the training gradient and that of the literal divergence."""
        training_gradients, replay = [], CapabilitySubspace.replay

        def watched(subspace):
            gradients = [p.grad.flatten() for _, p in subspace.backend.parameters]
            training_gradients.append(torch.cat(gradients))
            return replay(subspace)

        monkeypatch.setattr(CapabilitySubspace, "replay", watched)
        trainer = train(config=PENALTY, learning_rate=0.1, max_steps=3)
        start, tokenizer = literal_model(base_model_path)
        groups = capability_groups().values()
        steps = itertools.pairwise(trainer.states)
        for (before, after), along, entry in zip(
            steps, training_gradients, trainer.state.log_history[:-1], strict=True
        ):
            model, _ = literal_model(base_model_path, before)
            sum(literal_kl(model, start, tokenizer, g) for g in groups).backward()
            replayed = 0.7 * flat({n: p.grad for n, p in model.named_parameters()}) / len(groups)
            assert (flat(after) - flat(before) + 0.1 * (along + replayed)).abs().max() < 1e-6
            length = entry["ogpsa/replay_length"]
            assert length == pytest.approx(replayed.norm().item(), rel=1e-3, abs=1e-6)

    @pytest.mark.parametrize(("stage", "form"), [("sft", "lora"), ("dpo", "full")])
    def test_the_logged_loss_is_the_literal_divergence(self, stage, form, train, base_model_path):
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        trainer = train(
            stage, config=PENALTY, learning_rate=0.1, max_steps=3,
            more={"peft_config": lora} if form == "lora" else None,
        )  # fmt: skip
        trainer.refresh_subspace()
        start, tokenizer = literal_model(base_model_path)
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
    def test_the_first_step_is_free_and_the_next_are_not(self, target, train):
        """At the start no direction raises the divergence: nothing is held, nothing removed."""
        config = paper(target=target, capability_loss="kl", refresh_interval=3)
        first, second, *_ = entries = train(config=config, **ADAMW).state.log_history[:-1]
        # Again after the first step, for which there was nothing to know, then every three.
        assert ["ogpsa/rank" in entry for entry in entries] == [True, True, False, True]
        assert first["ogpsa/rank"] == 0 and second["ogpsa/rank"] > 1
        assert first["ogpsa/removed_fraction"] == 0 and second["ogpsa/removed_fraction"] > 0
        assert not any("ogpsa/held_parameters" in entry for entry in entries)


class TestDrift:
    def test_of_drawn_samples_counts_from_their_own_start(self, train, base_model_path):
        config = paper(samples_per_refresh=2, refresh_interval=1)
        trainer = train(config=config, learning_rate=0.1, max_steps=3)
        _, tokenizer = literal_model(base_model_path)
        draws = []
        for step, entry in enumerate(trainer.state.log_history[:-1]):
            drawn = {}
            for part in trainer.constrained_step.draws.parts(trainer.capability_groups, step):
                texts = [tokenizer.decode(s.features["input_ids"]) for s in part.samples]
                drawn[part.group] = [
                    row
                    for row in capability_groups()[part.group]
                    if any(text.startswith(row["prompt"].strip()) for text in texts)
                ]
            draws.append(str(drawn))
            losses, first = (
                literal_losses(base_model_path, state, drawn)
                for state in (trainer.states[step], None)
            )
            for name, loss in losses.items():
                assert len(drawn[name]) == 2
                assert entry[f"ogpsa/capability_loss/{name}"] == pytest.approx(loss, abs=1e-5)
                assert entry[f"ogpsa/drift/{name}"] == pytest.approx(loss - first[name], abs=1e-5)
        assert len(set(draws)) == len(draws) == 3
