"""BLEU-1 to BLEU-4 (Papineni et al. 2002, https://aclanthology.org/P02-1040/) as pycocoevalcap 1.2 computes them.

The n-grams are counted here, in arrays; the formula is the library's own code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer

from tasks.metrics.ngrams import LONGEST, Counts, Ints, NGrams


def bleu(references: NGrams, words: Ints, counts: Sequence[Counts]) -> tuple[list[float], list[list[float]]]:
    """Score predictions.

    Args:
        references: the n-grams of the references.
        words, counts: what ``references.count`` gave for the predictions.

    Returns:
        By n the corpus score, and by n the scores of all examples; between 0 and 1.
    """
    correct = np.zeros((references.images, LONGEST), np.int64)
    for n, (table, (image, ngram, count)) in enumerate(zip(references.tables, counts, strict=True)):
        known, place = table.find(image, ngram)
        # A count is clipped at the most that one reference of the image has.
        most_P = np.maximum.reduceat(table.counts.count_R, table.first_P) if len(table.first_P) else table.first_P
        np.add.at(correct[:, n], image[known], np.minimum(count[known], most_P[place]))
    lengths = np.split(references.words_C, np.flatnonzero(np.diff(references.image_C)) + 1)
    scorer = BleuScorer(n=LONGEST)
    scorer.ctest = [
        {"reflen": reflen.tolist(), "testlen": testlen, "guess": [max(0, testlen - n) for n in range(LONGEST)],
         "correct": right}
        for reflen, testlen, right in zip(lengths, words.tolist(), correct.tolist(), strict=True)
    ]  # fmt: skip
    corpus, per_example = scorer.compute_score(option="closest")
    return corpus, per_example
