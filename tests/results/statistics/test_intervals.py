"""Means, intervals, p-values and ranks against scipy's own, against brute force, and against printed numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from harness.core.durations import duration
from harness.core.formulas import Floats
from results.leaderboard.format import (
    estimate_text,
    examples_text,
    number,
    ratio,
    signed,
    size_text,
    verdict,
    verdict_text,
)
from results.statistics.intervals import (
    Difference,
    Estimate,
    estimate,
    half_width,
    holm,
    interquartile_mean,
    long_tail,
    p_value,
    rank_ranges,
    resample_weights,
    t_quantile,
)

pytestmark = pytest.mark.quick


def resampled(scores_E: Floats) -> Floats:
    """(B,) means of resampled examples."""
    return resample_weights(len(scores_E)) @ scores_E / len(scores_E)


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.1, 2.9, 3.3], [0.5, 0.7, 0.1, 0.4, 0.9, 0.2]])
def test_interval_without_examples_is_scipys_t_interval(values: list[float]) -> None:
    found = estimate(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert (found.n, found.covers, found.examples) == (len(values), "seeds", None)


def test_t_quantiles_of_the_printed_table() -> None:
    assert [round(t_quantile(n), 3) for n in (2, 3, 5, 10)] == [12.706, 4.303, 2.776, 2.262]


def test_one_seed_has_no_interval_and_no_seed_no_mean() -> None:
    assert estimate([4.2]) == Estimate(4.2, None, None, 1)
    assert estimate([4.2], np.array([4.0, 4.4]), 10) == Estimate(
        4.2, None, None, 1, None, pytest.approx(0.2108, 1e-3), 10
    )
    assert Estimate(4.2, None, None, 1).covers == ""
    assert estimate([]) is None


def test_interval_without_a_variance_of_seeds_is_the_t_interval_of_the_examples() -> None:
    half_E = np.random.default_rng(3).normal(size=20)
    scores_E = 7 + np.concatenate([half_E, -half_E])
    found = estimate([7.0] * 3, resampled(scores_E), 40)
    low, high = stats.t.interval(0.95, 39, loc=7, scale=stats.sem(scores_E))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    # The spread of 1000 resamples is right to 2 %, their skewness to 0.08.
    assert (7 - found.low, found.high - 7) == pytest.approx((7 - low, high - 7), rel=0.1)
    assert (found.covers, found.seed_se) == ("seeds and test examples", 0.0)
    assert found.example_se == pytest.approx(stats.sem(scores_E), rel=0.05)


def test_two_sources_of_error_meet_between_their_own_intervals() -> None:
    """Cochran and Cox: equal variances weigh the two t's alike; with none of one it is the other's."""
    assert half_width(1.0, 3, 0.0, 100) == pytest.approx(t_quantile(3))
    assert half_width(0.0, 3, 1.0, 100) == pytest.approx(t_quantile(100))
    assert half_width(1.0, 3, 1.0, 100) == pytest.approx((t_quantile(3) + t_quantile(100)) / 2 * 2**0.5)
    assert half_width(0.0, 3, 0.0, 100) == 0


def test_the_side_of_a_long_tail_is_longer() -> None:
    assert long_tail(0.0, 2.0, 0.3) == pytest.approx((2 * 1.959964**2 + 1) / 6 * 0.3 * 2)
    assert long_tail(2.0, 0.0, 0.3) == long_tail(0.0, 0.0, 0.3) == 0
    scores_E = np.random.default_rng(0).lognormal(0, 1, 100)
    for sign in (1, -1):
        found = estimate([sign * scores_E.mean()] * 3, resampled(sign * scores_E), 100)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        below, above = found.mean - found.low, found.high - found.mean
        assert (above > 1.1 * below) if sign == 1 else (below > 1.1 * above)


def test_undefined_resamples_are_left_out() -> None:
    replicates_B = resampled(np.random.default_rng(0).normal(size=50))
    holed_B = np.concatenate([replicates_B, [np.nan, np.inf]])
    assert estimate([1.0, 2.0], holed_B, 50) == estimate([1.0, 2.0], replicates_B, 50)
    for undefined_B, examples in ((np.full(9, np.nan), 50), (replicates_B, 1)):
        assert estimate([1.0, 2.0], undefined_B, examples) == estimate([1.0, 2.0])


def test_p_value_is_scipys_t_test() -> None:
    one, other = np.random.default_rng(3).normal(size=(2, 4))
    difference = one - other
    found = p_value(float(difference.mean()), float(stats.sem(difference)), 4)
    assert found == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert (p_value(0.0, 0.0, 3), p_value(0.1, 0.0, 3)) == (1.0, 0.0)
    assert p_value(0.1, None, 1) is None


def test_holm_is_the_textbooks_and_the_closed_test() -> None:
    """R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") is 0.03, 0.06, 0.06, 0.02."""
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([]) == []
    assert holm([None]) == [None]
    for p_values in np.random.default_rng(0).random((20, 6)) ** 2:
        families = [set(family) for size in range(1, 7) for family in combinations(range(6), size)]
        # Bonferroni on every family that a comparison is of: Holm is their closure.
        closed = [
            max(min(1.0, len(family) * min(p_values[list(family)])) for family in families if i in family)
            for i in range(6)
        ]
        assert holm(p_values.tolist()) == pytest.approx(closed)


def test_ranks_are_ranges_where_the_order_is_open() -> None:
    order = np.zeros((4, 4), bool)
    assert rank_ranges(order) == [(1, 4)] * 4
    order[0, 2] = order[0, 3] = order[1, 3] = True
    assert rank_ranges(order) == [(1, 2), (1, 3), (2, 4), (3, 4)]
    assert rank_ranges(np.triu(np.ones((3, 3), bool), 1)) == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5], 5),
        ([1, 4], 2.5),
        ([9, 0, 3], (0.25 * 0 + 1 * 3 + 0.25 * 9) / 1.5),
        ([100, 2, 1, 3], 2.5),
        ([0, 1, 2, 4, 100], (0.75 * 1 + 2 + 0.75 * 4) / 2.5),
        ([1, 2, 3, 4, 5, 60], (0.5 * 2 + 3 + 4 + 0.5 * 5) / 3),
    ],
)
def test_interquartile_mean(scores: list[float], expected: float) -> None:
    assert interquartile_mean(scores) == pytest.approx(expected)


def test_interquartile_mean_of_many_is_scipys_trimmed_mean() -> None:
    scores = np.random.default_rng(0).normal(size=48)
    assert interquartile_mean(scores.tolist()) == pytest.approx(stats.trim_mean(scores, 0.25))
    with pytest.raises(ValueError, match="at least one score"):
        interquartile_mean([])


def test_a_tie_is_said_only_where_equivalence_is_shown() -> None:
    one = Difference(0.5, 0.2, 0.8, 3, p_value=0.01, p_adjusted=0.06, more_seeds=1)
    assert verdict(replace(one, verdict="better")) == "better"
    assert verdict(replace(one, verdict="equivalent")) == verdict_text(replace(one, verdict="equivalent")) == "tie"
    assert verdict(one) == "not separated yet"
    assert verdict_text(one) == "not separated yet (1 more seed might)"
    assert verdict_text(replace(one, more_seeds=None)) == "not separated yet"
    assert verdict(Difference(0.5, None, None, 1)) == verdict(None) == ""
    assert examples_text(replace(one, verdict_examples="worse")) == "worse"
    assert examples_text(one) == ""


def test_ratios_and_differences_as_text() -> None:
    assert [ratio(value) for value in (1.0934, 1.0042, 17.24, 0.913, 0.05)] == [
        "1.09×", "1.004×", "17.24×", "0.91×", "0.050×",
    ]  # fmt: skip
    assert estimate_text(Difference(1.09, 1.02, 1.17, 3, null=1)) == "1.09× [1.02×, 1.17×]"
    assert estimate_text(Difference(0.03, -0.01, 0.07, 3)) == "+0.030 [−0.010, +0.070]"


def test_numbers_as_text() -> None:
    assert [number(value) for value in (0.8124, 12.456, 123.45, 12345.6, 0.00001, 0, -1.5)] == [
        "0.812", "12.46", "123.5", "12,346", "1.0e-05", "0.000", "−1.500",
    ]  # fmt: skip
    assert [signed(value) for value in (0.5, -0.5, 0)] == ["+0.500", "−0.500", "0.000"]
    assert [size_text(value) for value in (512, 1536, 5 * 2**30)] == ["512 B", "1.5 KiB", "5 GiB"]
    assert [duration(value) for value in (12.34, 245, 12000)] == ["12.3 s", "4 min 05 s", "3 h 20 min"]
