"""Tokens sorted by group and back: values, gradients, and a fixed order of additions."""

from __future__ import annotations

import torch

from adapters.placement.order import Order, order_of, sort, unsort
from adapters.placement.router import Router

IDS_BT = torch.tensor([[0, 1, 1, 2, 0], [2, 0, 1, 1, 1]])


def order() -> Order:
    router = Router({"a": "a", "b": "b", "none": None})
    router.set_context_ids(IDS_BT)
    return order_of(router.layout, ("a", "b"), 2)


def test_tokens_are_sorted_by_group_and_come_back() -> None:
    value_ND = torch.arange(20.0).view(10, 2)
    sorted_ND = sort(value_ND, order())
    flat_N = IDS_BT.flatten()
    assert torch.equal(sorted_ND, torch.cat([value_ND[flat_N == context] for context in range(3)]))
    assert [(p.group, p.stop - p.start) for p in order().pieces] == [(0, 3), (1, 5), (None, 2)]
    assert torch.equal(unsort(sorted_ND, order()), value_ND)


def test_gradients_are_those_of_indexing_and_have_gradients() -> None:
    value_ND = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    weight_ND = torch.randn(10, 2, dtype=torch.float64)
    for move, to_N in ((sort, order().sorted_N), (unsort, order().back_N)):
        (found_ND,) = torch.autograd.grad((move(value_ND, order()) * weight_ND).sum(), value_ND)
        (expected_ND,) = torch.autograd.grad((value_ND[to_N] * weight_ND).sum(), value_ND)
        assert torch.equal(found_ND, expected_ND)
        assert torch.autograd.gradgradcheck(lambda v, m=move: m(v, order()).square(), value_ND)
