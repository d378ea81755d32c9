"""How much each row varies over seeds, with what the other rows say about it.

A score on its scale is row + seed + error. The variance of a row's errors is drawn from a scaled inverse chi-square
distribution, common to the rows: with few degrees of freedom rows may differ much, with many they are alike (Smyth,
Statistical Applications in Genetics and Molecular Biology 2004, https://doi.org/10.2202/1544-6115.1027). Neither its
freedom nor its scale is known, and few rows do not tell: an estimate of them, as in limma, errs. So both are integrated
over: every combination is one component, weighted by its likelihood. A test is the mean of the components' tests.

Axes: R rows, S seeds, C components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from harness.core.formulas import Floats

# Degrees of freedom of the common distribution. With 32 standard deviations differ by an eighth; with less than 1 a
# single row may be ten times wilder than the others, which two seeds often do not show. Before any row is seen a
# component has a weight of 1 / freedom: with equal weights 9 % of families with such a row err instead of 5 %.
_FREEDOM = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
_WEIGHT = 1 / _FREEDOM
# Errors that are not normal say less on their variance than their number, and many seeds do not make them normal: with
# exponential errors and spreads up to e², 9 % of families of 8 rows and 12 % of 40 rows err with ten seeds where own
# degrees of freedom f count as 0.75 f. They count as 0.9 / (1 / f + 1 / 6). Calibrated by
# results/statistics/simulation.py.
_INFORMATION, _MOST_FREEDOM = 0.9, 6.0
_SCALES = np.linspace(-5, 5, 21)  # logarithms, around the mean variance
_LEAST = 1e-4  # components of less weight are left out
_ROUNDS = 12
_ROUNDING = 1e-13  # relative


@dataclass(frozen=True)
class Spread:
    """Variances of one score of each row, their degrees of freedom, and the weight of each component.

    ``seed`` is the variance of the seeds' effects, which all rows share, with ``seed_freedom``; it includes the error
    with which the effects are known.
    """

    weight_C: Floats
    variance_CR: Floats
    freedom_CR: Floats
    seed: float
    seed_freedom: int


def spread_of(z_RS: Floats) -> Spread | None:
    """The spread of some rows; None if no row has two seeds.

    Args:
        z_RS: scores on the scale, NaN where a seed is missing.
    """
    known_RS = np.isfinite(z_RS)
    kept_S = known_RS.sum(axis=0) > 0
    z_RS, known_RS = z_RS[:, kept_S], known_RS[:, kept_S]
    rows, seeds = z_RS.shape
    if seeds < 2 or known_RS.sum(axis=1).max() < 2:
        return None
    own_R, freedom_R, seed_S = _rows(z_RS, known_RS)
    seed = float(np.sum((seed_S - seed_S.mean()) ** 2)) / (seeds - 1)
    if rows < 3 or not own_R.max() > 0:  # nothing to learn from other rows, or nothing varies
        return Spread(np.ones(1), own_R[None], np.maximum(freedom_R, 1e-9)[None], seed, seeds - 1)
    return _mixture(own_R, freedom_R, seed, seeds - 1)


def _rows(z_RS: Floats, known_RS: Floats) -> tuple[Floats, Floats, Floats]:
    """Each row's own variance and degrees of freedom, and the effects of the seeds; by weighted least squares.

    A row that varies much says little about the seeds, and is weighted less.
    """
    z_RS = np.where(known_RS, z_RS, 0.0)
    count_R = known_RS.sum(axis=1)
    weight_R, seed_S = np.ones(len(z_RS)), np.zeros(z_RS.shape[1])
    variance_R, freedom_R = weight_R, weight_R
    for _ in range(_ROUNDS):
        mean_R1 = np.sum((z_RS - seed_S) * known_RS, axis=1, keepdims=True) / count_R[:, None]
        share_RS = weight_R[:, None] * known_RS
        share_RS = share_RS / share_RS.sum(axis=0)
        seed_S = np.sum(share_RS * (z_RS - mean_R1), axis=0)
        seed_S = seed_S - seed_S.mean()
        mean_R1 = np.sum((z_RS - seed_S) * known_RS, axis=1, keepdims=True) / count_R[:, None]
        error_RS = (z_RS - seed_S - mean_R1) * known_RS
        error_RS[np.abs(error_RS) < _ROUNDING * np.abs(z_RS).max()] = 0.0
        left_R = np.maximum(1 - np.sum(share_RS * known_RS, axis=1) / count_R, 0.25)
        freedom_R = (count_R - 1) * left_R
        sums_R = np.sum(error_RS**2, axis=1)
        variance_R = sums_R / np.maximum(freedom_R, 1e-9)
        middle = float(np.median(variance_R[count_R > 1]))
        smooth_R = (variance_R * (count_R - 1) + 2 * middle) / (count_R + 1)
        most = float(smooth_R.max())
        weight_R = most / np.maximum(smooth_R, 1e-12 * most) if most > 0 else np.ones(len(z_RS))
    return np.where(count_R > 1, variance_R, 0.0), freedom_R, seed_S


def _mixture(own_R: Floats, freedom_R: Floats, seed: float, seed_freedom: int) -> Spread:
    known_R = freedom_R > 0
    mean = float(own_R[known_R].mean())
    own_R = np.where(known_R, np.maximum(own_R, 1e-9 * mean), mean)
    prior_C = np.repeat(_FREEDOM, len(_SCALES))
    scale_C = mean * np.exp(np.tile(_SCALES, len(_FREEDOM)))
    d, f = prior_C[:, None], np.maximum(freedom_R, 1e-9)[None]
    ratio_CR = own_R / scale_C[:, None]
    # The density of own / scale, which is F distributed; terms of the freedom alone are constant over the components.
    likelihood_CR = (
        gammaln((f + d) / 2)
        - gammaln(d / 2)
        - f / 2 * np.log(d)
        + f / 2 * np.log(ratio_CR)
        - (f + d) / 2 * np.log1p(f / d * ratio_CR)
    )
    log_C = np.sum(np.where(known_R, likelihood_CR, 0.0), axis=1) + np.log(np.repeat(_WEIGHT, len(_SCALES)))
    weight_C = np.exp(log_C - log_C.max())
    kept_C = weight_C > _LEAST * weight_C.sum()
    weight_C, d, scale_C = weight_C[kept_C] / weight_C[kept_C].sum(), d[kept_C], scale_C[kept_C]
    # Few rows: that their variances are themselves uncertain is not all in the likelihood. Calibrated by simulation.
    few = 1 + 3 / len(own_R) ** 2
    f = _INFORMATION * f / (1 + f / _MOST_FREEDOM)
    variance_CR = few * (d * scale_C[:, None] + f * own_R) / (d + f)
    return Spread(weight_C, variance_CR, d + f, seed, seed_freedom)
