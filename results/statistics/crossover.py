"""The budget from which on full fine-tuning stays ahead of a method (the crossover), with its interval.

The crossover is where the difference from the reference changes sign for the last time, interpolated linearly over the
logarithm of the budget. Its interval reaches from the last budget at which the method is shown to be ahead to the first
from which on the reference is shown to be ahead up to the end, both by the 95 % interval of the (interpolated)
difference. Where the reference is truly level, the chance that the method is shown to be ahead is 2.5 %, and so is the
chance of the opposite: that is how the interval comes to 95 % (simulated in
tests/results/statistics/test_crossover.py).
Percentiles of redrawn curves covered as little as 63 % there: noise alone shifts the last of several near-crossings up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from harness.core.formulas import Floats
from results.statistics.intervals import half_width


@dataclass(frozen=True)
class Gap:
    """How far the reference is ahead of a method at each budget (K, smallest first), with the errors of these gaps."""

    budgets: tuple[float, ...]
    ahead_K: Floats
    seeds: int
    # Covariances of the means between budgets, which share their seeds and test examples. None with one seed, and
    # where the scores cannot be resampled over examples.
    seeds_KK: Floats | None = None
    examples_KK: Floats | None = None
    examples: int = 2

    def at(self, k: int, share: float) -> tuple[float, float]:
        """The gap and half of its 95 % interval, ``share`` of the logarithmic distance from budget k to the next."""
        end = min(k + 1, len(self.budgets) - 1)
        weights = np.array([1 - share, share])

        def error(covariance_KK: Floats | None) -> float:
            if covariance_KK is None:
                return 0.0
            return math.sqrt(max(0.0, weights @ covariance_KK[np.ix_((k, end), (k, end))] @ weights))

        half = half_width(error(self.seeds_KK), self.seeds, error(self.examples_KK), self.examples)
        return float(weights @ self.ahead_K[[k, end]]), half

    @property
    def covers(self) -> str:
        """Which randomness the interval covers: as ``Estimate.covers``; empty without an interval."""
        if self.seeds_KK is None:
            return ""
        return "seeds" if self.examples_KK is None else "seeds and test examples"


def locate(gap: Gap) -> tuple[float, float | None, float | None]:
    """The crossover and its 95 % interval; -inf and inf: below and beyond the sweep; None: one seed, no interval."""
    at = _last_where(gap, 0)
    if gap.seeds_KK is None:
        return at, None, None
    return at, _last_where(gap, 1), _last_where(gap, -1)


def _last_where(gap: Gap, halves: int) -> float:
    """The largest budget up to which the gap plus this many half intervals is at most 0."""

    def edge(k: int, share: float = 0.0) -> float:
        ahead, half = gap.at(k, share)
        return ahead + halves * half

    last = max((k for k in range(len(gap.budgets)) if edge(k) <= 0), default=None)
    if last is None:
        return -math.inf
    if last == len(gap.budgets) - 1:
        return math.inf
    share = brentq(lambda share: edge(last, share), 0.0, 1.0)
    return float(gap.budgets[last] ** (1 - share) * gap.budgets[last + 1] ** share)
