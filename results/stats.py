"""Means, intervals and ranks over seeds.

Which randomness an interval covers: that of the **seed**, i.e. adapter initialisation, the data subset drawn and its
order. Every seed is scored on the same test examples, so the sampling of the test set is *not* covered. No correction
for multiple comparisons is made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds and its 95 % interval; one seed has no interval (None, never a width of 0)."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and the value lies outside it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


def t_quantile(n: int) -> float:
    """Half width of the interval in standard errors: Student's t with n - 1 degrees of freedom."""
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """Mean of one value per seed and its t interval; None for no value.

    Covers the seed's randomness, not the sampling of the test set.
    """
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None, 1)
    half = t_quantile(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """Mean of ``values[seed] - reference[seed]`` over the seeds both have, with its t interval.

    What a seed does to both alike (the subset it draws, the order) cancels; the interval covers what is left of the
    seed's randomness, not the sampling of the test set. None where no seed is shared.
    """
    return over_seeds([values[seed] - reference[seed] for seed in values if seed in reference])


def rank_ranges(estimates: Sequence[Estimate], higher_is_better: bool) -> list[tuple[int, int]]:
    """First and last rank each estimate may hold.

    One is ahead of another only when their intervals do not overlap; otherwise they tie. An estimate without an
    interval (one seed) ties with all. Touching intervals overlap.
    """

    def ahead(a: Estimate, b: Estimate) -> bool:
        if a.low is None or a.high is None or b.low is None or b.high is None:
            return False
        return a.low > b.high if higher_is_better else a.high < b.low

    count = len(estimates)
    return [
        (1 + sum(ahead(other, one) for other in estimates), count - sum(ahead(one, other) for other in estimates))
        for one in estimates
    ]
