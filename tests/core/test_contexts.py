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
    ids=["agnostic", "specific", "explicit", "a context without adapter"],
)
def test_groupings(grouping: Any, resolved: dict[str, str | None], name: str) -> None:
    found, found_name = resolve_grouping(grouping, CONTEXTS)
    assert (found, found_name) == (resolved, name)
    assert list(found) == list(CONTEXTS)  # the last context is the target: the task's order, not the file's


@pytest.mark.parametrize(
    ("grouping", "message"),
    [
        ("agnositc", "found 'agnositc'; allowed: agnostic, specific; did you mean 'agnostic'?, or a mapping"),
        (3, "found 3; allowed: agnostic, specific, or a mapping context → group"),
        (["agnostic"], "found ['agnostic']; allowed: agnostic, specific"),
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
