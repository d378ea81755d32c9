"""Exact match: is the prediction one of the references, ignoring case, spaces and final punctuation?"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import ClassVar

from tasks.base import Metric, Scores
from tasks.metrics.alignment import check_aligned

_FINAL_MARKS = ".,;:!?…。！？ "


class ExactMatch(Metric):
    """The share of predictions that equal one of their references, 0–1.

    Both are compared in Unicode's composed form (NFC), without case, white space collapsed, without marks at the end
    (. , ; : ! ?). Articles and other punctuation count, unlike in SQuAD's exact match: "the end" is not "end".
    """

    of_answers: ClassVar[bool] = True
    labels: ClassVar[Mapping[str, str]] = {"exact_match": "Exact match"}
    bounds: ClassVar[Mapping[str, tuple[float | None, float | None]]] = {"exact_match": (0.0, 1.0)}

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id.

        Raises:
            ValueError: the ids of predictions and references differ, or an example has no reference.
        """
        check_aligned(predictions, references)
        matches = {
            key: float(normalise(predictions[key]) in {normalise(text) for text in texts})
            for key, texts in references.items()
        }
        return Scores(
            corpus={"exact_match": sum(matches.values()) / len(matches)},
            per_example={key: {"exact_match": match} for key, match in matches.items()},
        )


def normalise(text: str) -> str:
    """The form in which texts are compared. A text of marks alone keeps them: "?" is not the empty answer."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.rstrip(_FINAL_MARKS) or text
