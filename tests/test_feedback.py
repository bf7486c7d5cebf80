"""Restoration, averaging and replay: what is fed back from the measured capability losses."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ogpsa_trl import OGPSAConfig, SubspaceCallback
from ogpsa_trl.subspace import CapabilitySubspace
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
from test_update import ADAMW, flat, run


def literal_gradients(model_path, state):
    """Loss and gradient of every group at some weights, by autograd on the literal loss."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    model.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    results = []
    for group in capability_groups().values():
        model.zero_grad()
        loss = literal_nll(model, tokenizer, group)
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    return results


class TestRestoration:
    @pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
    @pytest.mark.parametrize("scope", ["parameter", "model"])
    def test_the_real_step_takes_back_what_the_losses_have_risen(
        self, scope, metric, base_model_path, tmp_path
    ):
        """To first order each step lowers each loss by its rise since the start, or leaves it."""
        gain = 0.5
        trainer, probe = run(
            base_model_path, tmp_path, target="update", scope=scope, metric=metric,
            restoration=gain, restoration_cap=100.0,
        )  # fmt: skip
        drifts = [
            [entry[f"ogpsa/drift/{group}"] for group in capability_groups()]
            for entry in trainer.state.log_history[:-1]
        ]
        assert max(map(max, drifts)) > 1e-4
        for (update, gradients), drift in zip(probe.steps, drifts, strict=True):
            changes = [(flat(g, update) @ flat(update, update)).item() for g in gradients]
            expected = [-gain * max(rise, 0) for rise in drift]
            # Weights of size 1 round a step: 6e-8 times the 1-norm of the gradient.
            assert changes == pytest.approx(expected, abs=2e-5)

    def test_drift_is_the_rise_of_the_loss_since_the_start(self, base_model_path, tmp_path):
        trainer, _ = run(base_model_path, tmp_path, target="update")
        entries = trainer.state.log_history[:-1]
        for group in capability_groups():
            losses = [entry[f"ogpsa/capability_loss/{group}"] for entry in entries]
            for entry, loss in zip(entries, losses, strict=True):
                assert entry[f"ogpsa/drift/{group}"] == pytest.approx(loss - losses[0], abs=1e-6)

    def test_the_cap_bounds_its_length(self, base_model_path, tmp_path):
        trainer, _ = run(
            base_model_path, tmp_path, target="update", restoration=1e4, restoration_cap=0.1
        )
        ratios = [e["ogpsa/restoration_ratio"] for e in trainer.state.log_history[:-1]]
        capped = [e["ogpsa/restoration_capped"] for e in trainer.state.log_history[:-1]]
        assert ratios[0] == 0 and capped[0] == 0  # nothing has risen yet
        assert max(ratios) == pytest.approx(0.1, rel=1e-4)
        assert max(capped) == 1

    @pytest.mark.parametrize("is_own_schedule", [False, True])
    def test_it_counts_the_steps_between_refreshes(
        self, is_own_schedule, base_model_path, tmp_path
    ):
        """Whoever decides when: what was known at a refresh is taken back once until the next."""
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(),
            config=OGPSAConfig(
                samples_per_refresh=None, capability_loss="nll", metric="euclidean",
                capability_ema=0.0, restoration_cap=1000.0,
                refresh_interval=1 if is_own_schedule else 3,
            ),
            max_steps=13, learning_rate=0.3,
        )  # fmt: skip
        if is_own_schedule:
            trainer.remove_callback(SubspaceCallback)
            trainer.add_callback(SubspaceCallback(trainer, refresh_interval=3))
        trainer.train()
        entries = [e for e in trainer.state.log_history if "ogpsa/predicted_change/skills" in e]
        drifts = {e["step"]: e for e in trainer.state.log_history if "ogpsa/drift/skills" in e}
        assert [entry["step"] for entry in entries] == [4, 7, 10, 13]
        for entry in entries[1:]:
            for group in capability_groups():
                drift = drifts[entry["step"] - 3][f"ogpsa/drift/{group}"]
                predicted = entry[f"ogpsa/predicted_change/{group}"]
                assert predicted == pytest.approx(-max(drift, 0), rel=1e-3, abs=1e-6)

    def test_a_refresh_out_of_turn_is_not_restored_more_than_once(self):
        """After one step of its own, as after a held parameter, the share is a whole."""
        subspace = CapabilitySubspace(
            SimpleNamespace(parameters=[], device=torch.device("cpu")),
            paper(refresh_interval=4),
        )
        shares = []
        for step in range(9):
            if step in (4, 5):
                subspace._watch_losses(torch.zeros(0).double(), is_first=step == 4)
            shares.append(subspace.share_of_step())
            subspace.count_step(torch.zeros(0))
        assert shares == [0.25] * 4 + [0.25] + [1.0, 0.0, 0.0, 0.0]

    def test_it_keeps_the_losses_closer_to_the_start(self, base_model_path, tmp_path):
        """The reason for it: second-order terms make losses rise that no step raises at first."""
        final = {}
        for gain in (0.0, 1.0):
            trainer, _ = run(
                base_model_path, tmp_path, target="update", scope="model", metric="optimizer",
                restoration=gain, max_steps=12,
            )  # fmt: skip
            last = trainer.state.log_history[-2]
            final[gain] = sum(last[f"ogpsa/drift/{group}"] for group in capability_groups())
        assert final[1.0] < final[0.0]


class TestAveraging:
    def test_gradients_are_exponential_means(self, base_model_path, tmp_path):
        """After the second refresh: .3 of the first gradients, .7 of the second."""
        share, options = 0.3, {**ADAMW, "max_steps": 2, "logging_steps": 1}
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(),
            config=paper(capability_ema=share, refresh_interval=1, scope="model"), **options,
        )  # fmt: skip
        states, original = [], trainer.refresh_subspace

        def refresh():
            states.append(weights(trainer))
            original()

        trainer.refresh_subspace = refresh
        trainer.train()
        (old, new) = ([g for _, g in literal_gradients(base_model_path, s)] for s in states)
        for index, (first, second) in enumerate(zip(old, new, strict=True)):
            expected = share * flat(first, first) + (1 - share) * flat(second, first)
            coordinates = trainer.subspace.coordinates[0, index]
            rows = torch.cat(trainer.subspace.basis, dim=1)
            difference = (coordinates @ rows).double() - expected
            assert difference.norm() < 1e-4 * expected.norm()


class TestReplay:
    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    def test_without_projection_it_adds_the_capability_gradient(
        self, stage, base_model_path, tmp_path
    ):
        """`target: none` and `refresh_interval: 1`: plain SGD on the sum of the losses."""
        weight, rate = 0.7, 0.1
        _, before, plain = trained(stage, base_model_path, tmp_path, plain=True, learning_rate=rate)
        config = paper(target="none", replay_weight=weight, refresh_interval=1)
        trainer, _, ours = trained(
            stage, base_model_path, tmp_path, capability=capability_groups(), config=config,
            learning_rate=rate,
        )  # fmt: skip
        gradients = [g for _, g in literal_gradients(base_model_path, before)]
        mean = {n: sum(g[n] for g in gradients) / len(gradients) for n in before}
        expected = {n: plain[n] - rate * weight * mean[n] for n in before}
        assert max_difference(ours, expected) < 1e-6
        length = weight * flat(mean, mean).norm().item()
        entry = trainer.state.log_history[0]
        assert entry["ogpsa/replay_length"] == pytest.approx(length, rel=1e-4)

    def test_it_comes_once_for_every_refresh(self, base_model_path, tmp_path):
        config = paper(target="none", replay_weight=1.0, refresh_interval=2)
        trainer, _, _ = trained(
            "sft", base_model_path, tmp_path, capability=capability_groups(), config=config,
            max_steps=4, learning_rate=0.1,
        )  # fmt: skip
        has_length = ["ogpsa/replay_length" in e for e in trainer.state.log_history[:-1]]
        assert has_length == [True, False, True, False]

    def test_it_is_added_to_the_projected_gradient(self, base_model_path, tmp_path):
        results = {}
        for weight in (0.0, 1.0):
            config = paper(scope="model", replay_weight=weight)
            _, before, results[weight] = trained(
                "sft", base_model_path, tmp_path, capability=capability_groups(), config=config
            )
        gradients = [g for _, g in literal_gradients(base_model_path, before)]
        expected = {
            n: results[0.0][n] - sum(g[n] for g in gradients) / len(gradients) for n in before
        }
        # float32 weights of size 1 and steps of size 1e-2.
        assert max_difference(results[1.0], expected) < 2e-6


class TestPrediction:
    @pytest.mark.parametrize("preset", ["paper", "replay", "kl"])
    def test_nothing_is_predicted_where_the_update_is_not_projected(
        self, preset, base_model_path, tmp_path, caplog
    ):
        config = OGPSAConfig.from_preset(preset, refresh_interval=1)
        trainer, _, _ = trained(
            "sft", base_model_path, tmp_path, capability=capability_groups(), config=config,
            **ADAMW | {"max_steps": 3, "learning_rate": 3e-2},
        )  # fmt: skip
        keys = {key for entry in trainer.state.log_history for key in entry}
        assert "ogpsa/realised_change/skills" in keys
        assert "ogpsa/predicted_change/skills" not in keys
        assert "first-order model" not in caplog.text

    def test_small_steps_change_the_losses_as_predicted(self, base_model_path, tmp_path):
        """Of losses that are said to have risen, so that there is something to restore."""
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(),
            config=paper(
                target="update", scope="model", refresh_interval=1, restoration=0.1,
                restoration_cap=1000.0,
            ),
            **ADAMW | {"learning_rate": 1e-4, "max_steps": 3},
        )  # fmt: skip
        rises = trainer.capability_loss.rises
        trainer.capability_loss.rises = lambda *args: [rise + 0.05 for rise in rises(*args)]
        trainer.train()
        for entry in trainer.state.log_history[1:-1]:
            for group in capability_groups():
                predicted = entry[f"ogpsa/predicted_change/{group}"]
                realised = entry[f"ogpsa/realised_change/{group}"]
                assert predicted == pytest.approx(-0.1 * 0.05, rel=0.2)
                assert realised == pytest.approx(predicted, rel=0.05)

    def test_large_steps_that_part_from_it_are_a_warning(self, base_model_path, tmp_path, caplog):
        with caplog.at_level(logging.WARNING):
            run(base_model_path, tmp_path, target="update", learning_rate=0.3, max_steps=2)
        assert "but the first-order model predicts" in caplog.text
        assert "Lower `refresh_interval` or `learning_rate`" in caplog.text


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_resume_is_bitwise(stage, base_model_path, tmp_path):
    def make():
        config = paper(
            target="update", metric="optimizer", restoration=1.0, capability_ema=0.5,
            refresh_interval=2, scope="model",
        )  # fmt: skip
        return make_trainer(
            stage, base_model_path, tmp_path, capability=capability_groups(), config=config,
            save_strategy="steps", save_steps=1, **ADAMW | {"max_steps": 5},
        )  # fmt: skip

    assert_resume_is_bitwise(make, tmp_path, steps=(1, 2, 3, 4))
