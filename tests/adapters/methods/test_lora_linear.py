"""A layer and its low-rank pairs as one operation: against float64, and against the layer followed by its adapter.

Shapes: B rows, T positions, I and O input and output features, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.methods.lora_linear import linear
from adapters.placement.router import Layout, Router

GROUPS = ("image", "text")
INSIDE, OUTSIDE, RANK = 12, (8, 10), 3
# image 0, text 1, no group 2
LAYOUTS = {
    "alike": [[0] * 4 + [2, 2, 1, 0, 0, 1, 1]], "one token": [[1]], "image alone": [[0] * 6],
    "rows differ": [[0, 0, 1, 1, 2], [1, 1, 1, 1, 1], [2, 0, 1, 2, 0]],
    "rows differ, no text": [[0, 2], [2, 0], [0, 0]],
}  # fmt: skip
each_layout = pytest.mark.parametrize("ids", LAYOUTS.values(), ids=LAYOUTS)
# few rows: fewer numbers in tokens than in weights, so the products are added; many: the weights are folded
WAYS = {"added": (1, 3), "folded": (40, 3), "many columns, folded": (40, 20)}
each_way = pytest.mark.parametrize(("times", "rank"), WAYS.values(), ids=WAYS)


def layout_of(ids: Sequence[Sequence[int]], times: int) -> Layout:
    router = Router({"image": "image", "text": "text", "none": None})
    router.set_context_ids(torch.tensor([*ids] * times if len(ids) > 1 else ids))
    return router.layout


def made(
    layout: Layout, rows: int, rank: int, dtype: torch.dtype, bias: bool
) -> tuple[Tensor, list[Any], list[Tensor]]:
    """Input, layers with their pairs, and the pairs' tensors."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    parts = []
    for features in OUTSIDE:
        layer = nn.Linear(INSIDE, features, bias=bias, dtype=dtype).requires_grad_(False)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(draw(*p.shape))
        parts.append((layer, {group: (draw(rank, INSIDE), draw(features, rank)) for group in GROUPS}))
    factors = [factor for _, pairs in parts for pair in pairs.values() for factor in pair]
    return draw(rows, layout.length, INSIDE), parts, factors


def reference(x_BTI: Tensor, layer: nn.Linear, pairs: Any, layout: Layout, scale: float) -> Tensor:
    """Algorithm 1 of the paper: every group's update, and a one-hot choice among them."""
    onehot_XTG = F.one_hot(layout.group_ids_XT + 1, 1 + len(GROUPS))[..., 1:].to(x_BTI.dtype)
    A_GRI, B_GOR = (torch.stack([pair[index] for pair in pairs.values()]) for index in (0, 1))
    update_BTGO = torch.einsum("gor,gri,bti->btgo", B_GOR, A_GRI, x_BTI)
    return layer(x_BTI) + scale * torch.einsum("btgo,btg->bto", update_BTGO, onehot_XTG.expand(len(x_BTI), -1, -1))


@each_way
@each_layout
@pytest.mark.parametrize(("scale", "bias"), [(1.0, False), (0.4, True)])
def test_outputs_and_gradients_are_those_of_the_papers_algorithm(
    ids: Sequence[Sequence[int]], times: int, rank: int, scale: float, bias: bool
) -> None:
    """In float64; 1e-11 relative to the largest number is rounding only."""
    layout = layout_of(ids, times)
    x_BTI, parts, factors = made(layout, len(ids) * times, rank, torch.float64, bias)
    expected = [reference(x_BTI, layer, pairs, layout, scale) for layer, pairs in parts]
    found = linear(x_BTI, parts, layout, scale)
    if found is None:
        assert rank > RANK
        pytest.skip("many columns, and weights are larger than their tokens: the layer, then its adapter")
    weights = [torch.randn_like(y_BTO) for y_BTO in expected]
    grads = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(of, weights, strict=True)), [x_BTI, *factors])
        for of in (found, expected)
    ]
    for mine, other in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        assert (mine - other).abs().max() <= 1e-11 * other.abs().max().clamp(min=1)


@each_way
def test_each_way_is_taken(times: int, rank: int) -> None:
    layout = layout_of([[0, 0, 0, 1, 1, 1]], times)
    x_BTI, parts, _ = made(layout, times, rank, torch.float32, False)
    found = linear(x_BTI, parts, layout, 1.0)
    whole = layout_of([[0] * 6], times)
    alone = linear(x_BTI, parts, whole, 1.0)
    assert found is not None
    assert alone is not None
    many = rank > RANK
    assert way_of(found[0]) == ("_FoldedBackward" if many else "_AddedBackward")
    assert way_of(alone[0]) == ("_FoldedBackward" if times > 1 else "_AddedBackward")


def way_of(y_BTO: Tensor) -> str:
    """The operation of which an output is a view."""
    assert y_BTO.grad_fn is not None
    source = y_BTO.grad_fn.next_functions[0][0]
    return type(source).__name__


@each_way
def test_one_output_alone_may_be_used(times: int, rank: int) -> None:
    """Backward of one of the layers; the others' pairs get zeros."""
    layout = layout_of([[0, 0, 1, 1]], times)
    x_BTI, parts, factors = made(layout, times, rank, torch.float64, False)
    found = linear(x_BTI, parts, layout, 1.0)
    assert found is not None
    grads = torch.autograd.grad(found[1].sum(), [x_BTI, *factors])
    expected = torch.autograd.grad(reference(x_BTI, *parts[1], layout, 1.0).sum(), [x_BTI, *factors[4:]])
    for mine, other in zip((grads[0], *grads[5:]), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)
    assert not any(grad.any() for grad in grads[1:5])


@each_way
@each_layout
def test_outputs_can_be_changed_in_place(ids: Sequence[Sequence[int]], times: int, rank: int) -> None:
    """As Llama 4 does with the output of a shared expert."""
    layout = layout_of(ids, times)
    x_BTI, parts, factors = made(layout, len(ids) * times, rank, torch.float64, True)
    grads = []
    for change in (torch.mul, Tensor.mul_):
        found = linear(x_BTI, parts, layout, 1.0)
        if found is None:
            pytest.skip("many columns, and weights are larger than their tokens: the layer, then its adapter")
        changed = [change(y_BTO, number) for number, y_BTO in enumerate(found, start=2)]
        grads.append(torch.autograd.grad(sum(y_BTO.sin().sum() for y_BTO in changed), [x_BTI, *factors]))
    for mine, other in zip(*reversed(grads), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("times", [1, 40])
def test_pairs_of_zeros_change_no_bit(times: int) -> None:
    layout = layout_of([[0] * 6], times)
    x_BTI, parts, _ = made(layout, times, RANK, torch.float32, True)
    with torch.no_grad():
        for _, pairs in parts:
            for _, B_OR in pairs.values():
                B_OR.zero_()
    found = linear(x_BTI, parts, layout, 1.0)
    assert found is not None
    for y_BTO, (layer, _) in zip(found, parts, strict=True):
        assert torch.equal(y_BTO, layer(x_BTI))


def test_sixteen_bits_are_added_and_never_folded() -> None:
    """A weight in bf16 that takes up a small update loses it; against float64, 2 % of the largest number."""
    layout = layout_of([[0] * 6], 40)
    x_BTI, parts, _ = made(layout, 40, RANK, torch.bfloat16, False)
    single = [
        (layer, {g: tuple(f.detach().float().requires_grad_() for f in pair) for g, pair in pairs.items()})
        for layer, pairs in parts
    ]
    found = linear(x_BTI, single, layout, 0.4)  # type: ignore[arg-type]
    assert found is not None
    assert way_of(found[0]) == "_AddedBackward"
    (layer, pairs), double = single[0], x_BTI.detach().double().requires_grad_()
    A_RI = pairs["image"][0]
    grads = torch.autograd.grad(found[0].sum(), [x_BTI, A_RI])
    exact = {g: tuple(f.detach().double().requires_grad_() for f in pair) for g, pair in pairs.items()}
    expected_BTO = reference(double, layer.double(), exact, layout, 0.4)
    wanted = torch.autograd.grad(expected_BTO.sum(), [double, exact["image"][0]])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    for mine, other in zip((found[0], *grads), (expected_BTO, *wanted), strict=True):
        assert (mine.double() - other).abs().max() < 0.02 * other.abs().max()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: layer.weight.requires_grad_(),
        lambda layer: setattr(layer.weight, "ds_id", 0),
        lambda layer: layer.half(),
    ],
    ids=["trained", "partitioned by ZeRO-3", "another dtype"],
)
def test_a_weight_that_cannot_be_read_as_it_is_is_left_to_the_layer(spoil: Any) -> None:
    layout = layout_of([[0] * 6], 40)
    x_BTI, parts, _ = made(layout, 40, RANK, torch.float32, False)
    assert linear(x_BTI, parts, layout, 1.0) is not None
    spoil(parts[1][0])
    assert linear(x_BTI, parts, layout, 1.0) is None


def test_autocast_is_left_to_the_layer() -> None:
    layout = layout_of([[0] * 6], 40)
    x_BTI, parts, _ = made(layout, 40, RANK, torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x_BTI, parts, layout, 1.0) is None


@each_way
def test_nothing_is_kept_but_the_input_the_weights_and_one_projection_per_token(times: int, rank: int) -> None:
    layout = layout_of([[0, 0, 0, 1, 1, 1]], times)
    x_BTI, parts, factors = made(layout, times, rank, torch.float32, False)
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        assert linear(x_BTI, parts, layout, 1.0) is not None
    known = {t.untyped_storage().data_ptr() for t in (*factors, *(layer.weight for layer, _ in parts))}
    tokens = times * 6
    projections = 0 if rank > RANK else len(parts) * rank * tokens
    assert sum(size for where, size in found.items() if where not in known) == x_BTI.numel() + projections
