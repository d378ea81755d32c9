"""CIDEr-D (Vedantam, Zitnick and Parikh 2015, https://arxiv.org/abs/1411.5726), which pycocoevalcap 1.2 calls CIDEr.

For every reference s of an image, every n from 1 to 4 and the predicted c, with g the vector of n-gram counts, each
times the logarithm of images / images whose references have the n-gram:

    10 · exp(-(length(c) - length(s))² / (2 · 6²)) · Σ min(g(c), g(s)) · g(s) / (‖g(c)‖ · ‖g(s)‖)

averaged over n and over the references. docs/metrics.md says how this relates to the paper's two definitions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.metrics.coco.ngrams import LONGEST, Counts, Ints, NGrams, Table

SIGMA = 6.0
Floats = NDArray[np.float64]


def cider(references: NGrams, words: Ints, counts: Sequence[Counts]) -> tuple[float, list[float]]:
    """Score predictions.

    Args:
        references: the n-grams of the references.
        words, counts: what ``references.count`` gave for the predictions.

    Returns:
        The mean, and the score of every example; between 0 and 10.
    """
    image_C = references.image_C
    # The library's length is that of the bigrams; the difference is the same but for a prediction without words: 0.
    delta_C = np.maximum(words - 1, 0)[image_C] - np.maximum(references.words_C - 1, 0)
    penalty_C = np.exp(-(delta_C**2) / (2 * SIGMA**2))
    similarity_C = sum(_cosine(table, references, of_n) for table, of_n in zip(references.tables, counts, strict=True))
    total_I = np.bincount(image_C, similarity_C * penalty_C)
    per_example = 10 * total_I / np.bincount(image_C) / LONGEST
    return float(per_example.mean()), per_example.tolist()


def _cosine(table: Table, references: NGrams, predicted: Counts) -> Floats:
    """The clipped cosine similarity of every reference with the prediction for its image."""
    idf_G = np.log(references.images) - np.log(table.images_G)
    reference_R = table.counts.count_R * idf_G[table.counts.ngram_R]
    image, ngram, count = predicted
    # An n-gram that no reference has counts as if one image had it.
    unknown = np.full(1, np.log(references.images))
    prediction = count * np.concatenate([idf_G, unknown])[np.minimum(ngram, len(idf_G))]

    known, place = table.find(image, ngram)
    rows = table.rows_P[place]
    # Every pair of a predicted n-gram and a reference of its image that has it: rows first, first + 1, … of each.
    row = np.repeat(table.first_P[place] - np.cumsum(rows) + rows, rows) + np.arange(rows.sum())
    weight = reference_R[row]
    caption, captions = table.counts.caption_R, len(references.image_C)
    product_C = np.bincount(caption[row], np.minimum(np.repeat(prediction[known], rows), weight) * weight, captions)
    norm_C = np.sqrt(np.bincount(caption, reference_R**2, captions))
    norm_C *= np.sqrt(np.bincount(image, prediction**2, references.images))[references.image_C]
    return np.divide(product_C, norm_C, out=np.zeros(captions), where=norm_C != 0)
