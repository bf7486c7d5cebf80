"""Capability at equal safety, and its picture."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpsa_trl.evaluation.equal_safety import (
    Spread,
    at_safety,
    paired_difference,
    share_figure,
    tradeoff_figure,
)
from scripted import saved_figures

SWEEP = [
    {"safe": 0.5, "kept": 1.0, "time": 3.0},
    {"safe": 0.7, "kept": 0.9},
    {"safe": 0.9, "kept": 0.5},
]


def test_measures_are_linear_between_neighbours():
    found = at_safety(SWEEP, "safe", 0.85)
    assert found == pytest.approx({"safe": 0.85, "kept": 0.6})  # `time` is known of one run only
    for run in SWEEP:
        assert at_safety(SWEEP, "safe", run["safe"])["kept"] == pytest.approx(run["kept"])


def test_nothing_is_extrapolated():
    for level in (0.49, 0.91):
        assert at_safety(SWEEP, "safe", level) is None
    assert at_safety(SWEEP[:1], "safe", 0.6) is None
    assert at_safety([], "safe", 0.6) is None


def test_the_gentlest_training_that_is_safe_enough_counts():
    """With too high a learning rate a model may lose the refusals again."""
    sweep = [{"safe": s, "kept": k} for s, k in ((0.2, 1.0), (0.8, 0.9), (0.2, 0.1))]
    assert at_safety(sweep, "safe", 0.5)["kept"] == pytest.approx(0.95)


def test_a_run_that_diverged_is_left_out():
    sweep = [SWEEP[0], {"safe": float("nan"), "kept": 0.0}, SWEEP[2]]
    assert at_safety(sweep, "safe", 0.7) == pytest.approx({"safe": 0.7, "kept": 0.75})


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-5, 5)), min_size=2, max_size=5),
    st.floats(0, 1),
)
def test_what_is_found_lies_between_runs(points, level):
    sweep = [{"safe": safe, "kept": kept} for safe, kept in points]
    found = at_safety(sweep, "safe", level)
    is_inside = min(s for s, _ in points) <= level <= max(s for s, _ in points)
    if len({safe for safe, _ in points}) > 1:
        assert (found is not None) == is_inside
    if found is not None:
        kept = [kept for _, kept in points]
        assert min(kept) - 1e-9 <= found["kept"] <= max(kept) + 1e-9


def test_what_seeds_have_in_common_cancels_in_a_difference():
    easy_and_hard = {0: 0.9, 1: 0.3, 2: 0.6}
    better = {seed: value + 0.1 for seed, value in easy_and_hard.items()}
    difference = paired_difference(better, easy_and_hard)
    assert (difference.mean, difference.sd) == pytest.approx((0.1, 0), abs=1e-12)
    assert paired_difference(better, {2: 0.5, 7: 0.1}) == Spread(pytest.approx(0.2), 0, 1)
    assert paired_difference(better, {7: 0.1}) is None


def test_a_spread_is_of_a_sample():
    assert Spread.of([1, 2, 3]) == Spread(2, 1, 3)
    assert Spread.of([1, 2, 3]).standard_error == pytest.approx(3**-0.5)
    assert Spread.of([4]).standard_error == 0
    assert f"{Spread.of([1, 2, 3]):+.1f}, {Spread.of([4]):.0f}" == "+2.0 +- 1.0, 4"
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])


def test_a_picture_has_a_panel_for_each_measure_and_a_line_for_each_method(monkeypatch, tmp_path):
    figures = saved_figures(monkeypatch)
    bits = {"naive": (2.0, 2.5), "careful": (1.1, 1.2)}
    sweeps = {
        name: [
            {"safe": Spread(safe, 0.01, 3), "bits": Spread(b, 0.1, 3), "over": Spread(b - 1, 0, 3)}
            for safe, b in zip((0.5, 0.9), values, strict=True)
        ]
        for name, values in bits.items()
    }
    path = tradeoff_figure(
        sweeps, tmp_path / "new" / "t.png", safety="safe", measures=["bits", "over"],
        start={"safe": 0.1, "bits": 1.0, "over": 0.0}, levels=[0.7], lower_is_better=["bits"],
    )  # fmt: skip
    assert path.read_bytes().startswith(b"\x89PNG")
    left, right = figures[0].axes
    for axes, shift in ((left, 0), (right, 1)):
        lines = [container.lines[0].get_xydata().tolist() for container in axes.containers]
        expected = [[[0.5, a - shift], [0.9, b - shift]] for a, b in bits.values()]
        assert lines == expected
    assert left.yaxis.get_inverted() and not right.yaxis.get_inverted()  # up is better
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert legend == ["before training", "naive", "careful"]


def test_a_picture_of_shares_has_a_line_for_each_method(monkeypatch, tmp_path):
    figures = saved_figures(monkeypatch)
    kept = {
        "KL": {1.0: Spread(0.9, 0.1, 4)},
        "ours": {1.0: Spread(0.95, 0, 3), 0.25: Spread(0.9, 0, 3)},
    }
    path = share_figure(kept, tmp_path / "shares.png", capability="kept")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    lines = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert lines == [[[1.0, 0.9]], [[0.25, 0.9], [1.0, 0.95]]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["KL", "ours"]


def test_a_picture_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one method"):
        tradeoff_figure({}, tmp_path / "t.png", safety="s", measures=["c"], start={})
