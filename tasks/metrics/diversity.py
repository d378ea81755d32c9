"""Diversity of generated texts: detects a model that says the same about every picture, whatever its other scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

from tasks.base import Metric, Scores
from tasks.metrics.alignment import check_aligned
from tasks.metrics.coco.ptb import tokenise


class Diversity(Metric):
    """distinct-1 and distinct-2, mean length and vocabulary of the predictions; the references are not used.

    ``distinct_n``: distinct n-grams / words, over all predictions together (Li et al. 2016,
    https://arxiv.org/abs/1510.03055, who divide by words for bigrams too). It falls as more text is counted, so only
    runs over the same examples are comparable. Words are those of the captions metric: lower case, punctuation removed.
    ``length`` is in words, for each example and as the mean; ``vocabulary`` is the number of distinct words.
    """

    labels: ClassVar[Mapping[str, str]] = {"distinct_2": "distinct-2"}
    bounds: ClassVar[Mapping[str, tuple[float | None, float | None]]] = {
        **dict.fromkeys(("distinct_1", "distinct_2"), (0.0, 1.0)),
        **dict.fromkeys(("length", "vocabulary"), (0.0, None)),
    }

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id; ``distinct_n`` is absent where no prediction has a word.

        Raises:
            ValueError: there are no examples, the ids of predictions and references differ, or an example has no
                reference.
            RuntimeError: Java, which tokenises, failed.
        """
        check_aligned(predictions, references)
        texts = [text.split() for text in tokenise([predictions[key] for key in references])]
        total = sum(len(words) for words in texts)
        unigrams = {word for words in texts for word in words}
        bigrams = {pair for words in texts for pair in pairwise(words)}
        corpus = {"length": total / len(texts), "vocabulary": float(len(unigrams))}
        per_example = {key: {"length": float(len(words))} for key, words in zip(references, texts, strict=True)}
        if not total:
            return Scores(
                corpus, per_example, ("distinct-1 and distinct-2 were not computed: no prediction has a word",)
            )
        return Scores({"distinct_1": len(unigrams) / total, "distinct_2": len(bigrams) / total, **corpus}, per_example)
