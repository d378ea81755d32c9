"""BLEU-1 to BLEU-4 (Papineni et al. 2002, https://aclanthology.org/P02-1040/) as pycocoevalcap 1.2 computes them.

The n-grams are counted here, in arrays; the formula is the library's own code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer

from tasks.metrics.coco.ngrams import LONGEST, Counts, Ints, NGrams


def bleu(references: NGrams, words: Ints, counts: Sequence[Counts]) -> tuple[list[float], list[list[float]], Ints]:
    """Score predictions.

    Args:
        references: the n-grams of the references.
        words, counts: what ``references.count`` gave for the predictions.

    Returns:
        By n the corpus score, and by n the scores of all examples; between 0 and 1. And (I, 10) the counts whose sums
        give the corpus scores: matching n-grams of 1 to 4 words, n-grams of 1 to 4 words in the prediction, its words,
        and the words of the reference that is closest to it in length (of two, the shorter one).
    """
    correct = np.zeros((references.images, LONGEST), np.int64)
    for n, (table, (image, ngram, count)) in enumerate(zip(references.tables, counts, strict=True)):
        known, place = table.find(image, ngram)
        # A count is clipped at the maximum over the image's references.
        most_P = np.maximum.reduceat(table.counts.count_R, table.first_P) if len(table.first_P) else table.first_P
        np.add.at(correct[:, n], image[known], np.minimum(count[known], most_P[place]))
    guesses = np.maximum(words[:, None] - np.arange(LONGEST), 0)
    closest = _closest(references, words)
    scorer = BleuScorer(n=LONGEST)
    scorer.ctest = [
        {"reflen": [length], "testlen": testlen, "guess": guess, "correct": right}
        for length, testlen, guess, right in zip(
            closest.tolist(), words.tolist(), guesses.tolist(), correct.tolist(), strict=True
        )
    ]
    corpus, per_example = scorer.compute_score(option="closest")
    return corpus, per_example, np.column_stack([correct, guesses, words, closest])


def _closest(references: NGrams, words: Ints) -> Ints:
    """The length of each image's reference that is closest to the prediction's."""
    image_C = references.image_C
    order = np.lexsort((references.words_C, np.abs(references.words_C - words[image_C]), image_C))
    first = np.searchsorted(image_C, np.arange(references.images))  # lexsort leaves the images in their order
    return references.words_C[order][first]
