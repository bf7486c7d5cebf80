"""Restoration, averaging and replay: what is fed back from the measured capability losses."""

import copy
import itertools
import logging
import math

import pytest
import torch

from laws import ALONG, random_gradients, refresh, small_subspace, take_step
from ogpsa_trl import SubspaceCallback
from ogpsa_trl.method.loss_history import Refresh
from ogpsa_trl.training.diagnostics import Diagnostics
from runs import ADAMW, capability_groups, flat, literal_gradients, paper

GROUPS = list(capability_groups())


class TestRestoration:
    @pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
    @pytest.mark.parametrize("scope", ["parameter", "model"])
    def test_a_step_takes_back_its_share_of_what_a_loss_has_risen(self, scope, metric):
        """To first order, all of it until the next refresh; losses that have fallen stay."""
        config = paper(
            target="update", scope=scope, metric=metric, restoration=0.5, restoration_cap=1e4,
            refresh_interval=4,
        )  # fmt: skip
        subspace, rows = small_subspace(config=config), random_gradients(num_gradients=3)
        refresh(subspace, rows, rises=[0.02, -0.03, 0.0])
        for step in range(5):
            projection, update = take_step(subspace, ALONG)
            expected = torch.tensor([-0.02 * 0.5 / 4 if step < 4 else 0.0, 0.0, 0.0])
            for changes in (torch.cat(rows, dim=1) @ torch.cat(update), projection.changes):
                torch.testing.assert_close(changes, expected, rtol=1e-3, atol=1e-6)
            assert projection.restoration.is_capped == 0
        _, change = refresh(subspace, rows)
        assert change.predicted_change == pytest.approx([-0.02 * 0.5, 0.0, 0.0], abs=1e-5)

    @pytest.mark.parametrize("scope", ["parameter", "model"])
    def test_the_cap_bounds_its_length_relative_to_the_rest(self, scope):
        steps = []
        for gain in (0.0, 1e4):
            config = paper(target="update", scope=scope, restoration=gain, restoration_cap=0.1)
            subspace = small_subspace(config=config)
            refresh(subspace, random_gradients(), rises=[1.0, 0.0])
            projection, update = take_step(subspace, ALONG)
            steps.append(torch.cat(update))
        assert projection.restoration.is_capped == 1
        assert projection.restoration.ratio.item() == pytest.approx(0.1, rel=1e-4)
        torch.testing.assert_close(
            (steps[1] - steps[0]).norm(), 0.1 * steps[0].norm(), rtol=1e-3, atol=0.0
        )

    def test_a_refresh_out_of_turn_is_not_restored_more_than_once(self):
        """After one step of its own, as after a held parameter, the share is a whole."""
        subspace, shares = small_subspace(config=paper(target="update", refresh_interval=4)), []
        for step in range(9):
            if step in (0, 4, 5):
                refresh(subspace, random_gradients())
            shares.append(subspace.history.share_of_step())
            take_step(subspace, ALONG)
        assert shares == [0.25] * 4 + [0.25] + [1.0, 0.0, 0.0, 0.0]

    def test_the_real_step_takes_back_what_the_losses_have_risen(self, train, base_model_path):
        """Each rise is that of the loss since the start."""
        config = paper(
            target="update", metric="optimizer", restoration=0.5, restoration_cap=100.0,
            refresh_interval=1,
        )  # fmt: skip
        trainer = train(config=config, **ADAMW | {"learning_rate": 1e-2})
        entries = trainer.state.log_history[:-1]
        losses, drifts = (
            [[entry[f"ogpsa/{name}/{group}"] for group in GROUPS] for entry in entries]
            for name in ("capability_loss", "drift")
        )
        assert max(map(max, drifts)) > 1e-4
        assert all("ogpsa/restoration_ratio" in entry for entry in entries)
        steps = itertools.pairwise(trainer.states)
        for (before, after), drift, loss in zip(steps, drifts, losses, strict=True):
            rises = [now - start for now, start in zip(loss, losses[0], strict=True)]
            assert drift == pytest.approx(rises, abs=1e-6)
            gradients = literal_gradients(base_model_path, before).double()
            changes = (gradients @ (flat(after) - flat(before))).tolist()
            # Weights of size 1 round a step: 6e-8 times the 1-norm of the gradient.
            assert changes == pytest.approx([-0.5 * max(rise, 0) for rise in drift], abs=2e-5)


@pytest.mark.parametrize("scope", ["parameter", "model"])
def test_gradients_and_drifts_are_exponential_means(scope):
    """After three refreshes: .09 of the first, .21 of the second, .7 of the third."""
    subspace = small_subspace(config=paper(capability_ema=0.3, scope=scope))
    rows = [random_gradients(seed=seed) for seed in range(3)]
    rises = [torch.tensor([0.1, -0.2]), torch.tensor([0.3, 0.0]), torch.tensor([0.0, 0.5])]
    for some_rows, some_rises in zip(rows, rises, strict=True):
        refresh(subspace, some_rows, some_rises.tolist())
    shares = torch.tensor([0.09, 0.21, 0.7])
    coordinates_PRK = subspace.coordinates.expand(3, -1, -1)
    for index, rows_KN in enumerate(subspace.basis):
        expected = sum(s * some_rows[index] for s, some_rows in zip(shares, rows, strict=True))
        torch.testing.assert_close(coordinates_PRK[index] @ rows_KN, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(subspace.history.drift, shares @ torch.stack(rises))
    torch.testing.assert_close(subspace.history.rises, rises[-1])


@pytest.mark.parametrize("target", ["none", "gradient"])
@pytest.mark.parametrize("scope", ["parameter", "model"])
def test_replay_adds_the_mean_capability_gradient_once_for_every_refresh(scope, target):
    """To the gradient, or to the projected one."""
    config = paper(target=target, capability_weight=0.5, scope=scope)
    subspace, rows = small_subspace(torch.optim.SGD, config=config), random_gradients()
    for _ in range(2):
        refresh(subspace, rows)
        _, first = take_step(subspace, ALONG)
        _, second = take_step(subspace, ALONG)
        for index, rows_RN in enumerate(rows):
            added = -1e-2 * 0.5 * rows_RN.mean(dim=0)
            torch.testing.assert_close(first[index] - second[index], added, rtol=1e-4, atol=1e-6)


class TestPrediction:
    @pytest.mark.parametrize("target", ["gradient", "none", "update"])
    def test_it_is_made_where_the_update_is_projected_only(self, target):
        subspace = small_subspace(config=paper(target=target))
        _, first = refresh(subspace, random_gradients(), rises=[0.0, 0.1])
        assert first.realised_change is None and first.predicted_change is None
        take_step(subspace, ALONG)
        _, second = refresh(subspace, random_gradients(), rises=[0.5, 0.0])
        assert second.realised_change == pytest.approx([0.5, -0.1])
        if target == "update":
            assert second.predicted_change == pytest.approx([0.0, 0.0], abs=1e-6)
        else:
            assert second.predicted_change is None

    def test_small_steps_change_the_losses_as_predicted(self, make):
        """
        Of losses that are said to have risen, so that there is something to restore: half in a
        step, as two are expected between refreshes, and all of it once there has been one.
        """
        config = paper(
            target="update", scope="model", refresh_interval=2, restoration=0.1,
            restoration_cap=1000.0,
        )  # fmt: skip
        trainer = make(config=config, **ADAMW | {"learning_rate": 1e-4, "max_steps": 3})
        rises = trainer.capability_loss.rises
        trainer.capability_loss.rises = lambda *args: [rise + 0.05 for rise in rises(*args)]
        trainer.remove_callback(SubspaceCallback)
        trainer.add_callback(SubspaceCallback(trainer, refresh_interval=1))
        trainer.train()
        for share, entry in zip((0.5, 1.0), trainer.state.log_history[1:-1], strict=True):
            for group in GROUPS:
                predicted = entry[f"ogpsa/predicted_change/{group}"]
                assert predicted == pytest.approx(-0.1 * 0.05 * share, rel=0.2)
                assert entry[f"ogpsa/realised_change/{group}"] == pytest.approx(predicted, rel=0.05)

    @pytest.mark.parametrize(
        ("predicted", "realised", "loss", "is_surprise"),
        [(-0.1, 0.2, "nll", True), (-0.1, 0.05, "nll", False), (-0.1, 0.05, "kl", True),
         (0.0, 0.09, "kl", False), (None, 9.0, "nll", False)],
    )  # fmt: skip
    def test_steps_that_part_from_it_are_a_warning(
        self, predicted, realised, loss, is_surprise, caplog
    ):
        """By a tenth of the loss, here 2, or of one nat of a divergence."""
        subspace = small_subspace(config=paper(capability_loss=loss))
        gradients, _ = refresh(subspace, random_gradients(num_gradients=1))
        gradients.losses = [2.0]
        diagnostics = Diagnostics(gradients.names)
        change = Refresh([0.0], None if predicted is None else [predicted], [realised])
        with caplog.at_level(logging.WARNING):
            diagnostics.record_refresh(subspace, gradients, change, seconds=0.0, step=7)
        text = f"by {realised:.3g}, but the first-order model predicts {predicted}. Lower `refresh_"
        assert (text in caplog.text) == is_surprise == bool(caplog.records)
        means = diagnostics.take_means()
        assert means["ogpsa/realised_change/group 0"] == realised
        assert means.get("ogpsa/predicted_change/group 0") == predicted


def test_a_saved_subspace_goes_on_bitwise():
    """Within an interval, with old gradients, drifts and a number of steps to go on from."""
    config = paper(
        target="update", metric="optimizer", restoration=1.0, capability_ema=0.5, refresh_interval=2
    )
    first, resumed = small_subspace(config=config), small_subspace(config=config)
    for step in range(7):
        if step == 3:
            resumed.load_state_dict(copy.deepcopy(first.state_dict()))
            old, new = first.backend, resumed.backend
            new.optimizer.load_state_dict(copy.deepcopy(old.optimizer.state_dict()))
            new.model.load_state_dict(old.model.state_dict())
        updates = []
        for subspace in [first] if step < 3 else [first, resumed]:
            if step % 2 == 0:
                rows, rises = random_gradients(seed=step), [0.01 * step, 0.02]
                _, change = refresh(subspace, rows, rises)
            updates.append((torch.cat(take_step(subspace, ALONG)[1]).tolist(), change))
        assert updates[0] == updates[-1]


class TestTurns:
    """Of a group whose turn it is not nothing is measured."""

    def test_its_gradient_stays_as_it_is(self):
        subspace, rows = small_subspace(), random_gradients()
        refresh(subspace, rows)
        others = random_gradients(seed=1)
        gradients, _ = refresh(subspace, others, resting=[1])
        for before, new, basis_KN, coordinates_RK in zip(
            rows, others, subspace.basis, subspace.coordinates.expand(3, -1, -1), strict=True
        ):
            expected = torch.stack([0.5 * before[0] + 0.5 * new[0], before[1]])
            torch.testing.assert_close(coordinates_RK @ basis_KN, expected, rtol=1e-4, atol=1e-5)
        assert math.isnan(gradients.losses[1]) and not any(gradients.is_kept)

    def test_its_drift_is_what_the_steps_should_have_left_of_it(self):
        subspace = small_subspace(
            config=paper(target="update", restoration=0.5, refresh_interval=1)
        )
        refresh(subspace, random_gradients(), rises=[0.2, 1e-3])
        _, update = take_step(subspace, ALONG)
        moved = torch.stack([torch.cat(g) for g in zip(*random_gradients(), strict=True)])
        change = moved @ torch.cat(update)
        refresh(subspace, random_gradients(seed=1), rises=[0.1, math.nan], resting=[1])
        assert change[1].item() == pytest.approx(-0.5e-3, rel=1e-3)
        assert subspace.history.drift.tolist() == pytest.approx([0.1, 0.5e-3], rel=1e-3)

    def test_its_change_is_that_since_its_last_one(self):
        subspace = small_subspace(config=paper(target="update", refresh_interval=1))
        refresh(subspace, random_gradients(), rises=[0.2, 0.1])
        changes = []
        for rises in ([0.3, math.nan], [0.5, 0.4]):
            take_step(subspace, ALONG)
            changes.append(subspace.history.predicted_change.tolist())
            resting = [1] if math.isnan(rises[1]) else []
            _, found = refresh(subspace, random_gradients(), rises, resting)
            if resting:
                for values in (found.drift, found.realised_change, found.predicted_change):
                    assert math.isnan(values[1]) and not math.isnan(values[0])
        assert found.realised_change == pytest.approx([0.2, 0.3], rel=1e-5)
        expected = [changes[1][0], changes[0][1] + changes[1][1]]
        assert found.predicted_change == pytest.approx(expected, rel=1e-5, abs=1e-12)

    def test_training_has_diverged_when_all_were_lost_in_their_last_one(self):
        subspace, rows = small_subspace(), random_gradients()
        refresh(subspace, rows)
        lost = [torch.stack([row_RN[0] * math.nan, row_RN[1] * math.nan]) for row_RN in rows]
        gradients, _ = refresh(subspace, lost, resting=[1])
        assert gradients.is_kept == [True, False]
        with pytest.raises(FloatingPointError, match="Training has diverged"):
            refresh(subspace, lost, resting=[0])

    def test_the_mean_is_of_the_others(self):
        """So that a penalty in turns is one on the average."""
        config = paper(target="none", capability_weight=1.0, refresh_interval=1)
        subspace, rows = small_subspace(config=config), random_gradients()
        refresh(subspace, rows)
        refresh(subspace, rows, resting=[0])
        expected = torch.cat([row_RN[1] for row_RN in rows]).square().sum()
        assert subspace.mean_square.item() == pytest.approx(expected.item(), rel=1e-4)
