"""Families of rows: their intervals, tests, verdicts and ranks, against scipy and against each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from harness.core.formulas import Floats
from harness.core.record import MetricInfo
from results.statistics.family import Family
from results.statistics.intervals import holm

pytestmark = pytest.mark.quick

SCORE = MetricInfo(name="score", label="Score", higher_is_better=True)
PERPLEXITY = MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False)
ACCURACY = MetricInfo(name="exact_match", label="Exact match", higher_is_better=True, lower=0, upper=1)
WER = MetricInfo(name="wer", label="WER", higher_is_better=False, lower=0)
METRICS = (SCORE, PERPLEXITY, ACCURACY, WER)
EXAMPLES = 50


def test_two_rows_are_compared_by_the_paired_t_test() -> None:
    scores_RS = np.random.default_rng(0).normal([[1.0], [0.0]], 0.3, (2, 5))
    found = Family(scores_RS, SCORE, 0.01).difference(0, 1)
    expected = stats.ttest_rel(*scores_RS)
    interval = expected.confidence_interval(0.95)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx(
        (float(np.mean(scores_RS[0] - scores_RS[1])), interval.low, interval.high)
    )
    assert found.p_value == found.p_adjusted == pytest.approx(expected.pvalue)
    ratio = Family(np.exp(scores_RS), PERPLEXITY, 0.01).difference(0, 1)
    assert ratio is not None
    assert (ratio.mean, ratio.low, ratio.high, ratio.null) == pytest.approx(
        (np.exp(found.mean), np.exp(interval.low), np.exp(interval.high), 1)
    )
    assert (found.verdict, ratio.verdict) == ("better", "worse")


def test_one_row_alone_has_students_interval() -> None:
    scores_S = np.array([2.0, 3.5, 2.6])
    found = Family(np.log(scores_S)[None], SCORE, 0.01).estimate(0)
    expected = stats.t.interval(0.95, 2, np.log(scores_S).mean(), stats.sem(np.log(scores_S)))
    assert (found.low, found.high) == pytest.approx(expected)
    geometric = Family(scores_S[None], PERPLEXITY, 0.01).estimate(0)
    assert (geometric.mean, geometric.low, geometric.high) == pytest.approx(
        (stats.gmean(scores_S), np.exp(expected[0]), np.exp(expected[1]))
    )


def test_these_trained_models_are_compared_on_the_examples_alone() -> None:
    rng = np.random.default_rng(1)
    examples_RE = rng.normal([[0.0], [0.3]], 1, (2, 400))
    replicates_RB = np.stack([rng.choice(400, 400) for _ in range(1000)])
    means_RB = examples_RE[:, replicates_RB].mean(axis=2)
    found = Family(examples_RE.mean(axis=1)[:, None], SCORE, 0.01, (means_RB, 400)).difference(1, 0)
    assert found is not None
    assert (found.p_value, found.verdict, found.low) == (None, "unresolved", None)  # one seed
    assert found.example_se == pytest.approx(stats.sem(examples_RE[1] - examples_RE[0]), rel=0.1)
    assert found.verdict_examples == "better"


def random_families(count: int) -> Iterator[tuple[MetricInfo, Family]]:
    """Families of all kinds: zeros, ones, equal seeds, huge perplexities, missing seeds and examples, one seed."""
    rng = np.random.default_rng(7)
    for index in range(count):
        metric = METRICS[index % len(METRICS)]
        rows, seeds = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        level_R1 = rng.normal(0, 2, (rows, 1))
        z_RS = level_R1 + rng.normal(0, 10.0 ** rng.uniform(-6, 1), (rows, seeds)) * rng.integers(0, 2, (rows, 1))
        if metric is PERPLEXITY:
            scores_RS = 1 + np.exp(np.clip(z_RS * rng.choice([1, 100]), -700, 700))
        elif metric is ACCURACY:
            scores_RS = np.round(1 / (1 + np.exp(-3 * z_RS)) * EXAMPLES) / EXAMPLES
        else:
            scores_RS = np.maximum(z_RS, 0) if metric is WER else z_RS
        missing_RS = rng.random(z_RS.shape) < rng.choice([0, 0.3])
        missing_RS[:, 0] = False
        resampled = None
        if rng.random() < 0.6:
            low, high = metric.lower or -np.inf, metric.upper or np.inf
            drawn_RB = scores_RS[:, :1] * np.exp(rng.normal(0, 0.05, (rows, 200)))
            resampled = np.clip(drawn_RB, low, high), EXAMPLES
            resampled[0][rng.random(rows) < 0.2] = np.nan
        yield metric, Family(np.where(missing_RS, np.nan, scores_RS), metric, 0.01, resampled)


def pairs(family: Family) -> Iterator[tuple[int, int]]:
    rows = len(family.z_R)
    return ((i, j) for i in range(rows) for j in range(rows) if i != j)


def test_no_interval_is_impossible() -> None:
    shown = 0
    for metric, family in random_families(240):
        for row in range(len(family.z_R)):
            one = family.estimate(row)
            values = [one.mean, one.seed_se, one.example_se, one.low, one.high]
            assert all(value is None or np.isfinite(value) for value in values)
            if one.low is not None and one.high is not None:
                shown += 1
                assert one.low <= one.mean <= one.high
                assert metric.lower is None or one.low >= metric.lower
                assert metric.upper is None or one.high <= metric.upper
        for i, j in pairs(family):
            found = family.difference(i, j)
            if found is None or found.low is None or found.high is None:
                continue
            assert np.isfinite([found.mean, found.low, found.high]).all()
            assert found.low <= found.mean <= found.high
            assert found.low >= (0 if metric is PERPLEXITY else -1 if metric is ACCURACY else -np.inf)
            assert found.high <= (1 if metric is ACCURACY else np.inf)
    assert shown > 300


def test_ranks_verdicts_and_intervals_agree() -> None:
    seen: dict[str, int] = {}
    for metric, family in random_families(240):
        order_RR = family.order()
        new = family.new
        adjusted = holm([float(p) if tested else None for p, tested in zip(new.p_N, new.tested_N, strict=True)])
        assert [p for p in adjusted if p is not None] == pytest.approx(new.adjusted_N[new.tested_N])
        for i, j in pairs(family):
            found = family.difference(i, j)
            if found is None or found.p_adjusted is None:
                assert not order_RR[i, j]
                continue
            seen[found.verdict] = seen.get(found.verdict, 0) + 1
            better = found.p_adjusted <= 0.05 and (found.mean > found.null) == metric.higher_is_better
            assert (found.verdict == "better") == better == order_RR[i, j]
            assert found.excludes(found.null) == (found.verdict in ("better", "worse"))
            back = family.difference(j, i)
            assert back is not None
            assert (back.p_value, back.more_seeds) == (found.p_value, found.more_seeds)
            assert (found.more_seeds is None) or found.verdict == "unresolved"
    assert {"better", "worse", "unresolved"} <= seen.keys()


def family_of(differences: Floats, noise: float, margin: float = 0.01, seeds: int = 5) -> Family:
    rng = np.random.default_rng(3)
    return Family(np.exp(differences[:, None] + rng.normal(0, noise, (len(differences), seeds))), PERPLEXITY, margin)


def test_equivalence_is_shown_within_the_margin_and_not_by_noise() -> None:
    def verdict(**changes: Any) -> str:
        found = family_of(np.array([1.0, 1.0, 1.0, 2.0]), **({"noise": 0.001} | changes)).difference(0, 1)
        assert found is not None
        return found.verdict

    assert verdict() == "equivalent"
    assert verdict(noise=0.05) == "unresolved"
    assert verdict(margin=0.001) == "unresolved"


def test_more_seeds_are_proposed_that_would_separate() -> None:
    """With so many seeds and the observed effect the test is significant in most cases."""
    gap, noise = 0.06, 0.03
    found = family_of(np.array([1.0, 1.0 + gap, 1.0, 1.0 + gap]), noise, seeds=2).difference(0, 1)
    assert found is not None
    assert found.verdict == "unresolved"
    assert found.more_seeds is not None
    assert 1 <= found.more_seeds <= 50
    wide = family_of(np.array([1.0, 1.0 + gap / 2, 1.0, 1.0]), noise, seeds=2).difference(0, 1)
    assert wide is not None
    assert wide.more_seeds is None or wide.more_seeds >= found.more_seeds


@pytest.mark.parametrize(("share", "bound"), [(0.0, 0), (1.0, 1)])
def test_at_a_bound_the_interval_is_that_of_the_rule_of_three(share: float, bound: int) -> None:
    replicates_RB = np.full((3, 200), share)
    scores_RS = np.full((3, 4), share)
    found = Family(scores_RS, ACCURACY, 0.01, (replicates_RB, 100)).estimate(0)
    assert found.low is not None
    assert found.high is not None
    assert (found.low, found.high)[bound] == share
    assert found.high - found.low == pytest.approx(1.96**2 / (100 + 1.96**2), rel=1e-3)  # Wilson's; 3 / 100 one-sided
    words = Family(np.zeros((3, 4)), WER, 0.01, (np.zeros((3, 200)), 100)).estimate(0)
    assert (words.low, words.high) == (0, pytest.approx(0.03, rel=0.05))


def test_a_wild_row_does_not_widen_the_intervals_of_calm_ones() -> None:
    rng = np.random.default_rng(5)
    scores_RS = rng.normal(0, 0.1, (8, 5))
    calm = Family(scores_RS, SCORE, 0.01).difference(1, 2)
    scores_RS[0] *= 100
    beside = Family(scores_RS, SCORE, 0.01).difference(1, 2)
    assert calm is not None
    assert beside is not None
    assert (beside.seed_se or 0) < 2 * (calm.seed_se or 0)  # a variance pooled over the rows would give 30 times more


def test_other_rows_lend_their_degrees_of_freedom() -> None:
    """Two seeds of two rows need t = 12.7; beside six rows that vary alike eight errors mostly are clear."""
    rng = np.random.default_rng(2)
    told = []
    for _ in range(40):
        scores_RS = rng.normal(0, 0.01, (8, 2)) + np.arange(8)[:, None] / 12
        differences = [Family(part_RS, SCORE, 0.01).difference(1, 0) for part_RS in (scores_RS[:2], scores_RS)]
        told.append([one is not None and one.verdict == "better" for one in differences])
    alone, among = np.mean(told, axis=0)
    assert alone < 0.75
    assert among > 0.8
