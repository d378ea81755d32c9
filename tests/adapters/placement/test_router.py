"""The router gives adapters the group of each token."""

from __future__ import annotations

import pytest
import torch

from adapters.placement.router import Router
from harness.core.contexts import Segment, Span
from harness.core.errors import UserError

pytestmark = pytest.mark.quick


def router(**grouping: str | None) -> Router:
    return Router(grouping)


def test_groups_are_in_order_of_first_use_and_leave_out_the_bare_ones() -> None:
    assert router(image="b", question=None, answer="a", more="b").groups == ("b", "a")
    assert router(image=None).groups == ()


def test_each_context_gets_its_span() -> None:
    specific = router(image="image", text="text")
    specific.set_layout([Segment(0, 16, "image"), Segment(16, 40, "text")])
    assert specific.layout_of(40).spans == (Span(0, 16, "image"), Span(16, 40, "text"))


def test_neighbours_of_one_group_are_one_span() -> None:
    grouped = router(image="v", question="l", answer="l")
    grouped.set_layout([Segment(0, 4, "image"), Segment(4, 9, "question"), Segment(9, 12, "answer")])
    assert grouped.layout_of(12).spans == (Span(0, 4, "v"), Span(4, 12, "l"))
    grouped.set_layout([Segment(0, 4, "question"), Segment(4, 9, "image"), Segment(9, 12, "answer")])
    assert grouped.layout_of(12).spans == (Span(0, 4, "l"), Span(4, 9, "v"), Span(9, 12, "l"))


def test_contexts_without_adapter_keep_their_place() -> None:
    half = router(image=None, question=None, answer="a")
    half.set_layout([Segment(0, 4, "image"), Segment(4, 9, "question"), Segment(9, 12, "answer")])
    assert half.layout_of(12).spans == (Span(0, 9, None), Span(9, 12, "a"))


def test_an_empty_segment_leaves_no_span_and_joins_its_neighbours() -> None:
    specific = router(image="image", text="text")
    specific.set_layout([Segment(0, 3, "text"), Segment(3, 3, "image"), Segment(3, 5, "text")])
    assert specific.layout_of(5).spans == (Span(0, 5, "text"),)


def test_a_new_layout_replaces_the_old_one() -> None:
    agnostic = router(image="all", text="all")
    agnostic.set_layout([Segment(0, 4, "image"), Segment(4, 9, "text")])
    agnostic.set_layout([Segment(0, 1, "text")])
    assert agnostic.layout_of(1).spans == (Span(0, 1, "all"),)
    with pytest.raises(RuntimeError, match="the layout covers 1 positions but the batch has 9"):
        agnostic.layout_of(9)


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
        specific.layout_of(length)


def test_no_layout_is_an_error() -> None:
    with pytest.raises(UserError, match="no layout was set"):
        router(image="a").layout_of(5)


def test_a_refused_layout_leaves_the_one_in_force() -> None:
    specific = router(image="image", text="text")
    specific.set_layout([Segment(0, 2, "image")])
    with pytest.raises(ValueError, match="contiguous"):
        specific.set_layout([Segment(0, 1, "image"), Segment(2, 3, "text")])
    assert specific.layout_of(2).spans == (Span(0, 2, "image"),)


def test_rows_that_differ_have_positions_and_lookups_by_token() -> None:
    three = router(image="v", audio=None, text="l")
    three.prepare_lookup(("v", "l"))
    three.prepare_lookup(("l",))
    three.set_context_ids(torch.tensor([[2, 0, 0, 1], [2, 2, 1, 0]]))
    layout = three.layout_of(4)
    assert layout.spans is None
    assert {group: where.tolist() for group, where in layout.positions.items()} == {"v": [1, 2, 7], "l": [0, 4, 5]}
    assert layout.group_ids_XT.tolist() == [[1, 0, 0, -1], [1, 1, -1, 0]]
    assert layout.lookup(("v", "l")).index_XT.tolist() == [[1, 0, 0, 2], [1, 1, 2, 0]]
    assert layout.lookup(("l",)).owner_XTG.squeeze(-1).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
    ]


def test_equal_rows_are_one_row_of_spans() -> None:
    two = router(image="v", text="l")
    two.set_context_ids(torch.tensor([[1, 0, 0, 1]] * 3))
    assert two.layout_of(4).spans == (Span(0, 1, "l"), Span(1, 3, "v"), Span(3, 4, "l"))
    assert two.layout.group_ids_XT.shape == (1, 4)


def test_new_tokens_follow_what_the_cache_holds() -> None:
    two = router(image="v", text="l")
    two.set_context_ids(torch.tensor([[1, 0, 0], [0, 0, 1]]))
    two.set_context_ids(torch.tensor([[1]]), two.layout.context_ids_XK)
    two.set_context_ids(torch.tensor([[1]]), two.layout.context_ids_XK)
    assert two.layout_of(1).spans == (Span(0, 1, "l"),)
    assert two.layout.past == 4
    assert two.layout.context_ids_XK.tolist() == [[1, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
