"""Exact match: what counts as the same text."""

from __future__ import annotations

import pytest

from tasks.metrics.exact_match import ExactMatch

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("prediction", "reference", "match"),
    [
        ("Blue", "blue", 1.0),
        (" two\n  words ", "two words", 1.0),
        ("blue.", "blue", 1.0),
        ("blue", "blue !?", 1.0),
        ("are you?", "are you", 1.0),
        ("青い。", "青い", 1.0),
        ("STRASSE", "straße", 1.0),
        ("cafe\u0301", "café", 1.0),  # the accent as a separate character
        ("cafe", "café", 0.0),
        ("the end", "end", 0.0),
        ("10", "ten", 0.0),
        ("3.5", "35", 0.0),
        ("5", "-5", 0.0),
        ("", "blue", 0.0),
        ("", "?", 0.0),  # an empty answer is not a reference of marks
        ("?", "?", 1.0),
        ("x" * 10_000, "X" * 10_000, 1.0),
    ],
)
def test_texts_that_are_the_same(prediction: str, reference: str, match: float) -> None:
    scores = ExactMatch().score({"a": prediction}, {"a": [reference]})
    assert scores.per_example == {"a": {"exact_match": match}}


def test_any_reference_counts_and_the_corpus_score_is_the_mean() -> None:
    scores = ExactMatch().score({"a": "cat", "b": "dog", "c": "cow"}, {"a": ["pet", "cat"], "b": ["cat"], "c": ["ox"]})
    assert scores.corpus == {"exact_match": pytest.approx(1 / 3)}
    assert list(scores.per_example) == ["a", "b", "c"]


def test_mismatching_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="no prediction for 'b'"):
        ExactMatch().score({"a": "x"}, {"a": ["x"], "b": ["x"]})
    with pytest.raises(ValueError, match="no references for 'a'"):
        ExactMatch().score({"a": "x"}, {"a": []})
