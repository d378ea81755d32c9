"""How the score of a whole split is computed from its examples: sums of a few columns, and a formula.

Only sums over examples enter a formula, so a resample of the examples is scored from weighted sums. Shapes: K columns
on the last axis; all axes before it are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from harness.core.record import MetricInfo

Floats = NDArray[np.float64]
AGREES = (
    1e-6  # relative: the result of a formula must equal the recorded score, or the formula is not that of the score
)
# The perplexities of a trial, and their columns: nats and tokens.
PERPLEXITIES: Mapping[str, tuple[str, str]] = {
    "perplexity": ("nll", "tokens"),
    "perplexity_one_reference": ("nll_first", "tokens_first"),
    "perplexity_wrong_input": ("nll_wrong_input", "tokens"),
}
# K for each formula.
WIDTHS: Mapping[str, int] = {
    "mean": 2,  # sum of the scores, and how many examples have one
    "ratio": 2,  # numerators and denominators
    "perplexity": 2,  # nats and tokens
    "bleu": 10,  # matching n-grams of 1 to 4 words, predicted n-grams of 1 to 4 words, words, words of the references
    "meteor": 6,  # matches and length of the prediction, matches and length of the reference, chunks, matched words
}


def formula(metric: MetricInfo) -> str:
    """Name of a metric's formula; perplexities always have their own."""
    return "perplexity" if base_name(metric.name) in PERPLEXITIES else metric.corpus


def base_name(name: str) -> str:
    """A metric's name without the task of a mixture: ``bleu_4`` of ``coco_captions/bleu_4``."""
    return name.rpartition("/")[2]


def counts_key(metric: MetricInfo) -> str:
    """Key of a metric's columns in ``Scores.counts``: its name, except that ``bleu_1`` to ``bleu_4`` share one."""
    return metric.name.rpartition("_")[0] if metric.corpus == "bleu" else metric.name


def score(metric: MetricInfo, sums_K: Floats) -> Floats:
    """The score from sums over examples; NaN if the divisor is 0.

    Args:
        metric: name and formula of the score.
        sums_K: (…, K).

    Returns:
        (…).
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
    return abs(one - other) <= AGREES * max(abs(one), abs(other))


def _bleu(sums_K: Floats, n: int) -> Floats:
    """Corpus BLEU-n as in pycocoevalcap 1.2, including its constants against division by 0."""
    tiny, small = 1e-15, 1e-9
    precisions = (sums_K[..., :n] + tiny) / (sums_K[..., 4 : 4 + n] + small)
    ratio = (sums_K[..., 8] + tiny) / (sums_K[..., 9] + small)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    product: Floats = np.prod(precisions, axis=-1) ** (1 / n) * penalty
    return product


def _meteor(sums_K: Floats) -> Floats:
    """METEOR 1.5 (https://aclanthology.org/W14-3348/, section 3) with its parameters for English; 0 without a match."""
    alpha, beta, gamma = 0.85, 0.2, 0.6
    precision, recall = sums_K[..., 0] / sums_K[..., 1], sums_K[..., 2] / sums_K[..., 3]
    mean = 1 / ((1 - alpha) / precision + alpha / recall)
    fragmentation = sums_K[..., 4] / sums_K[..., 5]
    return np.nan_to_num(mean * (1 - gamma * fragmentation**beta), nan=0.0)
