"""ROUGE-L (Lin 2004, https://aclanthology.org/W04-1013/) as pycocoevalcap 1.2 computes it.

Unlike the paper's, the F-score is of the best precision and the best recall over the references, which may be those of
different references, and beta is 1.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.rouge.rouge import Rouge

BETA: float = Rouge().beta


def rouge_l(references: Sequence[Sequence[str]], predictions: Sequence[str]) -> tuple[float, list[float]]:
    """Score tokenised captions.

    Args:
        references: for every example its captions, each with at least one word.
        predictions: for every example its prediction.

    Returns:
        The mean, and the score of every example; between 0 and 1.
    """
    per_example = [_score(texts, prediction) for texts, prediction in zip(references, predictions, strict=True)]
    return float(np.mean(per_example)), per_example


def _score(references: Sequence[str], prediction: str) -> float:
    words = prediction.split(" ")
    places: dict[str, int] = {}  # word → one bit per position in the prediction
    for i, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << i
    precision = recall = 0.0
    for reference in references:
        others = reference.split(" ")
        common = _longest_common_subsequence(places, len(words), others)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(others))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common_subsequence(places: dict[str, int], length: int, others: Sequence[str]) -> int:
    """Its length, bit-parallel: a whole row of the usual table in one addition (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited"). A bit is cleared where the table increases by one.
    """
    every = (1 << length) - 1
    row = every
    for word in others:
        if matches := row & places.get(word, 0):
            row = (row + matches) | (row - matches)
    return length - (row & every).bit_count()
