"""Corpus scores from per-example columns: sums over the examples of a split, and a formula.

Formulas depend on the examples only through these sums, so a bootstrap resample is scored from weighted sums. Shapes:
K columns on the last axis; leading axes are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from harness.core.record import MetricInfo

Floats = NDArray[np.float64]
TOLERANCE = 1e-6  # relative; if a formula differs more from the recorded score, it is not the formula of that score
# Perplexity metric → its columns in the per-example scores: nats and tokens.
PERPLEXITIES: Mapping[str, tuple[str, str]] = {
    "perplexity": ("nll", "tokens"),
    "perplexity_one_reference": ("nll_first", "tokens_first"),
    "perplexity_wrong_input": ("nll_wrong_input", "tokens"),
}
# Formula → K.
WIDTHS: Mapping[str, int] = {
    "mean": 2,  # sum of the scores, and number of examples that have one
    "ratio": 2,  # numerators and denominators
    "perplexity": 2,  # nats and tokens
    "bleu": 10,  # matching 1- to 4-grams, predicted 1- to 4-grams, predicted words, reference words
    "meteor": 6,  # matches and length of the prediction, matches and length of the reference, chunks, matched words
}


def formula(metric: MetricInfo) -> str:
    """Name of a metric's formula, a key of ``WIDTHS``."""
    return "perplexity" if base_name(metric.name) in PERPLEXITIES else metric.corpus


def base_name(name: str) -> str:
    """A metric's name without its task in a mixture: ``bleu_4`` for ``coco_captions/bleu_4``."""
    return name.rpartition("/")[2]


def counts_key(metric: MetricInfo) -> str:
    """Key of a metric's columns in ``Scores.counts``: its name, except that ``bleu_1`` to ``bleu_4`` share ``bleu``."""
    return metric.name.rpartition("_")[0] if metric.corpus == "bleu" else metric.name


def score(metric: MetricInfo, sums_K: Floats) -> Floats:
    """Compute a score from sums over examples.

    Args:
        metric: name and formula of the score.
        sums_K: (…, K), the columns of the formula.

    Returns:
        Scores (…); NaN where the divisor is 0.
    """
    with np.errstate(all="ignore"):
        kind = formula(metric)
        if kind == "bleu":
            return _bleu(sums_K, int(metric.name.rpartition("_")[2]))
        if kind == "meteor":
            return _meteor(sums_K)
        ratio: Floats = sums_K[..., 0] / sums_K[..., 1]
        return np.exp(ratio) if kind == "perplexity" else ratio


def agree(one: float, other: float) -> bool:
    """Whether two scores are equal up to rounding."""
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))


def _bleu(sums_K: Floats, n: int) -> Floats:
    """Corpus BLEU-n as in pycocoevalcap 1.2, including its constants that avoid division by 0."""
    tiny, small = 1e-15, 1e-9
    precisions = (sums_K[..., :n] + tiny) / (sums_K[..., 4 : 4 + n] + small)
    ratio = (sums_K[..., 8] + tiny) / (sums_K[..., 9] + small)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    product: Floats = np.prod(precisions, axis=-1) ** (1 / n) * penalty
    return product


def _meteor(sums_K: Floats) -> Floats:
    """METEOR 1.5 (https://aclanthology.org/W14-3348/, section 3), parameters for English; 0 if no word matches."""
    alpha, beta, gamma = 0.85, 0.2, 0.6
    precision, recall = sums_K[..., 0] / sums_K[..., 1], sums_K[..., 2] / sums_K[..., 3]
    mean = 1 / ((1 - alpha) / precision + alpha / recall)
    fragmentation = sums_K[..., 4] / sums_K[..., 5]
    return np.nan_to_num(mean * (1 - gamma * fragmentation**beta), nan=0.0)
