"""The forms in which context-specific LoRA is computed are one function: against float64, and against each other.

Shapes: B rows, T positions, I and O input and output features, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adapters.methods.lora_forms import (
    FEW_COLUMNS,
    MOST_MASKED_COLUMNS,
    SHORTEST_MEAN_SPAN,
    Form,
    form_of,
    low_rank,
    order_of,
    pieces_of,
)
from adapters.placement.router import Layout, Router
from harness.core.contexts import Segment

GROUPS = ("image", "text")
ROWS, INSIDE, OUTSIDE, RANK = 3, 12, 8, 3
each_form = pytest.mark.parametrize("form", ["spans", "masked", "sorted"])
# image 0, text 1, no group 2
ALIKE = [0] * 4 + [2, 2, 1, 0, 0, 1, 1]
ROWS_DIFFER = [[0, 0, 1, 1, 2], [1, 1, 1, 1, 1], [2, 0, 1, 2, 0]]
LAYOUTS = {
    "alike": [ALIKE], "two tokens": [[0, 1]], "one token": [[1]], "image alone": [[0] * 6], "nobody's": [[2] * 4],
    "no token": [[]], "rows differ": ROWS_DIFFER, "rows differ, no text": [[0, 2], [2, 0], [0, 0]],
}  # fmt: skip
each_layout = pytest.mark.parametrize("ids", LAYOUTS.values(), ids=LAYOUTS)


def layout_of(ids: Sequence[Sequence[int]]) -> Layout:
    router = Router({"image": "image", "text": "text", "none": None})
    router.set_context_ids(torch.tensor(ids, dtype=torch.long).view(len(ids), -1))
    return router.layout


def numbers(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, list[Any]]:
    """Input, output and pairs, all of them leaves that want a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    pairs = [(draw(RANK, INSIDE), draw(OUTSIDE, RANK)) for _ in GROUPS]
    return draw(ROWS, length, INSIDE), draw(ROWS, length, OUTSIDE), pairs


def of_groups(pairs: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(GROUPS, pairs, strict=True))


def reference(x_BTI: Tensor, y_BTO: Tensor, layout: Layout, pairs: Sequence[Any], scale: float) -> Tensor:
    """Algorithm 1 of the paper: every group's update, and a one-hot choice among them."""
    onehot_XTG = F.one_hot(layout.group_ids_XT + 1, 1 + len(GROUPS))[..., 1:].to(y_BTO.dtype)
    A_GRI, B_GOR = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    update_BTGO = torch.einsum("gor,gri,bti->btgo", B_GOR, A_GRI, x_BTI)
    return y_BTO + scale * torch.einsum("btgo,btg->bto", update_BTGO, onehot_XTG.expand(x_BTI.shape[0], -1, -1))


def possible(form: str, layout: Layout) -> bool:
    """Slices need equal rows; the mask is never chosen if there are no tokens."""
    return layout.spans is not None if form == "spans" else form != "masked" or layout.length > 0


@each_form
@each_layout
def test_the_output_can_be_changed_in_place(ids: Sequence[Sequence[int]], form: Form) -> None:
    layout = layout_of(ids)
    x_BTI, y_BTO, pairs = numbers(layout.length)
    if not possible(form, layout):
        pytest.skip("this form is not for such a layout")
    grads = []
    for change in (torch.mul, Tensor.mul_):
        found_BTO = change(low_rank(x_BTI, y_BTO, layout, of_groups(pairs), 0.5, form), 2.0)
        inputs = [x_BTI, y_BTO, *(factor for pair in pairs for factor in pair)]
        grads.append(torch.autograd.grad(found_BTO.sin().sum(), inputs))
    for mine, other in zip(*reversed(grads), strict=True):
        assert torch.equal(mine, other)


@each_layout
@each_form
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_every_form_is_the_papers_algorithm(form: Form, ids: Sequence[Sequence[int]], scale: float) -> None:
    """Forward and all gradients in float64; 1e-12 is rounding only. A group without a token: zero, not None."""
    layout = layout_of(ids)
    x_BTI, y_BTO, pairs = numbers(layout.length)
    wanted = [x_BTI, y_BTO, *(factor for pair in pairs for factor in pair)]
    weight_BTO = torch.randn(y_BTO.shape, dtype=torch.float64)
    expected_BTO = reference(x_BTI, y_BTO, layout, pairs, scale)
    expected = torch.autograd.grad((expected_BTO * weight_BTO).sum(), wanted)
    forms = [form, None] if possible(form, layout) else [None]
    for chosen in forms:
        found_BTO = low_rank(x_BTI, y_BTO, layout, of_groups(pairs), scale, chosen)
        found = torch.autograd.grad((found_BTO * weight_BTO).sum(), wanted)
        torch.testing.assert_close(found_BTO, expected_BTO, rtol=1e-12, atol=1e-12)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@each_form
def test_gradients_against_finite_differences(form: Form) -> None:
    layout = layout_of([ALIKE] if form == "spans" else ROWS_DIFFER)
    x_BTI, y_BTO, pairs = numbers(layout.length)
    (a0, b0), (a1, b1) = pairs

    def function(x: Tensor, y: Tensor, *f: Tensor) -> Tensor:
        return low_rank(x, y, layout, of_groups([(f[0], f[1]), (f[2], f[3])]), 0.7, form)

    assert torch.autograd.gradcheck(function, (x_BTI, y_BTO, a0, b0, a1, b1))


@each_form
@pytest.mark.parametrize("ids", [[ALIKE], ROWS_DIFFER], ids=["alike", "rows differ"])
def test_another_groups_numbers_do_not_reach_a_token(form: Form, ids: Sequence[Sequence[int]]) -> None:
    """Bitwise equal, in the output and the gradient of the input; tokens without a group keep their value."""
    layout = layout_of(ids)
    if not possible(form, layout):
        pytest.skip("slices need rows that are alike")
    x_BTI, y_BTO, pairs = numbers(layout.length, torch.float32)
    other = [(pairs[0][0] + 1, pairs[0][1] - 2), pairs[1]]
    outputs = [low_rank(x_BTI, y_BTO, layout, of_groups(p), 1.0, form) for p in (pairs, other)]
    grads = [torch.autograd.grad(out.square().sum(), x_BTI)[0] for out in outputs]
    image_BT = (layout.group_ids_XT == 0).expand(ROWS, -1)
    nobody_BT = (layout.group_ids_XT == -1).expand(ROWS, -1)
    assert image_BT.any()
    for before, after in (outputs, grads):
        assert torch.equal(before[~image_BT], after[~image_BT])
        assert (before[image_BT] != after[image_BT]).any(dim=-1).all()
    assert nobody_BT.any()
    assert torch.equal(outputs[0][nobody_BT], y_BTO[nobody_BT])


@each_form
def test_equal_pairs_are_one_pair_in_fp32(form: Form) -> None:
    """1e-6 relative to the largest number: the forms add in different orders."""
    split, whole = layout_of([[0] * 20 + [1] * 44]), layout_of([[0] * 64])
    x_BTI, y_BTO, pairs = numbers(64, torch.float32)
    found = low_rank(x_BTI, y_BTO, split, of_groups([pairs[0], pairs[0]]), 1.0, form)
    expected = low_rank(x_BTI, y_BTO, whole, {GROUPS[0]: pairs[0]}, 1.0)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# ── What is kept for backward


def kept(function: Any) -> tuple[int, set[int]]:
    """Numbers kept for backward, each storage once, with its address."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(found.values()), set(found)


@each_form
def test_nothing_is_kept_but_the_input_the_pairs_and_one_projection_per_token(form: Form) -> None:
    layout = layout_of([[0] * 20 + [1] * 44])
    x_BTI, y_BTO, pairs = numbers(64, torch.float32)
    count, where = kept(lambda: low_rank(x_BTI, y_BTO, layout, of_groups(pairs), 1.0, form))
    factors = [factor for pair in pairs for factor in pair]
    assert count == x_BTI.numel() + sum(f.numel() for f in factors) + ROWS * 64 * RANK
    assert {t.untyped_storage().data_ptr() for t in (x_BTI, *factors)} <= where


# ── Which form


@pytest.mark.parametrize(
    ("ids", "columns", "expected"),
    [
        ([[0] * 9], 1000, "whole"),
        ([[0] * 64 + [1] * 64], FEW_COLUMNS, "masked"),
        ([[0] * 64 + [1] * 64], FEW_COLUMNS + 1, "spans"),
        ([[0] * 64 + [2] * 64], FEW_COLUMNS, "spans"),
        ([[0] * 64 + [1] * 64], 128, "spans"),
        ([[0, 1] * 8], MOST_MASKED_COLUMNS, "masked"),
        ([[0, 1] * 8], MOST_MASKED_COLUMNS + 1, "sorted"),
        ([[0] * SHORTEST_MEAN_SPAN + [1] * SHORTEST_MEAN_SPAN], 128, "spans"),
        ([[0] * SHORTEST_MEAN_SPAN + [1] * (SHORTEST_MEAN_SPAN - 1)], 128, "sorted"),
        (ROWS_DIFFER, 4, "masked"),
        (ROWS_DIFFER, 128, "sorted"),
        ([[2] * 4], 128, "spans"),
    ],
)
def test_the_form_is_chosen_by_layout_groups_and_rank(
    ids: Sequence[Sequence[int]], columns: int, expected: str
) -> None:
    layout = layout_of(ids)
    assert form_of(layout, pieces_of(layout, GROUPS), columns) == expected


def test_the_order_brings_each_groups_tokens_together_and_back() -> None:
    for ids in ([ALIKE], ROWS_DIFFER):
        layout = layout_of(ids)
        order = order_of(layout, GROUPS, ROWS)
        groups_N = layout.group_ids_XT.expand(ROWS, -1).flatten()[order.sorted_N]
        for group, start, stop in order.pieces:
            assert (groups_N[start:stop] == (-1 if group is None else group)).all()
        assert order.pieces[-1].stop == groups_N.shape[0]
        assert torch.equal(order.sorted_N[order.back_N], torch.arange(groups_N.shape[0]))


# ── Dtypes, modes


@each_form
@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_pairs_act_on_bf16_values(form: Form, autocast: bool) -> None:
    """Against float64: 2 % of the largest number, as bf16 has 8 bits; outputs in bf16, gradients as their owners."""
    layout = layout_of([ALIKE])
    x_BTI, y_BTO, pairs = numbers(len(ALIKE))
    expected_BTO = reference(x_BTI, y_BTO, layout, pairs, 0.4)
    expected = torch.autograd.grad(expected_BTO.sum(), [x_BTI, pairs[0][0], pairs[0][1]])
    x_dtype = torch.float32 if autocast else torch.bfloat16  # under autocast a norm's output is fp32
    x, y = x_BTI.detach().to(x_dtype).requires_grad_(), y_BTO.detach().bfloat16()
    single = [tuple(f.detach().float().requires_grad_() for f in pair) for pair in pairs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found_BTO = low_rank(x, y, layout, of_groups(single), 0.4, form)
        found = torch.autograd.grad(found_BTO.sum(), [x, *single[0]])
    assert found_BTO.dtype == torch.bfloat16
    assert [g.dtype for g in found] == [x_dtype, torch.float32, torch.float32]
    for mine, other in zip((found_BTO, *found), (expected_BTO, *expected), strict=True):
        assert (mine.double() - other).abs().max() < 0.02 * other.abs().max()


@each_form
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_numbers_and_then_gradients_again(form: Form, mode: Any) -> None:
    layout = layout_of([ALIKE])
    x_BTI, y_BTO, pairs = numbers(len(ALIKE), torch.float32)
    with mode():  # the first to ask, so that what is kept for the layout is made in this mode
        without = low_rank(x_BTI, y_BTO, layout, of_groups(pairs), 1.0, form)
    found = low_rank(x_BTI, y_BTO, layout, of_groups(pairs), 1.0, form)
    assert torch.equal(found, without)
    assert not without.requires_grad
    found.sum().backward()
    assert pairs[0][0].grad is not None


@each_form
def test_a_second_derivative_is_refused(form: Form) -> None:
    layout = layout_of([ALIKE])
    x_BTI, y_BTO, pairs = numbers(len(ALIKE))
    out = low_rank(x_BTI, y_BTO, layout, of_groups(pairs), 1.0, form)
    (grad,) = torch.autograd.grad(out.square().sum(), x_BTI, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Layer(nn.Module):
    """A linear layer and its pairs."""

    def __init__(self, layout: Layout, form: Form) -> None:
        super().__init__()
        self.layout, self.form = layout, form
        _, _, pairs = numbers(1, torch.float32)
        self.pairs = nn.ParameterList([factor.detach() for pair in pairs for factor in pair])
        self.linear = nn.Linear(INSIDE, OUTSIDE).requires_grad_(False)

    def forward(self, x_BTI: Tensor) -> Tensor:
        a0, b0, a1, b1 = self.pairs
        return low_rank(x_BTI, self.linear(x_BTI), self.layout, of_groups([(a0, b0), (a1, b1)]), 1.0, self.form)


def gradients(layer: Layer, function: Any) -> list[Tensor]:
    x_BTI = numbers(layer.layout.length, torch.float32)[0]
    layer.zero_grad()
    function(x_BTI).square().sum().backward()
    return [x_BTI.grad, *(p.grad for p in layer.pairs)]  # type: ignore[list-item]


@each_form
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(form: Form, use_reentrant: bool) -> None:
    layer = Layer(layout_of([ALIKE]), form)
    expected = gradients(layer, layer)
    found = gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_form
def test_torch_compile_gives_the_same_gradients(form: Form) -> None:
    """In one graph; with a backend that does not compile, because only tracing can fail."""
    layer = Layer(layout_of([ALIKE]), form)
    expected = gradients(layer, layer)
    found = gradients(layer, torch.compile(layer, backend="aot_eager", fullgraph=True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_layout_from_segments_of_no_length_counts_no_token() -> None:
    router = Router({"image": "image", "text": "text"})
    router.set_layout([Segment(0, 0, "image"), Segment(0, 3, "text"), Segment(3, 3, "image")])
    assert form_of(router.layout, pieces_of(router.layout, GROUPS), 8) == "whole"
