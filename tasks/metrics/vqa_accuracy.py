"""The VQA accuracy of Antol et al., https://arxiv.org/abs/1505.00468 and https://visualqa.org/evaluation.html.

Every question was answered by ten people. An answer is fully right if three of them gave it: min(people / 3, 1),
averaged over the ten sets of nine people. Prediction and answers are normalised first; the steps, their order and
their oddities are those of the authors' evaluation, https://github.com/GT-Vision-Lab/VQA, reimplemented.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from tasks.base import Metric, Scores
from tasks.metrics.alignment import check_aligned, name_ids

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # not the apostrophe, not the colon (times); the period has its own rule
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = frozenset(("a", "an", "the"))

# The contractions of the official table, by ending. It omits those whose misspelling is another word (we'll: well);
# those with a capital I are omitted here because texts are in lower case when it looks them up.
_CONTRACTIONS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it somebody someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "ma'am o'clock y'all y'all'll y'all'd've 'twas 'ow's'at",
}


def _misspelt() -> Iterator[tuple[str, str]]:
    """Every contraction with one of its apostrophes missing, and the right spelling."""
    for ending, words in _CONTRACTIONS.items():
        for word in words.split():
            right = word + ending
            for apostrophe in re.finditer("'", right):
                yield right[: apostrophe.start()] + right[apostrophe.end() :], right


_RIGHT_SPELLING = dict(_misspelt())


class VQAAccuracy(Metric):
    """The official accuracy, 0–1, against the answers of ten people.

    - As in the official evaluation, if all answers to a question are the same, only the case is normalised:
      for ten times "yes", "Yes" is right and "yes!" is wrong. Its author says that this keeps text read from pictures
      as it is (https://github.com/GT-Vision-Lab/VQA/issues/14).
    - A single reference (GQA) does not use the formula, which would give 1/3 for the right answer: a match counts 1,
      after the same normalisation.
    - Two to nine references use the formula, averaged over the sets without one of them. With fewer than four, even an
      answer that all agree on scores below 1; a note says so.
    """

    of_answers: ClassVar[bool] = True
    labels: ClassVar[Mapping[str, str]] = {"vqa_accuracy": "VQA accuracy"}
    bounds: ClassVar[Mapping[str, tuple[float | None, float | None]]] = {"vqa_accuracy": (0.0, 1.0)}

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        """Score predictions by example id.

        Raises:
            ValueError: the ids of predictions and references differ, or an example has no reference.
        """
        check_aligned(predictions, references)
        accuracies = {key: vqa_accuracy(predictions[key], answers) for key, answers in references.items()}
        few = [key for key, answers in references.items() if 1 < len(answers) < 10]
        note = f"vqa_accuracy: {len(few)} of {len(references)} have 2 to 9 answers instead of 10 or 1: {name_ids(few)}"
        return Scores(
            corpus={"vqa_accuracy": sum(accuracies.values()) / len(accuracies)},
            per_example={key: {"vqa_accuracy": accuracy} for key, accuracy in accuracies.items()},
            notes=(f"{note}; with fewer than four, no answer can score 1",) if few else (),
        )


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of one prediction, 0–1, against the answers of all people who were asked."""
    said, *given = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(given) == 1 or len(set(given)) > 1:
        said, *given = (normalise(text) for text in (said, *given))
    agreeing = sum(answer.lower() == said.lower() for answer in given)
    others = len(given) - agreeing
    if len(given) == 1:
        return float(agreeing)
    # Leave out each person once: one of those who agree, or one of the others.
    return (agreeing * min(1.0, (agreeing - 1) / 3) + others * min(1.0, agreeing / 3)) / len(given)


def normalise(text: str) -> str:
    """The official normalisation: punctuation, case, number words, articles, apostrophes.

    A punctuation mark becomes a space; but all marks of a kind are removed if one of them touches a space, and all
    marks of every kind if there is a comma between digits ("100,978", and then "red-brown" is "redbrown" too). A period
    is removed unless a digit follows.
    """
    number = re.search(r"\d,\d", text) is not None
    marks: dict[str, str | int | None] = {
        mark: "" if number or f"{mark} " in text or f" {mark}" in text else " " for mark in _PUNCTUATION
    }
    text = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(marks)))
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RIGHT_SPELLING.get(word, word) for word in words if word not in _ARTICLES)
