"""Means, intervals and ranks against scipy's own and against values from a printed t table."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from results.format import duration, number, signed, size_text, verdict
from results.stats import Estimate, over_seeds, paired_difference, rank_ranges, t_quantile


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.1, 2.9, 3.3], [0.5, 0.7, 0.1, 0.4, 0.9, 0.2]])
def test_interval_is_scipys_t_interval(values: list[float]) -> None:
    estimate = over_seeds(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert estimate is not None
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((np.mean(values), low, high))
    assert estimate.n == len(values)


def test_t_quantiles_of_the_printed_table() -> None:
    assert [round(t_quantile(n), 3) for n in (2, 3, 5, 10)] == [12.706, 4.303, 2.776, 2.262]


def test_one_seed_has_no_interval_and_no_seed_no_mean() -> None:
    assert over_seeds([4.2]) == Estimate(4.2, None, None, 1)
    assert over_seeds([]) is None


def test_paired_difference_is_scipys_paired_t_interval() -> None:
    ours, theirs = {0: 1.0, 1: 1.4, 2: 1.1, 7: 9.0}, {2: 0.7, 1: 1.2, 0: 0.5, 8: 0.0}
    difference = paired_difference(ours, theirs)
    expected = stats.ttest_rel([1.0, 1.4, 1.1], [0.5, 1.2, 0.7]).confidence_interval(0.95)
    assert difference is not None
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.n == 3
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_t_interval_over_three_seeds_covers_the_mean_95_times_of_100() -> None:
    draws = np.random.default_rng(0).normal(2.0, 0.7, (4000, 3))
    covered = [not estimate.excludes(2.0) for row in draws if (estimate := over_seeds(list(row)))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


def test_ranks_are_ranges_where_intervals_overlap() -> None:
    estimates = [Estimate(9, 8, 10, 3), Estimate(8.5, 7.5, 9.5, 3), Estimate(2, 1, 3, 3)]
    assert rank_ranges(estimates, higher_is_better=True) == [(1, 2), (1, 2), (3, 3)]
    assert rank_ranges(estimates, higher_is_better=False) == [(2, 3), (2, 3), (1, 1)]


def test_touching_intervals_and_single_seeds_tie() -> None:
    assert rank_ranges([Estimate(2, 1, 3, 2), Estimate(4, 3, 5, 2)], True) == [(1, 2), (1, 2)]
    assert rank_ranges([Estimate(9, None, None, 1), Estimate(1, 0.9, 1.1, 3)], True) == [(1, 2), (1, 2)]


def test_verdict_follows_the_direction_of_the_metric() -> None:
    difference = Estimate(0.5, 0.2, 0.8, 3)
    assert verdict(difference, higher_is_better=True) == "better"
    assert verdict(difference, higher_is_better=False) == "worse"
    assert verdict(Estimate(0.5, -0.2, 1.2, 3), True) == "tie"
    assert verdict(Estimate(0.5, None, None, 1), True) == ""


def test_numbers_as_text() -> None:
    assert [number(value) for value in (0.8124, 12.456, 123.45, 12345.6, 0.00001, 0, -1.5)] == [
        "0.812", "12.46", "123.5", "12,346", "1.0e-05", "0.000", "−1.500",
    ]  # fmt: skip
    assert [signed(value) for value in (0.5, -0.5, 0)] == ["+0.500", "−0.500", "0.000"]
    assert [size_text(value) for value in (512, 1536, 5 * 2**30)] == ["512 B", "1.5 KiB", "5 GiB"]
    assert [duration(value) for value in (12.34, 245, 12000)] == ["12.3 s", "4 min 05 s", "3 h 20 min"]
