"""Intervals: against closed forms, a literal bootstrap and their coverage."""

import json
import math

import numpy as np
import pytest

from ogpsa_trl.evaluation.intervals import (
    interval,
    mean_of,
    paired_interval,
    ratio_of,
    statistic_of,
)
from ogpsa_trl.evaluation.results import Measured, Result, compare


def names(number):
    return [str(index) for index in range(number)]


def normal(number, seed=0, mean=0.0, sd=1.0):
    return np.random.default_rng(seed).normal(mean, sd, number)


def test_of_a_mean_is_that_of_the_normal_distribution():
    values = normal(400)
    low, high = interval(mean_of(names(400), values), num_bootstrap=10_000)
    half = 1.96 * values.std() / math.sqrt(400)
    # Ends of 10,000 resamples scatter by about 2 % of the half width.
    assert low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_holds_the_true_value_as_often_as_it_says():
    """Of a ratio of sums that hang together, before and after; 300 experiments of 60 samples."""
    rng, hits, confidence = np.random.default_rng(1), 0, 0.5
    for _ in range(300):
        tokens = rng.integers(5, 50, 60)
        hardness = rng.normal(2, 0.5, 60)
        before = ratio_of(names(60), tokens * (hardness + rng.normal(0, 0.1, 60)), tokens)
        after = ratio_of(names(60), tokens * (hardness + 0.3 + rng.normal(0, 0.1, 60)), tokens)
        low, high = paired_interval(before, after, num_bootstrap=400, confidence=confidence)
        hits += low <= 0.3 <= high
    # Two standard deviations of a count of 300, and the narrowness that is documented.
    tolerance = 2.5 * math.sqrt(confidence * (1 - confidence) / 300) + 0.01
    assert hits / 300 == pytest.approx(confidence, abs=tolerance)


def test_pairing_removes_what_the_samples_have_in_common():
    common, noise = normal(200, 0, 5.0, 3.0), normal(200, 1, 0.0, 0.1)
    before, after = mean_of(names(200), common), mean_of(names(200), common + 0.2 + noise)
    low, high = paired_interval(before, after)
    half = 1.96 * noise.std() / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert 0 < low < 0.2 + noise.mean() < high
    single = interval(after)
    assert single.high - single.low > 10 * (high - low)


def test_a_ratio_is_resampled_by_samples_not_by_tokens():
    """One long text counts as much as it weighs, and comes or stays away as a whole."""
    nll, tokens = np.array([10.0, 20.0, 300.0, 5.0]), np.array([10, 10, 100, 10])
    values = ratio_of(names(4), nll, tokens)
    assert values.value == pytest.approx(335 / 130)
    assert values.value != pytest.approx((nll / tokens).mean())
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 4, (20_000, 4))
    literal = [nll[row].sum() / tokens[row].sum() for row in rows]
    low, high = interval(values, num_bootstrap=20_000)
    # The values of four samples are few, and their quantiles steps.
    assert [low, high] == pytest.approx(list(np.quantile(literal, [0.025, 0.975])), abs=0.05)


def test_of_a_perplexity_is_the_exponential_of_that_of_the_logarithm():
    nll, tokens = normal(50, 0, 30, 5), np.full(50, 10)
    plain = interval(ratio_of(names(50), nll, tokens))
    perplexity = interval(ratio_of(names(50), nll, tokens, exp=True))
    assert perplexity == pytest.approx([math.exp(end) for end in plain], rel=1e-3)


def test_any_function_of_items_gets_the_interval_of_its_quick_form():
    values = normal(30)
    items = [(value, "x") for value in values]
    slow = statistic_of(names(30), items, lambda rows: sum(r[0] for r in rows) / len(rows))
    quick = mean_of(names(30), values)
    assert slow.value == pytest.approx(quick.value)
    assert interval(slow, num_bootstrap=200) == pytest.approx(interval(quick, num_bootstrap=200))
    chosen = slow.select(["3", "1"])
    assert chosen.value == pytest.approx(values[[3, 1]].mean())


def test_is_the_same_for_the_same_seed_only():
    values = mean_of(names(50), normal(50))
    assert interval(values, seed=3) == interval(values, seed=3) != interval(values, seed=4)


def test_is_zero_for_the_same_values_whatever_they_are():
    for values in (mean_of(names(20), normal(20)), ratio_of(names(20), normal(20), np.ones(20))):
        assert paired_interval(values, values) == (0.0, 0.0)


def test_of_one_sample_is_not_known():
    one = mean_of(["a"], [1.0])
    assert interval(one) is None
    assert paired_interval(one, one) is None


def test_of_other_samples_is_refused():
    with pytest.raises(ValueError, match="needs the same samples in the same order"):
        paired_interval(mean_of(["a", "b"], [0, 1]), mean_of(["b", "a"], [1, 0]))


class TestComparison:
    def test_takes_the_samples_in_common_by_name(self):
        before = {"m": Measured("share", True, mean_of(["c", "a", "x"], [3.0, 1.0, 100.0]))}
        after = {"m": Measured("share", True, mean_of(["a", "b", "c"], [1.5, 50.0, 3.5]))}
        [result] = compare(before, after)
        assert (result.before.value, result.after.value) == (2.0, 2.5)
        assert result.delta == (0.5, (0.5, 0.5))
        assert result.num_samples == 2

    def test_says_which_way_is_good(self):
        values = normal(20)
        for shift, higher, verdict in (
            (1, True, "better"), (-1, True, "worse"), (1, False, "worse"), (-1, False, "better")
        ):  # fmt: skip
            before, after = mean_of(names(20), values), mean_of(names(20), values + shift)
            [result] = compare(
                {"m": Measured("x", higher, before)}, {"m": Measured("x", higher, after)}
            )
            assert result.verdict == verdict

    def test_says_nothing_that_it_does_not_know(self):
        before, after = (mean_of(names(20), normal(20, seed)) for seed in (0, 1))
        [unclear] = compare({"m": Measured("x", True, before)}, {"m": Measured("x", True, after)})
        assert unclear.verdict == "unclear"
        [alone] = compare(None, {"m": Measured("x", True, after)})
        assert (alone.before, alone.delta, alone.verdict) == (None, None, None)
        assert alone.after.interval.low < alone.after.value < alone.after.interval.high
        [new] = compare({}, {"m": Measured("x", None, after)})
        assert (new.before, new.verdict) == (None, None)

    def test_results_come_back_from_json(self):
        before, after = (mean_of(names(20), normal(20, seed)) for seed in (0, 1))
        measures = {
            "changed": Measured("x", True, after),
            "alone": Measured("x", None, after),
            "one": Measured("x", False, mean_of(["a"], [1.0])),
        }
        for result in compare({"changed": Measured("x", True, before)}, measures):
            assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result

    def test_without_a_sample_in_common_is_refused(self):
        sides = ({"m": Measured("x", True, mean_of([key], [0]))} for key in "ab")
        with pytest.raises(ValueError, match="`m` has no sample that both models were measured on"):
            compare(*sides)
