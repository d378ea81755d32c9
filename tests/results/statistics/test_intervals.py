"""Means, intervals, p-values and ranks against scipy's own, against brute force, and against printed numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from harness.core.formulas import Floats
from results.leaderboard.format import (
    duration,
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
    ahead,
    estimate,
    half_width,
    holm,
    interquartile_mean,
    long_tail,
    p_value,
    rank_ranges,
    resample_weights,
    swaps,
    t_quantile,
)

pytestmark = pytest.mark.quick


def resampled(scores_E: Floats) -> Floats:
    """(B,) means of resampled examples."""
    return resample_weights(len(scores_E)) @ scores_E / len(scores_E)


def exchanged(differences_E: Floats) -> Floats:
    """(B,) means of differences when some examples are exchanged."""
    return (1 - 2 * swaps(len(differences_E)).astype(float)) @ differences_E / len(differences_E)


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


@pytest.mark.parametrize("discrete", [False, True])
def test_p_value_without_a_variance_of_seeds_is_scipys_permutation_test(discrete: bool) -> None:
    rng = np.random.default_rng(5)
    for shift in (0.0, 0.3, 0.6):
        one, other = rng.normal(shift, 1, 12), rng.normal(0, 1, 12)
        if discrete:  # where many permutations tie with what was observed
            one, other = (one > 0).astype(float), (other > 0).astype(float)
        expected = stats.permutation_test(
            (one, other), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
        ).pvalue
        mean = float(np.mean(one - other))
        for seed_se in (0.0, 1e-17):  # and where it is rounding
            found = p_value(mean, seed_se, 3, exchanged(one - other))
            assert found == pytest.approx(expected, abs=0.002 + 3 * np.sqrt(expected * (1 - expected) / 500))


def test_p_value_without_examples_is_scipys_t_test() -> None:
    one, other = np.array([1.0, 1.4, 1.1, 1.3]), np.array([0.9, 1.2, 1.15, 1.0])
    difference = one - other
    found = p_value(float(difference.mean()), float(stats.sem(difference)), 4, None)
    assert found == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert found == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)
    assert p_value(1e3, 1.0, 3, None) == pytest.approx(2 * stats.t.sf(1e3, 2), rel=1e-4)
    assert (p_value(0.0, 0.0, 3, None), p_value(0.1, 0.0, 3, None)) == (1.0, 0.0)
    assert p_value(0.1, None, 1, None) is None


@pytest.mark.parametrize(("seed_se", "seeds"), [(0.05, 3), (0.2, 3), (0.2, 2), (0.1, 10), (1.0, 5)])
def test_p_value_is_that_of_both_errors_together(seed_se: float, seeds: int) -> None:
    rng = np.random.default_rng(1)
    null_B = exchanged(rng.standard_t(4, 60))
    errors = seed_se * rng.standard_t(seeds - 1, 400_000) + rng.choice(null_B, 400_000)
    for mean in (0.05, 0.3, 0.8):
        expected = float(np.mean(np.abs(errors) >= mean))
        assert p_value(mean, seed_se, seeds, null_B) == pytest.approx(expected, abs=0.012, rel=0.05)
        assert p_value(-mean, seed_se, seeds, -null_B) == pytest.approx(p_value(mean, seed_se, seeds, null_B))
    assert p_value(0.0, seed_se, seeds, null_B) == 1


def test_p_value_is_the_permutations_where_they_are_not_normal() -> None:
    differences_E = np.array([10.0, *np.random.default_rng(0).normal(0, 0.1, 11)])  # one example decides
    null_B, mean = exchanged(differences_E), float(differences_E.mean())
    errors = 0.05 * np.random.default_rng(1).standard_t(2, (200, len(null_B))) + null_B
    expected = float(np.mean(np.abs(errors) >= mean))
    assert expected > 0.45  # a normal error of this variance would exceed the mean in 0.32
    assert p_value(mean, 0.05, 3, null_B) == pytest.approx(expected, abs=0.01)


def test_p_value_of_permutations_is_never_zero() -> None:
    """The observed assignment is one of them (Phipson and Smyth 2010, https://arxiv.org/abs/1603.05766)."""
    assert p_value(9.0, 0.0, 3, exchanged(np.random.default_rng(0).normal(size=50))) == pytest.approx(1 / 1001)


def test_p_value_beyond_all_permutations_is_that_of_the_normal_limit() -> None:
    null_B = exchanged(np.random.default_rng(1).normal(size=400))
    null_se = float(np.sqrt(np.mean(null_B**2)))
    assert p_value(5 * null_se, 1e-3 * null_se, 5, null_B) == pytest.approx(2 * stats.norm.sf(5), rel=0.01)


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


def test_ahead_is_what_p_values_of_all_pairs_say() -> None:
    rng = np.random.default_rng(2)
    decided = 0
    for _ in range(20):
        scores_RSE = (
            rng.normal(0, 0.4, (5, 1, 1))
            + rng.normal(0, 0.04, (5, 4, 1))
            + rng.normal(size=(1, 1, 300))
            + rng.normal(0, 1, (5, 1, 300))
        )
        scores_RS, mean_RE = scores_RSE.mean(axis=2), scores_RSE.mean(axis=1)
        replicates_RB = np.stack([resampled(mean_E) for mean_E in mean_RE])
        found = ahead(scores_RS, (replicates_RB, 300), True)
        pairs = list(combinations(range(5), 2))
        p_values = []
        for i, j in pairs:
            difference_S = scores_RS[i] - scores_RS[j]
            null_B = exchanged(mean_RE[i] - mean_RE[j])
            p_values.append(p_value(float(difference_S.mean()), float(stats.sem(difference_S)), 4, null_B))
        for (i, j), p in zip(pairs, holm(p_values), strict=True):
            assert p is not None
            if not 0.03 < p < 0.08:  # beyond the error of the permutations
                assert (found[i, j] or found[j, i]) == (p <= 0.05)
                decided += 1
        assert (found == ahead(-scores_RS, (-replicates_RB, 300), False)).all()
        assert not (found & found.T).any()
    assert decided > 150


def test_ahead_without_examples_is_the_paired_t_test() -> None:
    scores_RS = np.array([[1.0, 1.2, 1.1], [0.4, 0.61, 0.5], [0.9, 1.3, 1.0]])
    pairs = [(0, 1), (0, 2), (1, 2)]
    adjusted = holm([float(stats.ttest_rel(scores_RS[i], scores_RS[j]).pvalue) for i, j in pairs])
    expected = np.zeros((3, 3), bool)
    for (i, j), p in zip(pairs, adjusted, strict=True):
        if p is not None and p <= 0.05:
            expected[(i, j) if scores_RS[i].mean() > scores_RS[j].mean() else (j, i)] = True
    assert expected.sum() == 2
    assert (ahead(scores_RS, None, True) == expected).all()
    assert (ahead(scores_RS, None, False) == expected.T).all()


def test_ahead_compares_over_the_seeds_that_both_have() -> None:
    nan = np.nan
    full, low = [1.0, 1.01, 0.99, 1.0], [0.1, 0.12, 0.09, 0.1]
    # The third has its best seed alone; the fourth shares one seed with it, and no two rows of one seed are compared.
    scores_RS = np.array([full, low, [nan, 0.12, 0.08, nan], [9.0, nan, nan, nan]])
    found = ahead(scores_RS, None, True)
    assert found.tolist() == [
        [False, True, True, False], [False] * 4, [False] * 4, [False] * 4,
    ]  # fmt: skip
    assert rank_ranges(found) == [(1, 2), (2, 4), (2, 4), (1, 4)]
    assert not ahead(np.array([[1.0], [2.0]]), None, True).any()
    assert ahead(np.zeros((1, 3)), None, True).tolist() == [[False]]
    assert not ahead(np.ones((3, 4)), None, True).any()


def test_three_examples_cannot_put_anything_ahead() -> None:
    """Of eight exchanges two are as large as what is observed; of six examples, two of 64."""
    for examples, found in ((3, False), (6, True)):
        scores_RE = np.array([np.ones(examples), np.zeros(examples)]) + np.linspace(0, 0.01, examples)
        replicates_RB = np.stack([resampled(scores_E) for scores_E in scores_RE])
        scores_RS = np.repeat(scores_RE.mean(axis=1)[:, None], 3, axis=1)
        assert ahead(scores_RS, (replicates_RB, examples), True)[0, 1] == found


def test_a_row_that_cannot_be_resampled_is_compared_by_seeds_alone() -> None:
    rng = np.random.default_rng(0)
    scores_RS = np.array([[1.0, 1.01, 0.99], [0.9, 0.912, 0.893], [0.8, 0.809, 0.791]])
    noisy_RB = np.stack([resampled(rng.normal(0, 5, 40)) for _ in range(3)])
    by_seeds = ahead(scores_RS, None, True)
    assert by_seeds[0, 1]
    assert by_seeds[1, 2]
    assert not ahead(scores_RS, (noisy_RB, 40), True).any()
    noisy_RB[2] = np.nan
    assert np.argwhere(ahead(scores_RS, (noisy_RB, 40), True)).tolist() == [[0, 2], [1, 2]]
    noisy_RB[0, 7] = np.nan  # one resample without a score
    assert np.argwhere(ahead(scores_RS, (noisy_RB, 40), True)).tolist() == [[0, 2], [1, 2]]


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
