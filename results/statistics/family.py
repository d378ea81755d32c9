"""All pairs of the rows of one setting in one metric: differences, verdicts, ranks, and the means' intervals.

Differences are paired by seed and by test example. How much a row varies over seeds is learnt from all rows
(``spread.py``); the variance over test examples comes from resampling them. The two are added, with the degrees of
freedom of a sum (Satterthwaite, Biometrics Bulletin 1946, https://doi.org/10.2307/3002019), and tested by Student's t.
Holm's correction runs over all pairs of rows.

The interval of a difference is at the level of its step in Holm's correction. So it excludes "equal" exactly where the
corrected p-value is at most 0.05, and it is a 95 % interval or a wider one.

Axes: R rows, S seeds, N pairs of rows, B resamples, C components of the spread.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri, stdtr, stdtrit

from harness.core.formulas import Floats
from harness.core.record import MetricInfo
from results.statistics.intervals import CONFIDENCE, SIGNIFICANT, Difference, Estimate, Verdict, long_tail
from results.statistics.scales import Scale, scale_of
from results.statistics.spread import Spread, spread_of

Ints = NDArray[np.int64]
POWER = 0.8  # with which further seeds would separate two rows
_MOST_SEEDS = 100  # more are not proposed
_Z = float(ndtri((1 + CONFIDENCE) / 2))
_BLOCK = 8  # numbers of seeds that are tried at once
_EXACT = 1e-12  # relative
_ROUNDING = 1e-13  # relative


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
        error_RS = self.z_RS - self.z_R[:, None]
        self.own_R = np.nansum(error_RS**2, axis=1) / np.maximum(self.seeds_R - 1, 1)
        self.spread = spread_of(self.z_RS)
        self.covariance_RR, self.skewness_R = _over_examples(replicates_RB, self.mean_R, self.examples, self.scale)
        self._compare(*np.triu_indices(len(scores_RS), 1))

    def _compare(self, first_N: Ints, second_N: Ints) -> None:
        self._pairs = first_N, second_N
        difference_NS = self.z_RS[first_N] - self.z_RS[second_N]
        self.n_N = np.isfinite(difference_NS).sum(axis=1)
        with np.errstate(invalid="ignore"):
            self.d_N = np.nansum(difference_NS, axis=1) / np.where(self.n_N > 0, self.n_N, np.nan)
        variance_R = np.diag(self.covariance_RR)
        example_N = variance_R[first_N] + variance_R[second_N] - 2 * self.covariance_RR[first_N, second_N]
        example_N = np.maximum(example_N, 0)  # NaN where a row is not resampled
        self.seeds = self._seeds(difference_NS)
        self.new = _Test(self.d_N, self.seeds, np.nan_to_num(example_N), self._e)
        none = Errors(np.ones(1), np.zeros((1, len(first_N))), np.ones((1, len(first_N))))
        self.trained = _Test(self.d_N, none, example_N, self._e)

    @property
    def _bounds(self) -> tuple[float, float]:
        return self.scale.lower, self.scale.upper

    @cached_property
    def _e(self) -> int:
        """Degrees of freedom of the variance over examples."""
        return max(1, (self.examples or 2) - 1)

    def _seeds(self, difference_NS: Floats) -> Errors:
        """The variances of the mean differences over seeds; NaN where unknown."""
        several_N = np.where(self.n_N > 1, self.n_N, np.nan)
        first_N, second_N = self._pairs
        if self.spread is None or len(self.z_R) < 3:  # two rows tell no more than their differences do
            with np.errstate(invalid="ignore"):
                own_N = np.nansum((difference_NS - self.d_N[:, None]) ** 2, axis=1) / (several_N - 1)
            return Errors(np.ones(1), (own_N / several_N)[None], np.maximum(self.n_N - 1, 1)[None].astype(float))
        return of_pairs(self.spread, first_N, second_N, several_N)

    @property
    def pairs(self) -> int:
        """How many pairs of rows are tested."""
        return int(self.new.tested_N.sum())

    @property
    def undecided(self) -> tuple[int, int]:
        """How many pairs are not separated, and how many of all pairs are shown to be equal, neither being both."""
        equal_N = self._equal[0] & ~self.new.significant_N
        return int((self.new.tested_N & ~self.new.significant_N & ~equal_N).sum()), int(equal_N.sum())

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
        half = self.new.half(n) if tested else 0.0
        z = self.z_R[one], self.z_R[other]
        mean, low, high = self.scale.difference(*z, np.array([d, d - half, d + half])).tolist()
        unit = mean if self.scale.kind == "log" else 1 / float(self.scale.slope(self.scale.inverse(sum(z) / 2)))
        return Difference(
            mean=mean,
            low=low if tested else None,
            high=high if tested else None,
            n=int(self.n_N[n]),
            seed_se=math.sqrt(self.seeds.typical[n]) * unit if tested else None,
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
        if self.new.significant_N[n] or self._equal[0][n]:
            return None
        have, size = int(self.n_N[n]), abs(float(self.d_N[n]))
        seed, example = float(self.seeds.typical[n]) * have, float(self.new.example_N[n])
        freedom, level = float(self.seeds.freedom[n]), float(self.new.level_N[n])
        seeds_K = np.arange(have + 1, _MOST_SEEDS + 1)
        both_K = seed / seeds_K + example
        if not both_K.all():
            return None
        # Student's quantiles take long. They are above the normal ones, so no fewer seeds than those can be enough.
        least = -float(ndtri(level / 2)) - float(ndtri(1 - POWER))
        possible_K = size >= least * np.sqrt(both_K) * (1 - _EXACT)
        seeds_K, both_K = seeds_K[possible_K], both_K[possible_K]
        for start in range(0, len(seeds_K), _BLOCK):
            some_K, both = seeds_K[start : start + _BLOCK], both_K[start : start + _BLOCK]
            share_K = seed / some_K / both  # of the seeds in the variance
            joint_K = 1 / (share_K**2 * (have - 1) / (freedom * (some_K - 1)) + (1 - share_K) ** 2 / self._e)
            joint_K = np.maximum(joint_K, 1.0)
            needed_K = -stdtrit(joint_K, level / 2) - stdtrit(joint_K, 1 - POWER)
            enough_K = size >= needed_K * np.sqrt(both)
            if enough_K.any():
                return int(some_K[enough_K][0]) - have
        return None

    def estimate(self, row: int) -> Estimate:
        """A row's mean score with its 95 % interval, from the same variances as the differences."""
        n, z, mean = int(self.seeds_R[row]), float(self.z_R[row]), float(self.mean_R[row])
        example = float(self.covariance_RR[row, row])
        known = math.isfinite(example)
        unit = float(1 / self.scale.slope(mean))
        example_se = math.sqrt(example) * unit if known else None
        examples = self.examples if known else None
        if n < 2 or self.spread is None:
            return Estimate(mean, None, None, n, None, example_se, examples)
        example = example if known else 0.0
        errors = self._of_row(row, self.spread)
        seeds_C = errors.variance_CN[:, 0]
        joint_C = _joint(seeds_C, errors.freedom_CN[:, 0], np.full_like(seeds_C, example), self._e)
        half = _half(errors.weight_C, seeds_C + example, joint_C, SIGNIFICANT)
        seed = float(errors.typical[0])
        tail = long_tail(math.sqrt(seed), math.sqrt(example), float(self.skewness_R[row]))
        low, high = self.scale.inverse([z - half + min(0.0, tail), z + half + max(0.0, tail)]).tolist()
        if known and self.examples and not seed and self.scale.kind == "logit" and mean in self._bounds:
            # All examples alike with all seeds: Wilson's interval (JASA 1927) of a share of 0 or 1.
            reach = _Z**2 / (self.examples + _Z**2) * (self.scale.upper - self.scale.lower)
            low, high = (mean, mean + reach) if mean == self.scale.lower else (mean - reach, mean)
        return Estimate(mean, min(low, mean), max(high, mean), n, math.sqrt(seed) * unit, example_se, examples)

    def _of_row(self, row: int, spread: Spread) -> Errors:
        """The variance of a row's mean over seeds: its own errors', and that of the seeds' effects."""
        n = int(self.seeds_R[row])
        own = float(self.own_R[row])
        if len(self.z_R) < 3:
            return Errors(np.ones(1), np.full((1, 1), own / n), np.full((1, 1), float(n - 1)))
        error_C, freedom_C = spread.variance_CR[:, row], spread.freedom_CR[:, row]
        both_C = error_C + spread.seed
        squares_C = error_C**2 / freedom_C + spread.seed**2 / spread.seed_freedom
        with np.errstate(invalid="ignore", divide="ignore"):
            joint_C = np.where(both_C > 0, both_C**2 / squares_C, 1.0)
        return Errors(spread.weight_C, np.maximum(both_C, own)[:, None] / n, joint_C[:, None])


class Errors:
    """Variances of some means or differences over seeds: (C, N), with degrees of freedom and weights (C,)."""

    def __init__(self, weight_C: Floats, variance_CN: Floats, freedom_CN: Floats) -> None:
        self.weight_C, self.variance_CN, self.freedom_CN = weight_C, variance_CN, freedom_CN

    @cached_property
    def typical(self) -> Floats:
        """(N,) the variances, averaged geometrically: an unlikely wild component counts little."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Floats = np.exp(self.weight_C @ np.log(self.variance_CN))
        return found

    @cached_property
    def freedom(self) -> Floats:
        """(N,) degrees of freedom that say how well the variances are known."""
        with np.errstate(divide="ignore", invalid="ignore"):
            log_CN = np.log(self.variance_CN / self.typical)
        uncertain_N = self.weight_C @ (np.where(np.isfinite(log_CN), log_CN, 0.0) ** 2 + 2 / self.freedom_CN)
        found: Floats = 2 / uncertain_N
        return found


def of_pairs(spread: Spread, first_N: Ints, second_N: Ints, seeds_N: Floats) -> Errors:
    """The variances of differences between the means of pairs of rows over ``seeds_N`` seeds; NaN where NaN."""
    one_CN, other_CN = spread.variance_CR[:, first_N], spread.variance_CR[:, second_N]
    variance_CN = one_CN + other_CN
    squares_CN = one_CN**2 / spread.freedom_CR[:, first_N] + other_CN**2 / spread.freedom_CR[:, second_N]
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom_CN = np.where(variance_CN > 0, variance_CN**2 / squares_CN, 1.0)
    return Errors(spread.weight_C, variance_CN / seeds_N, freedom_CN)


class _Test:
    """Two-sided tests of all differences with two sources of error, corrected over those that can be tested.

    Args:
        d_N: the differences; NaN is not tested.
        seeds: their variances over seeds; NaN is not tested.
        example_N: their variances over test examples; NaN is not tested.
        examples: degrees of freedom of these variances.
    """

    def __init__(self, d_N: Floats, seeds: Errors, example_N: Floats, examples: int) -> None:
        self.d_N, self.example_N, self.weight_C = d_N, example_N, seeds.weight_C
        self.both_CN = seeds.variance_CN + example_N
        self.freedom_CN = _joint(seeds.variance_CN, seeds.freedom_CN, example_N, examples)
        self.error_N = np.sqrt(self.weight_C @ self.both_CN)
        self.tested_N = np.isfinite(d_N) & np.isfinite(self.error_N) & ((self.error_N > 0) | (d_N == 0))
        self.p_N = self._p(np.abs(d_N), self.tested_N & (self.error_N > 0))
        self.adjusted_N, self.level_N = _holm(self.p_N, self.tested_N)
        self.significant_N = self.tested_N & (self.adjusted_N <= SIGNIFICANT)

    def _p(self, size_N: Floats, kept_N: NDArray[np.bool_]) -> Floats:
        """(N,) how probable errors of each size or more are, in either direction; 1 where it is not asked for."""
        found = np.ones(len(size_N))
        with np.errstate(divide="ignore"):  # a component without variance
            tails_CK = 2 * stdtr(self.freedom_CN[:, kept_N], -size_N[kept_N] / np.sqrt(self.both_CN[:, kept_N]))
        found[kept_N] = np.minimum(self.weight_C @ tails_CK, 1.0)
        return found

    def half(self, n: int) -> float:
        """Half of one interval, at the level of its step in Holm's correction."""
        return _half(self.weight_C, self.both_CN[:, n], self.freedom_CN[:, n], float(self.level_N[n]))

    def equivalent(self, margin_N: Floats) -> NDArray[np.bool_]:
        """Whether each difference is shown to be within the margin: two one-sided tests, with Holm's correction.

        Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 1987, https://doi.org/10.1007/BF01068419.
        """
        room_N = margin_N - np.abs(self.d_N)
        kept_N: NDArray[np.bool_] = self.tested_N & (self.error_N > 0)
        asked_N = kept_N & (room_N > 0)
        p_N = np.where(asked_N, self._p(room_N, asked_N) / 2, 1.0)
        return asked_N & (_holm(p_N, kept_N)[0] <= SIGNIFICANT)


def _half(weight_C: Floats, variance_C: Floats, freedom_C: Floats, level: float) -> float:
    """Half of an interval: the error that is reached with the probability ``level``, in either direction."""
    root_C = np.sqrt(variance_C)
    each_C = -stdtrit(freedom_C, level / 2) * root_C  # between the components' own half widths
    low, high = float(each_C.min()), float(each_C.max())
    if high - low <= _EXACT * high:
        return high

    def excess(size: float) -> float:
        return math.log(2 * float(weight_C.dot(stdtr(freedom_C, -size / root_C))) / level)

    return float(brentq(excess, low * (1 - _EXACT), high * (1 + _EXACT), xtol=_EXACT * high, rtol=_EXACT))


def _joint(one: Floats, one_freedom: Floats, other: Floats, other_freedom: Floats | float) -> Floats:
    """Degrees of freedom of the sum of two variances (Satterthwaite 1946); 1 where both are 0."""
    squares = one**2 / one_freedom + other**2 / other_freedom
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(one + other > 0, (one + other) ** 2 / squares, 1.0)


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
    spread_R[spread_R <= _ROUNDING * np.abs(z_RB).max()] = 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        skewness_R[known_R] = np.where(spread_R > 0, np.mean(error_RB**3, axis=1) / spread_R**3, 0.0)
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
