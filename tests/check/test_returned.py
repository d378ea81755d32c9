"""What tasks and metrics return is checked in every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from harness.check.returned import check_examples, checked_scores
from harness.core.errors import UserError
from tasks.base import Example, Metric, Part, Scores

WRONG: dict[str, Any] = {}  # with values of another type
GOOD = Example("a", (Part("question", "what?"), Part("image", Path("a.png"))), ("é ☃", "that"))


def example(name: Any = "b", value: Any = "what?", references: Any = ("this",)) -> Example:
    return Example(name, (Part("question", value),), references)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ((e for e in [GOOD]), r"task mine: examples\('test'\): found generator; allowed: a list of harness\.Example"),
        (None, r"found None; allowed: a list"),
        ("text", r"found str; allowed: a list"),
        ([GOOD, "text"], r"found str at position 1; allowed: harness\.Example"),
        ([GOOD, GOOD], r"example 'a' at position 1: another example has this id; ids are unique over the task"),
        ([example("train")], r"example 'train' at position 0: another example has this id"),
        ([example(7)], r"example 7 at position 0: id: found int; allowed: text"),
        ([example(references="this")], r"references: found 'this'; allowed: a tuple of one text or more"),
        ([example(references=())], r"references: found \(\); allowed: a tuple of one text or more"),
        ([example(references=("this", None))], r"references: found None; allowed: text$"),
        ([example(references=("x\ud800",))], r"references: found the lone surrogate '\\ud800', which is no character"),
        ([example(value="x\udfffy")], r"inputs: found the lone surrogate '\\udfff'"),
        ([example(value=3)], r"inputs: found int; allowed: text or a Path"),
    ],
)
def test_examples_of_another_kind_are_refused(returned: Any, message: str) -> None:
    check_examples({"train": [example("train")], "test": [GOOD]}, "mine")
    with pytest.raises(UserError, match=message):
        check_examples({"train": [example("train")], "test": returned}, "mine")


class Mine(Metric):
    """A metric."""

    labels = {"mine": "Mine", "other": "Other"}  # noqa: RUF012

    def score(self, predictions: Any, references: Any) -> Scores:
        """Not called."""
        raise NotImplementedError


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"mine": 1.0}, r"the metric returned dict; allowed: harness\.Scores"),
        (None, r"the metric returned None; allowed: harness\.Scores"),
        (Scores({"mine": float("nan")}), r"returned nan as mine of the corpus; allowed: a finite number"),
        (Scores(WRONG | {"mine": "good"}), r"returned 'good' as mine of the corpus; allowed: a finite number"),
        (Scores(WRONG | {"mine": torch.tensor(1.0)}), r"returned tensor\(1\.\) as mine of the corpus"),
        (
            Scores({"mine": 1.0}, {"b": {"mine": 1.0}}),
            r"returned scores of 'b', which is no id of an example it scored",
        ),
        (Scores({"mine": 1.0}, {"a": {"mine": float("inf")}}), r"returned inf as mine of example 'a'"),
        (Scores({"mine": 1.0}, counts={"b": {"mine": (1, 2)}}), r"returned counts of 'b', which is no id"),
        (
            Scores({"mine": 1.0}, counts={"a": WRONG | {"mine": (1, None)}}),
            r"None as counts of mine of example 'a'",
        ),
    ],
)
def test_scores_of_another_kind_are_refused(returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_scores(returned, Mine, {"a"})


def test_a_label_without_a_score_is_noted() -> None:
    scores = checked_scores(Scores({"mine": 1}, {"a": {"mine": 0.5}}), Mine, {"a"})
    assert scores == Scores({"mine": 1}, {"a": {"mine": 0.5}}, ("other was not computed; no note says why",))
    noted = Scores({"mine": 1}, notes=("other needs Java",))
    assert checked_scores(noted, Mine, {"a"}) == noted
