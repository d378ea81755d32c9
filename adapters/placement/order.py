"""The tokens of a pass sorted by group, for layouts in which rows differ or groups alternate.

Tokens are moved by gathering alone, in backward too, through the inverse order. Indexing's own backward would add at
indices that it must expect to repeat: slow on a GPU, and in no fixed order.

Shapes: B rows, T positions, N = B · T tokens, D features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapters.placement.router import Layout


class Piece(NamedTuple):
    """A run of positions (or of sorted tokens) and the index of the group that owns it; None: none of the groups."""

    group: int | None
    start: int
    stop: int


class Order(NamedTuple):
    """The tokens sorted by group, those without a group last."""

    sorted_N: Tensor  # int64: index, in the concatenated rows, of the token at each place
    back_N: Tensor  # int64: its inverse
    pieces: tuple[Piece, ...]


def order_of(layout: Layout, groups: tuple[str, ...], rows: int) -> Order:
    """The layout's tokens sorted by group; all layers of a pass need the same order."""
    return layout.keep((order_of, groups, rows), lambda: _order(layout, groups, rows))


def _order(layout: Layout, groups: tuple[str, ...], rows: int) -> Order:
    index_XT = layout.lookup(groups).index_XT
    sorted_N = index_XT.expand(rows, -1).flatten().argsort(stable=True)
    if layout.spans is None:
        counts = [layout.positions[group].shape[0] for group in groups]
    else:
        counts = [rows * sum(s.stop - s.start for s in layout.spans if s.group == group) for group in groups]
    stops = [sum(counts[: index + 1]) for index in range(len(counts))]
    pieces = [Piece(index, stop - counts[index], stop) for index, stop in enumerate(stops)]
    return Order(sorted_N, sorted_N.argsort(), (*pieces, Piece(None, stops[-1], sorted_N.shape[0])))


class _Move(torch.autograd.Function):
    """Gather all tokens (N, D) in another order; backward gathers their gradients by the inverse."""

    @staticmethod
    def forward(value_ND: Tensor, to_N: Tensor, _back_N: Tensor) -> Tensor:
        return value_ND.index_select(0, to_N)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor, None, None]:
        to_N, back_N = ctx.saved_tensors
        moved_ND: Tensor = _Move.apply(g_ND, back_N, to_N)  # type: ignore[no-untyped-call]
        return moved_ND, None, None


def sort(value_ND: Tensor, order: Order) -> Tensor:
    """The tokens of the concatenated rows (N, D), sorted by group."""
    return _moved(value_ND, order.sorted_N, order.back_N)


def unsort(value_ND: Tensor, order: Order) -> Tensor:
    """Sorted tokens (N, D) in the order of the rows again."""
    return _moved(value_ND, order.back_N, order.sorted_N)


def _moved(value_ND: Tensor, to_N: Tensor, back_N: Tensor) -> Tensor:
    # Under torch.func the function's own backward would need a rule for vmap; indexing has one.
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return value_ND.index_select(0, to_N)
    moved_ND: Tensor = _Move.apply(value_ND, to_N, back_N)  # type: ignore[no-untyped-call]
    return moved_ND
