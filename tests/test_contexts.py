"""Groupings, and the router that tells adapters which token is whose."""

from __future__ import annotations

import re
from typing import Any

import pytest

from harness.contexts import Router, Segment, Span, resolve_grouping
from harness.errors import UserError

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
        ({"image": "a", "answer": "b"}, "context 'question' is missing; give it a group, or null for no adapter"),
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


def router(**grouping: str | None) -> Router:
    return Router(grouping)


def test_groups_are_in_order_of_first_use_and_leave_out_the_bare_ones() -> None:
    assert router(image="b", question=None, answer="a", more="b").groups == ("b", "a")
    assert router(image=None).groups == ()


def test_each_context_gets_its_span() -> None:
    specific = router(image="image", text="text")
    specific.set_layout([Segment(0, 16, "image"), Segment(16, 40, "text")])
    assert specific.spans(40) == (Span(0, 16, "image"), Span(16, 40, "text"))


def test_neighbours_of_one_group_are_one_span() -> None:
    grouped = router(image="v", question="l", answer="l")
    grouped.set_layout([Segment(0, 4, "image"), Segment(4, 9, "question"), Segment(9, 12, "answer")])
    assert grouped.spans(12) == (Span(0, 4, "v"), Span(4, 12, "l"))
    grouped.set_layout([Segment(0, 4, "question"), Segment(4, 9, "image"), Segment(9, 12, "answer")])
    assert grouped.spans(12) == (Span(0, 4, "l"), Span(4, 9, "v"), Span(9, 12, "l"))


def test_contexts_without_adapter_keep_their_place() -> None:
    half = router(image=None, question=None, answer="a")
    half.set_layout([Segment(0, 4, "image"), Segment(4, 9, "question"), Segment(9, 12, "answer")])
    assert half.spans(12) == (Span(0, 9, None), Span(9, 12, "a"))


def test_an_empty_segment_leaves_no_span_and_joins_its_neighbours() -> None:
    specific = router(image="image", text="text")
    specific.set_layout([Segment(0, 3, "text"), Segment(3, 3, "image"), Segment(3, 5, "text")])
    assert specific.spans(5) == (Span(0, 5, "text"),)


def test_a_new_layout_replaces_the_old_one() -> None:
    agnostic = router(image="all", text="all")
    agnostic.set_layout([Segment(0, 4, "image"), Segment(4, 9, "text")])
    agnostic.set_layout([Segment(0, 1, "text")])
    assert agnostic.spans(1) == (Span(0, 1, "all"),)
    with pytest.raises(RuntimeError, match="the layout covers 1 positions but the batch has 9"):
        agnostic.spans(9)


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(0, 4, "image"), Segment(5, 9, "text")],
        [Segment(0, 4, "image"), Segment(3, 9, "text")],
        [Segment(1, 4, "image")],
        [Segment(0, 4, "image"), Segment(4, 2, "text")],
    ],
    ids=["gap", "overlap", "not from 0", "backwards"],
)
def test_segments_that_are_not_contiguous(segments: list[Segment]) -> None:
    with pytest.raises(ValueError, match="segments must be contiguous from 0"):
        router(image="a", text="b").set_layout(segments)


def test_an_unknown_context_in_a_layout() -> None:
    with pytest.raises(ValueError, match="unknown context 'txt'; allowed: image, text; did you mean 'text'"):
        router(image="a", text="b").set_layout([Segment(0, 4, "txt")])


@pytest.mark.parametrize("length", [39, 41, 0])
def test_a_batch_of_another_length_is_never_passed_silently(length: int) -> None:
    specific = router(image="image", text="text")
    specific.set_layout([Segment(0, 16, "image"), Segment(16, 40, "text")])
    with pytest.raises(RuntimeError, match=f"the layout covers 40 positions but the batch has {length}"):
        specific.spans(length)


def test_no_layout_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="covers 0 positions but the batch has 5: set_layout comes before forward"):
        router(image="a").spans(5)


def test_a_refused_layout_leaves_the_one_in_force() -> None:
    specific = router(image="image", text="text")
    specific.set_layout([Segment(0, 2, "image")])
    with pytest.raises(ValueError, match="contiguous"):
        specific.set_layout([Segment(0, 1, "image"), Segment(2, 3, "text")])
    assert specific.spans(2) == (Span(0, 2, "image"),)
