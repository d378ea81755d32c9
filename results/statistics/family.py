"""All pairs of the rows of one setting in one metric: differences, verdicts, ranks, and the means' intervals.

Every row informs how much seeds vary. A score on the metric's scale (``scales.py``) is row + seed + error; the error's
variance is pooled over the rows. Rows may vary differently, so the variance of a pair is the larger of the pooled one
and the pair's own, and the degrees of freedom are those of a sum of unequal variances (Box, Annals of Mathematical
Statistics 1954, https://doi.org/10.1214/aoms/1177728786; Satterthwaite, Biometrics Bulletin 1946,
https://doi.org/10.2307/3002019). The paired variance over test examples joins as Cochran and Cox (Experimental Designs,
1957, section 4.14) join two variances: their t quantiles are
weighted by variance. Holm's correction runs over all pairs of rows.

The interval of a difference is at the level of its step in Holm's correction. So it excludes "equal" exactly where the
corrected p-value is at most 0.05, and it is a 95 % interval or a wider one.

Axes: R rows, S seeds, N pairs of rows, B resamples, G levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from harness.core.formulas import Floats
from harness.core.record import MetricInfo
from results.statistics.intervals import CONFIDENCE, SIGNIFICANT, Difference, Estimate, Verdict, long_tail
from results.statistics.scales import Scale, scale_of

Ints = NDArray[np.int64]
POWER = 0.8  # with which further seeds would separate two rows
_MOST_SEEDS = 100  # more are not proposed
_Z = float(ndtri((1 + CONFIDENCE) / 2))
_Z_POWER = float(ndtri(POWER))
# -log of the levels of a test, from 1 to 1e-15. Quantiles between them are interpolated: to 1e-4, on the wide side.
_GRID = np.concatenate([np.arange(0, 3, 0.01), np.arange(3, 15, 0.02), np.linspace(15, 34.5, 200)])


@dataclass(frozen=True)
class Variance:
    """How much seeds vary: the error of one row at one seed, and the effect of a seed on all rows alike."""

    error: float
    error_freedom: float
    seed: float  # of the means over rows; holds error / R
    seed_freedom: int


def fit(z_RS: Floats) -> Variance | None:
    """Row + seed by least squares; None if no row has two seeds.

    Args:
        z_RS: on the scale, NaN where a seed is missing.
    """
    known_RS = np.isfinite(z_RS)
    kept_S = known_RS.any(axis=0)
    z_RS, known_RS = z_RS[:, kept_S], known_RS[:, kept_S]
    rows, seeds = z_RS.shape
    if known_RS.all():
        seed_S = z_RS.mean(axis=0) - z_RS.mean()
        error_RS = z_RS - z_RS.mean(axis=1, keepdims=True) - seed_S
        freedom = (rows - 1) * (seeds - 1)
    else:
        row, seed = np.nonzero(known_RS)
        design = np.zeros((len(row), rows + seeds))
        design[np.arange(len(row)), row] = 1
        design[np.arange(len(row)), rows + seed] = 1
        found, _, rank, _ = np.linalg.lstsq(design, z_RS[known_RS], rcond=None)
        seed_S = found[rows:] - found[rows:].mean()
        error_RS = np.zeros_like(z_RS)
        error_RS[known_RS] = z_RS[known_RS] - design @ found
        freedom = len(row) - int(rank)
    if seeds < 2 or freedom < 1:
        return None
    pooled = float(np.sum(error_RS**2)) / freedom
    return Variance(pooled, _freedom(error_RS, freedom), float(np.sum(seed_S**2)) / (seeds - 1), seeds - 1)


def _freedom(error_RS: Floats, freedom: int) -> float:
    """Degrees of freedom of the pooled variance where the rows' variances differ (Box 1954, theorem 3.1)."""
    rows = len(error_RS)
    if rows < 3:
        return freedom
    seeds = freedom / (rows - 1)  # less 1, and less what is missing
    total = float(np.sum(error_RS**2)) / seeds / (1 - 1 / rows)  # the sum of the rows' variances
    if total == 0:
        return freedom
    of_row_R = np.maximum((np.sum(error_RS**2, axis=1) / seeds - total / rows**2) / (1 - 2 / rows), 0)
    squares = float(np.sum(of_row_R**2))
    found = seeds * ((1 - 1 / rows) * total) ** 2 / ((1 - 2 / rows) * squares + total**2 / rows**2)
    return float(np.clip(found, 1, freedom))


class Family:
    """The pairs of some rows in one metric.

    Args:
        scores_RS: by row and seed, NaN if a seed has not finished; pairs are compared over the seeds that both have.
        metric: its scale, bounds and direction.
        margin: differences up to it are as good as none: see ``Plan.equivalence_margin``.
        resampled: each row's mean score over its seeds on resampled examples (R, B), NaN for a row that cannot be
            resampled, and the number of examples. None: no row can be resampled.
    """

    def __init__(
        self, scores_RS: Floats, metric: MetricInfo, margin: float, resampled: tuple[Floats, int] | None = None
    ) -> None:
        replicates_RB = None if resampled is None else resampled[0]
        self.examples = None if resampled is None else resampled[1]
        self.higher_is_better, self.margin = metric.higher_is_better, margin
        self.scale = _usable(scale_of(metric, self.examples), scores_RS)
        self.z_RS = self.scale.rows(scores_RS)
        self.seeds_R = np.isfinite(self.z_RS).sum(axis=1)
        self.z_R = np.nanmean(self.z_RS, axis=1)
        self.mean_R = self.scale.centre(scores_RS)
        self.variance = fit(self.z_RS)
        self.covariance_RR, self.skewness_R = _over_examples(replicates_RB, self.mean_R, self.examples, self.scale)
        self._compare(*np.triu_indices(len(scores_RS), 1))

    def _compare(self, first_N: Ints, second_N: Ints) -> None:
        self._pairs = first_N, second_N
        difference_NS = self.z_RS[first_N] - self.z_RS[second_N]
        self.n_N = np.isfinite(difference_NS).sum(axis=1)
        with np.errstate(invalid="ignore"):
            self.d_N = np.nansum(difference_NS, axis=1) / np.where(self.n_N > 0, self.n_N, np.nan)
        seed_N, self.freedom = self._seeds(difference_NS)
        variance_R = np.diag(self.covariance_RR)
        example_N = variance_R[first_N] + variance_R[second_N] - 2 * self.covariance_RR[first_N, second_N]
        example_N = np.maximum(example_N, 0)  # NaN where a row is not resampled
        self.new = _Test(self.d_N, seed_N, self.freedom, np.nan_to_num(example_N), self._e)
        self.trained = _Test(self.d_N, np.zeros(len(first_N)), 1.0, example_N, self._e)

    @property
    def _e(self) -> int:
        """Degrees of freedom of the variance over examples."""
        return max(1, (self.examples or 2) - 1)

    def _seeds(self, difference_NS: Floats) -> tuple[Floats, float]:
        """(N,) variances of the mean differences over seeds, NaN where unknown, and their degrees of freedom."""
        if self.variance is None:
            return np.full(len(difference_NS), np.nan), 1.0
        several_N = np.where(self.n_N > 1, self.n_N, np.nan)
        own_N = np.nansum((difference_NS - self.d_N[:, None]) ** 2, axis=1) / (several_N - 1)
        return np.maximum(2 * self.variance.error, own_N) / several_N, self.variance.error_freedom

    def order(self) -> NDArray[np.bool_]:
        """(R, R): whether row i is ahead of row j, for new seeds."""
        rows = len(self.z_RS)
        found = np.zeros((rows, rows), bool)
        first_wins_N = (self.d_N > 0) == self.higher_is_better
        for wins_N, ahead, behind in ((first_wins_N, *self._pairs), (~first_wins_N, *self._pairs[::-1])):
            kept_N = self.new.significant_N & wins_N
            found[ahead[kept_N], behind[kept_N]] = True
        return found

    @cached_property
    def _equal(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        margin_N = self.scale.margin(self.z_R[self._pairs[0]], self.z_R[self._pairs[1]], self.margin)
        return self.new.equivalent(margin_N), self.trained.equivalent(margin_N)

    def difference(self, one: int, other: int) -> Difference | None:
        """Row ``one`` less row ``other``, over the seeds that both have; None if they share none."""
        i, j = min(one, other), max(one, other)
        n = i * len(self.z_R) - i * (i + 1) // 2 + j - i - 1
        if not self.n_N[n]:
            return None
        d = float(self.d_N[n]) * (1 if one < other else -1)
        tested, resampled = bool(self.new.tested_N[n]), bool(self.trained.tested_N[n])
        half = self.new.half_of(n) if tested else 0.0
        z = self.z_R[one], self.z_R[other]
        mean, low, high = self.scale.difference(*z, np.array([d, d - half, d + half])).tolist()
        unit = mean if self.scale.kind == "log" else 1 / float(self.scale.slope(self.scale.inverse(sum(z) / 2)))
        return Difference(
            mean=mean,
            low=low if tested else None,
            high=high if tested else None,
            n=int(self.n_N[n]),
            seed_se=math.sqrt(self.new.seed_N[n]) * unit if tested else None,
            example_se=math.sqrt(self.trained.example_N[n]) * unit if resampled else None,
            examples=self.examples if resampled else None,
            p_value=float(self.new.p_N[n]) if tested else None,
            p_adjusted=float(self.new.adjusted_N[n]) if tested else None,
            null=self.scale.null,
            verdict=self._verdict(self.new, self._equal[0], n, d) if tested else "unresolved",
            verdict_examples=self._verdict(self.trained, self._equal[1], n, d) if resampled else None,
            more_seeds=self._more_seeds(n) if tested else None,
        )

    def _verdict(self, test: _Test, equal_N: NDArray[np.bool_], n: int, d: float) -> Verdict:
        if test.significant_N[n]:
            return "better" if (d > 0) == self.higher_is_better else "worse"
        return "equivalent" if equal_N[n] else "unresolved"

    def _more_seeds(self, n: int) -> int | None:
        """Seeds to add until the difference observed is significant with a power of 80 %; None: no number is known."""
        if self.variance is None or self.new.significant_N[n] or self._equal[0][n]:
            return None
        have, d, level = int(self.n_N[n]), abs(float(self.d_N[n])), float(self.new.level_N[n])
        example = float(self.new.example_N[n])
        for seeds in range(have + 1, _MOST_SEEDS + 1):
            seed, freedom = 2 * self.variance.error / seeds, self.freedom * (seeds - 1) / (have - 1)
            both = seed + example
            needed = _quantile(freedom, level) * seed + _quantile(self._e, level) * example
            if both > 0 and d >= needed / math.sqrt(both) + _Z_POWER * math.sqrt(both):
                return seeds - have
        return None

    def estimate(self, row: int) -> Estimate:
        """A row's mean score with its 95 % interval, from the same variances as the differences."""
        n, z, mean = int(self.seeds_R[row]), float(self.z_R[row]), float(self.mean_R[row])
        example = float(self.covariance_RR[row, row])
        known = math.isfinite(example)
        unit = float(1 / self.scale.slope(mean))
        example_se = math.sqrt(example) * unit if known else None
        examples = self.examples if known else None
        if n < 2:
            return Estimate(mean, None, None, n, None, example_se, examples)
        seed, freedom = self._seeds_of(row)
        example = example if known else 0.0
        both = seed + example
        half = 0.0
        if both > 0:
            t = _quantile(freedom, SIGNIFICANT) * seed + _quantile(self._e, SIGNIFICANT) * example
            half = t / math.sqrt(both)
        tail = long_tail(math.sqrt(seed), math.sqrt(example), float(self.skewness_R[row]))
        low, high = self.scale.inverse([z - half + min(0.0, tail), z + half + max(0.0, tail)]).tolist()
        return Estimate(mean, min(low, mean), max(high, mean), n, math.sqrt(seed) * unit, example_se, examples)

    def _seeds_of(self, row: int) -> tuple[float, float]:
        """The variance of a row's mean over seeds, and its degrees of freedom."""
        n, own = int(self.seeds_R[row]), float(np.nanvar(self.z_RS[row], ddof=1))
        if self.variance is None:
            return own / n, n - 1
        parts = self.variance.seed, self.variance.error * (1 - 1 / len(self.z_RS))
        if not sum(parts):
            return own / n, n - 1
        freedoms = self.variance.seed_freedom, self.variance.error_freedom
        freedom = sum(parts) ** 2 / sum(part**2 / f for part, f in zip(parts, freedoms, strict=True))
        return max(sum(parts), own) / n, freedom


class _Test:
    """Two-sided tests of all differences with two sources of error, corrected over those that can be tested.

    Args:
        d_N: the differences; NaN is not tested.
        seed_N: their variances over seeds; NaN is not tested.
        freedom: degrees of freedom of these variances.
        example_N: their variances over test examples; NaN is not tested.
        examples: degrees of freedom of these variances.
    """

    def __init__(self, d_N: Floats, seed_N: Floats, freedom: float, example_N: Floats, examples: int) -> None:
        self.d_N, self.seed_N, self.example_N = d_N, seed_N, example_N
        self.seed_t, self.example_t = _quantiles(freedom), _quantiles(examples)
        self.both_N = seed_N + example_N
        self.tested_N = np.isfinite(d_N) & np.isfinite(self.both_N) & ((self.both_N > 0) | (d_N == 0))
        self.p_N = self._p(np.abs(d_N))
        self.adjusted_N, self.level_N = _holm(self.p_N, self.tested_N)
        self.significant_N = self.tested_N & (self.adjusted_N <= SIGNIFICANT)

    def halves(self, seed_t: Floats, example_t: Floats) -> Floats:
        """Half widths (N,) of the intervals with these quantiles."""
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = (self.seed_N * seed_t + self.example_N * example_t) / np.sqrt(self.both_N)
        return np.where(self.both_N > 0, found, 0.0)

    def half_of(self, n: int) -> float:
        """Half of one interval, at the level of its step in Holm's correction."""
        at = np.log(self.level_N[n])
        seed_t, example_t = np.interp(-at, _GRID, self.seed_t), np.interp(-at, _GRID, self.example_t)
        return float(self.halves(seed_t, example_t)[n])

    def _p(self, size_N: Floats) -> Floats:
        """(N,) the level at which half the interval is as wide as each size; by bisection over the grid of levels."""
        low_N, high_N = np.zeros(len(size_N), int), np.full(len(size_N), len(_GRID) - 1)
        for _ in range(math.ceil(math.log2(len(_GRID)))):
            middle_N = (low_N + high_N) // 2
            wider_N = self.halves(self.seed_t[middle_N], self.example_t[middle_N]) > size_N
            low_N, high_N = np.where(wider_N, low_N, middle_N), np.where(wider_N, middle_N, high_N)
        ends = [self.halves(self.seed_t[at_N], self.example_t[at_N]) for at_N in (low_N, high_N)]
        with np.errstate(invalid="ignore", divide="ignore"):
            share_N = np.nan_to_num((size_N - ends[0]) / (ends[1] - ends[0]))
        found: Floats = np.exp(-_GRID[low_N] - np.clip(share_N, 0, 1) * (_GRID[high_N] - _GRID[low_N]))
        return np.where(self.tested_N & (self.both_N > 0), found, 1.0)

    def equivalent(self, margin_N: Floats) -> NDArray[np.bool_]:
        """Whether each difference is shown to be within the margin: two one-sided tests, with Holm's correction.

        Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 1987, https://doi.org/10.1007/BF01068419.
        """
        room_N = margin_N - np.abs(self.d_N)
        p_N = np.where(room_N > 0, self._p(np.maximum(room_N, 0)) / 2, 1.0)
        found: NDArray[np.bool_] = self.tested_N & (self.both_N > 0)
        return found & (_holm(p_N, found)[0] <= SIGNIFICANT)


def _quantiles(freedom: float) -> Floats:
    """How many standard errors a two-sided test needs, at each level of the grid."""
    found: Floats = -stdtrit(freedom, np.exp(-_GRID) / 2)
    return found


def _quantile(freedom: float, level: float) -> float:
    return float(-stdtrit(freedom, level / 2))


def _holm(p_N: Floats, tested_N: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Holm's corrected p-values (N,), and the level of each test: that of its step, or of the step that failed."""
    adjusted_N, level_N = np.ones(len(p_N)), np.full(len(p_N), SIGNIFICANT)
    order = np.flatnonzero(tested_N)[np.argsort(p_N[tested_N], kind="stable")]
    left = np.arange(len(order), 0, -1)
    adjusted = np.maximum.accumulate(np.minimum(1.0, left * p_N[order]))
    adjusted_N[order] = adjusted
    rejected = int(np.sum(adjusted <= SIGNIFICANT))
    level_N[order] = SIGNIFICANT / np.maximum(left, len(order) - rejected)
    return adjusted_N, level_N


def _usable(scale: Scale, scores_RS: Floats) -> Scale:
    """The scale, or without a logarithm where a score has none."""
    if scale.kind == "log" and not np.all(scores_RS[np.isfinite(scores_RS)] > 0):
        return Scale("identity")
    return scale


def _over_examples(
    replicates_RB: Floats | None, mean_R: Floats, examples: int | None, scale: Scale
) -> tuple[Floats, Floats]:
    """(R, R) covariances of the rows' means over test examples, NaN if not resampled, and (R,) their skewness."""
    rows = len(mean_R)
    covariance_RR, skewness_R = np.full((rows, rows), np.nan), np.zeros(rows)
    if replicates_RB is None or examples is None or examples < 2:
        return covariance_RR, skewness_R
    finite_RB = np.isfinite(replicates_RB)
    known_R = np.flatnonzero(finite_RB.any(axis=1))
    defined_B = finite_RB[known_R].all(axis=0)
    if not len(known_R) or defined_B.sum() < 2:
        return covariance_RR, skewness_R
    z_RB = scale.forward(replicates_RB[np.ix_(known_R, defined_B)])
    error_RB = z_RB - z_RB.mean(axis=1, keepdims=True)
    product_RR = error_RB @ error_RB.T / error_RB.shape[1]
    spread_R = np.sqrt(np.diag(product_RR))
    with np.errstate(invalid="ignore", divide="ignore"):
        skewness_R[known_R] = np.nan_to_num(np.mean(error_RB**3, axis=1) / spread_R**3)
    # Resampling E of E examples has (E - 1)/E of the variance.
    covariance_RR[np.ix_(known_R, known_R)] = product_RR * examples / (examples - 1)
    diagonal = known_R, known_R
    covariance_RR[diagonal] += np.where(spread_R == 0, _at_a_bound(mean_R[known_R], examples, scale), 0.0)
    return covariance_RR, skewness_R


def _at_a_bound(mean_R: Floats, examples: int, scale: Scale) -> Floats:
    """(R,) the variance over examples of rows that have the lowest or highest score on all of them, which resampling
    cannot know: that of the logit of a share with half an example on the other side; or by the rule of three."""
    lowest, highest = mean_R <= scale.lower, mean_R >= scale.upper
    if scale.kind == "logit":
        share = scale.shift / (1 + 2 * scale.shift)
        return np.where(lowest | highest, 1 / (examples * share * (1 - share)), 0.0)
    return np.where(lowest | highest, (3 / examples / _Z) ** 2, 0.0)
