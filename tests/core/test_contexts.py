"""Groupings: contexts → adapter groups."""

from __future__ import annotations

import re
from typing import Any

import pytest

from harness.core.contexts import resolve_grouping
from harness.core.errors import UserError

pytestmark = pytest.mark.quick

CONTEXTS = ("image", "question", "answer")


@pytest.mark.parametrize(
    ("grouping", "resolved", "name"),
    [
        ("agnostic", {"image": "all", "question": "all", "answer": "all"}, "agnostic"),
        ("specific", {"image": "image", "question": "question", "answer": "answer"}, "specific"),
        ("shared+specific", {"image": "image", "question": "question", "answer": "answer"}, "shared+specific"),
        (
            {"answer": "language", "image": "vision", "question": "language"},
            {"image": "vision", "question": "language", "answer": "language"},
            "image=vision question=language answer=language",
        ),
        (
            {"image": None, "question": "a", "answer": "b_2"},
            {"image": None, "question": "a", "answer": "b_2"},
            "image=- question=a answer=b_2",
        ),
    ],
    ids=["agnostic", "specific", "stacked", "explicit", "a context without adapter"],
)
def test_groupings(grouping: Any, resolved: dict[str, str | None], name: str) -> None:
    found, found_name, shared = resolve_grouping(grouping, CONTEXTS)
    assert (found, found_name, shared) == (resolved, name, "shared" if grouping == "shared+specific" else None)
    assert list(found) == list(CONTEXTS)  # the last context is the target: the task's order, not the file's


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ("agnositc", "allowed: agnostic, shared+specific, specific; did you mean 'agnostic'?, or a mapping"),
        ("shared-specific", "allowed: agnostic, shared+specific, specific; did you mean 'shared+specific'?"),
        (3, "found 3; allowed: agnostic, shared+specific, specific, or a mapping context → group"),
        (["agnostic"], "found ['agnostic']; allowed: agnostic, shared+specific, specific"),
        ({"imag": "a"}, "unknown context 'imag'; allowed: answer, image, question; did you mean 'image'?"),
        ({1: "a"}, "unknown context 1; allowed: answer, image, question"),
        ({"image": "a", "answer": "b"}, "context 'question' is missing"),
        ({}, "context 'image' is missing"),
        ({"image": "a b", "question": "a", "answer": "b"}, "group of context 'image' must be a name"),
        ({"image": "a", "question": "a.b", "answer": "b"}, "must be a name (letters, digits, _) or null; found 'a.b'"),
        ({"image": "a", "question": "", "answer": "b"}, "group of context 'question' must be a name"),
        ({"image": "a", "question": "a", "answer": 7}, "group of context 'answer' must be a name"),
        ({"image": "a", "question": "a", "answer": False}, "found False"),
    ],
)
def test_wrong_groupings(grouping: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        resolve_grouping(grouping, CONTEXTS)


def test_a_context_with_the_name_of_the_shared_group() -> None:
    with pytest.raises(UserError, match="has the name of the context 'shared'; allowed: agnostic, specific"):
        resolve_grouping("shared+specific", ("shared", "text"))
