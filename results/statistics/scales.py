"""The scale on which scores of a metric are compared, and the way back to numbers that people read.

Perplexities differ by factors, so they are compared by their logarithms: a mean over seeds is a geometric mean, and a
difference is shown as a ratio. Scores between two bounds (accuracies, BLEU) are compared by their logits, on which an
interval cannot leave the bounds; their means and differences are shown as they are. All other scores are compared as
they are, and an interval ends at a bound where there is one.

Axes: R rows, S seeds. ``z`` is a value on the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from harness.core.formulas import Floats
from harness.core.record import MetricInfo

_LARGEST = float(np.finfo(float).max)
_LARGEST_LOG = math.log(_LARGEST) * (1 - 1e-15)
_EXAMPLES = 1000  # assumed where the number of test examples is not known


@dataclass(frozen=True)
class Scale:
    """One metric's scale.

    Args:
        kind: ``log``, ``logit`` or ``identity``.
        lower: no score is below.
        upper: no score is above.
        shift: on the logit scale a share p is taken as (p + shift) / (1 + 2 shift), so that 0 and 1 are finite: with
            1 / (2 n) for n examples this adds half an example to both sides (Haldane, Annals of Human Genetics 1956).
    """

    kind: str
    lower: float = -_LARGEST
    upper: float = _LARGEST
    shift: float = 0.0

    @property
    def null(self) -> float:
        """A difference that means "equal", as it is shown: the ratio 1, else 0."""
        return 1.0 if self.kind == "log" else 0.0

    def forward(self, scores: ArrayLike) -> Floats:
        """Scores on the scale."""
        x = np.asarray(scores, float)
        if self.kind == "log":
            logarithm: Floats = np.log(x)
            return logarithm
        if self.kind == "identity":
            return x
        share = np.clip(self._shifted(x), self.shift / 2, 1 - self.shift / 2)
        found: Floats = np.log(share) - np.log1p(-share)
        return found

    def inverse(self, z: ArrayLike) -> Floats:
        """Scores of values on the scale, never outside the bounds."""
        z = np.asarray(z, float)
        if self.kind == "log":
            x = np.exp(np.minimum(z, _LARGEST_LOG))
        elif self.kind == "identity":
            x = z
        else:
            share = 1 / (1 + np.exp(-np.clip(z, -700, 700)))
            x = self.lower + (self.upper - self.lower) * (share * (1 + 2 * self.shift) - self.shift)
        found: Floats = np.clip(x, self.lower, self.upper)
        return found

    def slope(self, scores: ArrayLike) -> Floats:
        """Change of z with the score, at the scores."""
        x = np.asarray(scores, float)
        if self.kind == "log":
            return 1 / x
        if self.kind == "identity":
            return np.ones_like(x)
        share = np.clip(self._shifted(x), self.shift / 2, 1 - self.shift / 2)
        found: Floats = 1 / (share * (1 - share)) / (1 + 2 * self.shift) / (self.upper - self.lower)
        return found

    def _shifted(self, x: Floats) -> Floats:
        return ((x - self.lower) / (self.upper - self.lower) + self.shift) / (1 + 2 * self.shift)

    def centre(self, scores: ArrayLike) -> Floats:
        """Mean over the last axis, of what is not NaN: geometric on the log scale."""
        x = np.asarray(scores, float)
        if self.kind == "log":
            geometric: Floats = np.exp(np.nanmean(np.log(x), axis=-1))
            return geometric
        found: Floats = np.nanmean(x, axis=-1)
        return found

    def rows(self, scores_RS: Floats) -> Floats:
        """(R, S) scores on the scale, such that a row's mean over seeds is the scale's value of its mean score.

        The logit is linear around the row's mean: the mean over seeds stays the mean of the scores, and a seed at 0 or
        1 has no weight of its own.
        """
        if self.kind != "logit":
            return self.forward(scores_RS)
        mean_R1 = self.centre(scores_RS)[:, None]
        found: Floats = self.forward(mean_R1) + (scores_RS - mean_R1) * self.slope(mean_R1)
        return found

    def difference(self, one: Floats, other: Floats, change: ArrayLike) -> Floats:
        """What a difference ``change`` on the scale, between two means around those given, is as it is shown.

        A ratio on the log scale; else a difference of scores, increasing in ``change`` and 0 at 0.

        Args:
            one: (…,) the mean of one, on the scale.
            other: (…,) that of the other.
            change: (…,) one - other on the scale, or an end of its interval.
        """
        change = np.asarray(change, float)
        if self.kind == "log":
            ratio: Floats = np.exp(np.clip(change, -_LARGEST_LOG, _LARGEST_LOG))
            return ratio
        if self.kind == "identity":
            return np.asarray(np.clip(change, self.lower - self.upper, self.upper - self.lower), float)
        middle = (one + other) / 2
        return self._free(middle + change / 2) - self._free(middle - change / 2)

    def _free(self, z: Floats) -> Floats:
        share = 1 / (1 + np.exp(-np.clip(z, -700, 700)))
        part = np.clip(share * (1 + 2 * self.shift) - self.shift, 0, 1)
        found: Floats = self.lower + (self.upper - self.lower) * part
        return found

    def margin(self, one: Floats, other: Floats, margin: float) -> Floats:
        """How far two means around those given may differ on the scale to be as good as equal.

        Args:
            one: (…,) the mean of one, on the scale.
            other: (…,) that of the other.
            margin: relative on the log scale, else a difference of scores.
        """
        middle = (one + other) / 2
        if self.kind == "log":
            return np.full_like(middle, math.log1p(margin))
        if self.kind == "identity":
            return np.full_like(middle, margin)
        # expit(m + h) - expit(m - h) = sinh h / (cosh m + cosh h), solved for h.
        c = min(margin / (self.upper - self.lower) / (1 + 2 * self.shift), 1 - 1e-9)
        cosh = np.cosh(np.clip(middle, -300, 300))
        found: Floats = 2 * np.log((c * cosh + np.sqrt(c * c * cosh * cosh + 1 - c * c)) / (1 - c))
        return found


def scale_of(metric: MetricInfo, examples: int | None = None) -> Scale:
    """The scale of a metric.

    Args:
        metric: the metric.
        examples: number of test examples.
    """
    lower = -_LARGEST if metric.lower is None else metric.lower
    upper = _LARGEST if metric.upper is None else metric.upper
    kind = metric.scale if metric.scale != "logit" or upper - lower < _LARGEST else "identity"
    return Scale(kind, lower, upper, 1 / (2 * (examples or _EXAMPLES)) if kind == "logit" else 0.0)
