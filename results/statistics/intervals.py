"""Means with their intervals, p-values of single differences, Holm's correction, ranks.

A score varies for two reasons: the **seed** (adapter initialisation, data subset, order) and the **test examples** that
happen to be in the split. Intervals here cover both if the columns of the examples reproduce the recorded score;
otherwise they cover only the seed, and say so. Nothing covers what never varied: an interval of width 0 means that all
seeds and examples agree. The rows of a leaderboard are compared in ``family.py``, where they inform each other.

Seeds are few, so a bootstrap over them is far too narrow: over three seeds, or over seeds and examples, it covers 75 %
instead of the nominal 95 %. Seeds therefore enter by Student's t, examples by resampling, with the same resamples for
every trial so that all comparisons are paired by example. Both are combined as Cochran and Cox combine two variances of
unequal degrees of freedom (Experimental Designs, 1957, section 4.14), and the interval is extended on the side of a
long tail (``long_tail``). Simulated with 3, 5 and 10 seeds and 100 examples
(tests/results/statistics/test_interval_coverage.py) these intervals cover 94 to 98 %, for normal, lognormal and 0/1
scores, ratios and BLEU, and 99.5 % where a score varies by seed only *within* each example: that variance is in both
sources and counts twice, which is conservative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtr, stdtrit

from harness.core.formulas import Floats

CONFIDENCE = 0.95
RESAMPLES = 1000  # of the test examples: a standard error to about 2 %
SIGNIFICANT = 1 - CONFIDENCE
_Z = float(ndtri((1 + CONFIDENCE) / 2))
_LARGEST_LOG = math.log(float(np.finfo(float).max)) * (1 - 1e-15)
_EQUAL = 1e-9  # relative: differences that are equal up to rounding


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and its 95 % interval; one seed has no interval (None, never a width of 0)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    seed_se: float | None = None  # standard error of the mean over seeds
    example_se: float | None = None  # standard error over test examples; None: the interval does not cover them
    examples: int | None = None  # how many test examples

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and the value lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high

    @property
    def covers(self) -> str:
        """Which randomness the interval covers; empty without an interval."""
        if self.low is None:
            return ""
        return "seeds" if self.example_se is None else "seeds and test examples"


# "unresolved": neither a difference nor equivalence is shown.
Verdict = Literal["better", "worse", "equivalent", "unresolved"]


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference: a ratio on the log scale, else a difference of scores.

    The interval is at the level of its step in the correction: it excludes ``null`` where ``p_adjusted`` is at most
    0.05.
    """

    p_value: float | None = None  # uncorrected
    p_adjusted: float | None = None  # corrected over the family it is shown in; None: not tested, as with one seed
    null: float = 0.0  # what "equal" is: 1 for a ratio
    verdict: Verdict = "unresolved"  # for models trained with new seeds
    verdict_examples: Verdict | None = None  # for these trained models, on new test examples; None: not resampled
    more_seeds: int | None = None  # seeds that would probably separate the two; None if separated, or not known

    @property
    def significant(self) -> bool:
        """Whether it is significant after the correction for the family."""
        return self.p_adjusted is not None and self.p_adjusted <= SIGNIFICANT


@lru_cache(maxsize=64)
def t_quantile(n: int) -> float:
    """Half width of the interval in standard errors: Student's t with n - 1 degrees of freedom."""
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))


def estimate(
    scores_S: Sequence[float], replicates_B: Floats | None = None, examples: int | None = None
) -> Estimate | None:
    """Mean of one score per seed with its interval; None without any score.

    Args:
        scores_S: a score for each seed.
        replicates_B: the mean over seeds on resampled test examples; None if the score cannot be resampled: the
            interval then covers only the randomness of the seed.
        examples: number of test examples that were resampled.
    """
    if not len(scores_S):
        return None
    n, mean = len(scores_S), math.fsum(scores_S) / len(scores_S)
    example_se, skewness = None, 0.0
    if replicates_B is not None and examples is not None and examples > 1:
        example_se, skewness = _spread(replicates_B, examples)
    if example_se is None:
        examples = None
    if n == 1:
        return Estimate(mean, None, None, 1, None, example_se, examples)
    # Plain Python, not numpy: a report has tens of thousands of means over a few seeds.
    seed_se = math.sqrt(math.fsum((score - mean) ** 2 for score in scores_S) / (n - 1) / n)
    half, tail = (
        half_width(seed_se, n, example_se or 0.0, examples or 2),
        long_tail(seed_se, example_se or 0.0, skewness),
    )
    low, high = mean - half + min(0.0, tail), mean + half + max(0.0, tail)
    return Estimate(mean, low, high, n, seed_se, example_se, examples)


def estimate_positive(scores_S: Sequence[float]) -> Estimate | None:
    """Mean of positive numbers, such as ratios, times and bytes, with an interval that stays positive.

    Student's interval of the logarithm, around the logarithm of the mean. A number that is not positive has none: the
    interval is then that of the numbers, and ends at 0.
    """
    found = estimate(scores_S)
    if found is None or found.low is None or found.high is None:
        return found
    if min(scores_S) <= 0:
        return replace(found, low=min(max(found.low, 0.0), found.mean))
    half = (found.high - found.mean) / found.mean
    low, high = found.mean * math.exp(-half), found.mean * math.exp(min(half, _LARGEST_LOG - math.log(found.mean)))
    return replace(found, low=low, high=high)


def _spread(replicates_B: Floats, examples: int) -> tuple[float | None, float]:
    """Standard error and skewness of a score over test examples; (None, 0) if undefined on nearly all resamples."""
    replicates_B = replicates_B[np.isfinite(replicates_B)]
    if len(replicates_B) < 2:
        return None, 0.0
    errors_B = replicates_B - replicates_B.mean()
    variance = float(errors_B @ errors_B) / len(errors_B)
    if variance == 0:
        return 0.0, 0.0
    skewness = float(errors_B**2 @ errors_B) / len(errors_B) / variance**1.5
    # Resampling E of E examples has (E - 1)/E of the variance.
    return math.sqrt(variance * examples / (examples - 1)), skewness


def half_width(seed_se: float, n: int, example_se: float, examples: int) -> float:
    """Half of the 95 % interval of a mean with two sources of error: t quantiles weighted by variance."""
    variance = seed_se**2 + example_se**2
    if variance == 0:
        return 0.0
    return (seed_se**2 * t_quantile(n) + example_se**2 * t_quantile(examples)) / math.sqrt(variance)


def long_tail(seed_se: float, example_se: float, skewness: float) -> float:
    """By how much the skewness of the examples extends the interval on one side (above if positive).

    The t interval of a skewed mean misses on the side of the long tail, by (2 z² + 1)/6 × its skewness standard errors
    to first order (Johnson, Modified t tests and confidence intervals for asymmetrical populations, JASA 73, 1978;
    Hall, On the removal of skewness by transformation, JRSS B 54, 1992). They also shorten the other side; here it is
    kept, because the skewness of few examples is underestimated.

    Args:
        seed_se: standard error of the mean over seeds.
        example_se: standard error of the mean over examples.
        skewness: skewness of the mean over resampled examples.
    """
    variance = seed_se**2 + example_se**2
    return (2 * _Z**2 + 1) / 6 * skewness * example_se**3 / variance if variance > 0 else 0.0


@lru_cache(maxsize=16)
def resample_weights(examples: int) -> NDArray[np.float32]:
    """(B, E): how often each example is drawn in each resample; the same for all trials with this many examples."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, examples, (RESAMPLES, examples))
    return np.stack([np.bincount(draw, minlength=examples) for draw in draws]).astype(np.float32)


def p_value(mean: float, seed_se: float | None, n: int) -> float | None:
    """Two-sided p-value of a mean difference over ``n`` seeds by Student's t; None for one seed."""
    if n < 2 or seed_se is None:
        return None
    if seed_se == 0:
        return float(mean == 0)
    return float(2 * stdtr(n - 1, -abs(mean) / seed_se))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment: rejecting at ≤ 0.05 keeps the chance of any false rejection at 5 % or below.

    None (no test) is not part of the family. Holm 1979, https://www.jstor.org/stable/4615733.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for place, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - place) * p))
        adjusted[i] = highest
    return adjusted


def rank_ranges(ahead_RR: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Best and worst possible rank of each row: behind all rows ahead of it, before all rows it is ahead of."""
    rows = len(ahead_RR)
    return [(1 + int(ahead_RR[:, i].sum()), rows - int(ahead_RR[i].sum())) for i in range(rows)]


def interquartile_mean(scores: Sequence[float]) -> float:
    """Mean of the middle half of the scores (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264).

    Each score is 1/n of the whole, and the part between the quartiles counts. If n is not a multiple of four, the
    outermost scores of the middle half count partly: for two scores this is their mean; of three the middle one has a
    weight of 2/3 and the others 1/6 each.

    Raises:
        ValueError: there are no scores.
    """
    if not len(scores):
        raise ValueError("the interquartile mean needs at least one score")
    n = len(scores)
    place = np.arange(n)
    inside = np.minimum(place + 1, 0.75 * n) - np.maximum(place, 0.25 * n)
    return float(np.average(np.sort(scores), weights=np.maximum(inside, 0)))
