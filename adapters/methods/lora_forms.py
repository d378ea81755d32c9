"""Computes ``y + s · B_g A_g x`` with a pair (A_g, B_g) per group of tokens, in one of four equivalent forms.

- *whole*: one group owns every token. Two matrix products over all of them.
- *spans*: groups own long runs of positions, alike in all rows. Products over slices, into slices of one result.
- *masked*: groups × rank is small. All groups' products at once; a token's products with other groups are set to zero.
- *sorted*: anything else. The tokens are sorted by group, and back.

For backward every form keeps the layer's input and R numbers per token, for any number of groups: slices, masks and
casts are recomputed, not kept. The forms differ by rounding only. They have no second derivative (asking for it is an
error from PyTorch).

Shapes: B rows, T positions, N = B · T tokens, M tokens of one group, I and O input and output features, R rank,
G groups, K = G · R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adapters.placement.order import Order, Piece, order_of
from adapters.placement.router import Layout, Lookup

# Measured on a CPU with 2,048 tokens of width 768; the masked form has groups × rank columns. Masking is fastest up to
# FEW_COLUMNS. Slices are faster if runs have about SHORTEST_MEAN_SPAN positions or more. For shorter runs, masking is
# faster than sorting up to MOST_MASKED_COLUMNS, where its products with zeros cost more than moving the tokens.
FEW_COLUMNS = 16
SHORTEST_MEAN_SPAN = 16
MOST_MASKED_COLUMNS = 32

Form = Literal["whole", "spans", "masked", "sorted"]


def low_rank(
    x_BTI: Tensor,
    value_BTO: Tensor,
    layout: Layout,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    scale: float,
    form: Form | None = None,
) -> Tensor:
    """``value + scale · B_g A_g x`` for the group g that owns each token; ``value`` where none of ``pairs`` does.

    Computed in the value's dtype; gradients have the dtype of their tensor. A group without a token has zero gradients,
    not None: ZeRO needs a gradient for the same parameters on every rank and step.

    Args:
        x_BTI: the layer's input.
        value_BTO: the layer's output, to which the products are added.
        layout: which group owns each position.
        pairs: group → A (R, I) and B (O, R); all groups have the same rank.
        scale: factor of all products.
        form: None: the fastest one for these shapes.

    Returns:
        The new value (B, T, O), in the value's dtype.
    """
    groups = tuple(pairs)
    factors = [*(A_RI for A_RI, _ in pairs.values()), *(B_OR for _, B_OR in pairs.values())]
    if form is None and torch.compiler.is_compiling():
        return _compiled(x_BTI, value_BTO, None if layout.owned_by(groups) else layout.lookup(groups), factors, scale)
    pieces = layout.keep((pieces_of, groups), lambda: pieces_of(layout, groups))
    form = form or form_of(layout, pieces, len(groups) * factors[0].shape[0])
    changed: Tensor
    if form in {"whole", "masked"}:
        owner_TG = layout.lookup(groups).owner_XTG.flatten(0, 1) if form == "masked" else None
        alone = pieces[0].group if form == "whole" and pieces else None
        tokens = (x_BTI.flatten(0, 1), value_BTO.flatten(0, 1))
        changed = _Joint.apply(*tokens, owner_TG, alone, scale, *factors)  # type: ignore[no-untyped-call]
    else:
        order = order_of(layout, groups, x_BTI.shape[0]) if form == "sorted" else None
        changed = _Pieces.apply(x_BTI, value_BTO, pieces, order, scale, *factors)  # type: ignore[no-untyped-call]
    return changed.view_as(value_BTO)


def _compiled(
    x_BTI: Tensor, value_BTO: Tensor, lookup: Lookup | None, factors: Sequence[Tensor], scale: float
) -> Tensor:
    """The whole or, with a ``lookup``, the masked form in plain operations, whose backward torch.compile derives.

    One graph serves all layouts of one shape, because nothing is taken from the spans; rows and positions stay two
    axes, because products of unknown sizes are what a graph for all sizes is slow to make.
    """
    with _no_autocast(value_BTO.device):
        A_KI, B_OK = joined(factors, None, value_BTO.dtype)
        h_BTK = F.linear(x_BTI.to(value_BTO.dtype), A_KI)
        if lookup is not None:
            h_BTGR = h_BTK.view(*h_BTK.shape[:-1], len(factors) // 2, -1) * lookup.owner_XTG[..., None]
            h_BTK = h_BTGR.flatten(-2)
        return torch.add(value_BTO, F.linear(h_BTK, B_OK), alpha=scale)


def whole(x_BTI: Tensor, value_BTO: Tensor, pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """``value + scale · B A x`` for every token, without gradients: the whole form in two products.

    Args:
        x_BTI: the layer's input.
        value_BTO: the layer's output.
        pair: A (R, I) and B (O, R), in the value's dtype.
        scale: factor of the product.
    """
    A_RI, B_OR = pair
    with _no_autocast(value_BTO.device):
        h_NR = x_BTI.to(value_BTO.dtype).flatten(0, 1) @ A_RI.T
        return torch.addmm(value_BTO.flatten(0, 1), h_NR, B_OR.T, alpha=scale).view_as(value_BTO)


def form_of(layout: Layout, pieces: Sequence[Piece], columns: int) -> Form:
    """The fastest form for a layout, its pieces (none if rows differ) and groups × rank columns."""
    if layout.length == 0:
        return "spans"  # an empty list of them
    if len(pieces) == 1:
        return "spans" if pieces[0].group is None else "whole"
    long = layout.spans is not None and layout.length >= SHORTEST_MEAN_SPAN * len(pieces)
    all_owned = all(
        piece.group is not None for piece in pieces
    )  # slices skip tokens of no group, which masking computes
    if long and (columns > FEW_COLUMNS or not all_owned):
        return "spans"
    return "masked" if columns <= MOST_MASKED_COLUMNS else "sorted"


def pieces_of(layout: Layout, groups: tuple[str, ...]) -> tuple[Piece, ...]:
    """The layout's spans as pieces; empty if rows differ."""
    spans = layout.spans or ()
    return tuple(Piece(groups.index(s.group) if s.group in groups else None, s.start, s.stop) for s in spans)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast: dtypes are set explicitly here, and autocast would change those of single products."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1 else product.mul_(scale)


def transposed(B_OR: Tensor) -> Tensor:
    """B (O, R) with contiguous columns: for a small R, oneMKL multiplies by it up to four times as fast."""
    return B_OR.T.contiguous().T


def joined(factors: Sequence[Tensor], alone: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (K, I) and B (O, K), concatenated over all groups, or those of group ``alone``."""
    groups = len(factors) // 2
    if alone is not None:
        return factors[alone].to(dtype), factors[groups + alone].to(dtype)
    return torch.cat([*factors[:groups]]).to(dtype), torch.cat([*factors[groups:]], dim=1).to(dtype)


class _Joint(torch.autograd.Function):
    """One pass over all tokens. Whole: ``alone`` is the group that acts. Masked: ``owner_TG`` is where each acts."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, y_NO: Tensor, owner_TG: Tensor | None, alone: int | None, scale: float, *factors: Tensor
    ) -> Tensor:
        with _no_autocast(y_NO.device):
            A_KI, B_OK = joined(factors, alone, y_NO.dtype)
            h_NK = kept_NR = x_NI.to(y_NO.dtype) @ A_KI.T
            if owner_TG is not None:
                h_NK = masked(h_NK, owner_TG)
                # Only the owning group's numbers are non-zero: the sum over the groups selects them.
                kept_NR = h_NK.view(h_NK.shape[0], owner_TG.shape[1], -1).sum(dim=1)
            ctx.owner_TG, ctx.alone, ctx.scale = owner_TG, alone, scale
            ctx.save_for_backward(x_NI, kept_NR, *factors)
            return torch.addmm(y_NO, h_NK, B_OK.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, h_NK, *factors = ctx.saved_tensors
        groups, alone = len(factors) // 2, ctx.alone
        with _no_autocast(g_NO.device):
            A_KI, B_OK = joined(factors, alone, g_NO.dtype)
            gh_NK = _scaled(g_NO @ transposed(B_OK), ctx.scale)
            if ctx.owner_TG is not None:
                h_NK = masked(h_NK.repeat(1, groups), ctx.owner_TG)
                gh_NK = masked(gh_NK, ctx.owner_TG)
            gx_NI = (gh_NK @ A_KI).to(x_NI.dtype) if ctx.needs_input_grad[0] else None
            gA_KI = gh_NK.T @ x_NI.to(g_NO.dtype)
            gB_KO = _scaled(_outer(h_NK, g_NO), ctx.scale)
        return gx_NI, g_NO, None, None, None, *split(gA_KI, gB_KO, alone, factors)


def split(gA_KI: Tensor, gB_KO: Tensor, alone: int | None, factors: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of ``joined`` as those of the factors, in their dtypes."""
    groups = len(factors) // 2
    if alone is None:
        grads = [*gA_KI.chunk(groups), *(g_RO.T for g_RO in gB_KO.chunk(groups))]
    else:
        grads = [torch.zeros_like(factor) for factor in factors]
        grads[alone], grads[groups + alone] = gA_KI, gB_KO.T
    return _in_dtype(grads, factors)


def masked(h_NK: Tensor, owner_TG: Tensor) -> Tensor:
    """In place: zero where another group owns the token. ``owner_TG`` covers one row, or all rows concatenated."""
    positions, groups = owner_TG.shape
    h_NK.view(-1, positions, groups, h_NK.shape[1] // groups).mul_(owner_TG[..., None])
    return h_NK


def _outer(h_MR: Tensor, g_MO: Tensor) -> Tensor:
    """``hᵀ g``, (R, O): B's gradient, transposed.

    Autograd computes the transposed product, ``gᵀ h``, for which oneMKL takes up to nine times as long (rank 8).
    """
    return h_MR.T @ g_MO


def _in_dtype(grads: Sequence[Tensor], of: Sequence[Tensor]) -> list[Tensor]:
    return [grad.to(tensor.dtype) for grad, tensor in zip(grads, of, strict=True)]


def _cast(factors: Sequence[Tensor], pieces: Sequence[Piece], dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
    """A and B of the groups that own a piece, cast once however many pieces they own."""
    present = {piece.group for piece in pieces if piece.group is not None}
    groups = len(factors) // 2
    return {group: (factors[group].to(dtype), factors[groups + group].to(dtype)) for group in present}


class _Pieces(torch.autograd.Function):
    """Piece by piece: slices of every row; with an ``Order``, of the sorted tokens as one row, returned as (N, O)."""

    @staticmethod
    def forward(
        ctx: Any, x_BTI: Tensor, y_BTO: Tensor, pieces: tuple[Piece, ...], order: Order | None, scale: float,
        *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        rank = factors[0].shape[0]
        ctx.pieces, ctx.order, ctx.scale = order.pieces if order else pieces, order, scale
        ctx.shape = y_BTO.shape
        with _no_autocast(y_BTO.device):
            x_LMI = _sort(x_BTI.to(y_BTO.dtype), order)
            out_LMO = y_BTO.clone(memory_format=torch.contiguous_format) if order is None else _sort(y_BTO, order)
            h_LMR = x_LMI.new_empty(*x_LMI.shape[:2], rank)
            cast = _cast(factors, ctx.pieces, y_BTO.dtype)
            for group, start, stop in ctx.pieces:
                if group is not None:
                    A_RI, B_OR = cast[group]
                    _add_product(h_LMR[:, start:stop], x_LMI[:, start:stop], A_RI.T, beta=0)
                    _add_product(out_LMO[:, start:stop], h_LMR[:, start:stop], B_OR.T, alpha=scale)
        ctx.save_for_backward(x_BTI, h_LMR, *factors)
        return _unsort(out_LMO, order)  # a view made here could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_BTI, h_LMR, *factors = ctx.saved_tensors
        g_BTO = g.reshape(ctx.shape)
        groups = len(factors) // 2
        grads = [torch.zeros_like(factor, dtype=g_BTO.dtype) for factor in factors]
        with _no_autocast(g_BTO.device):
            x_LMI, g_LMO = _sort(x_BTI.to(g_BTO.dtype), ctx.order), _sort(g_BTO, ctx.order)
            gh_LMR = torch.empty_like(h_LMR)
            cast = _cast(factors, ctx.pieces, g_BTO.dtype)
            for group, start, stop in ctx.pieces:
                if group is not None:
                    slices = _Slices(*(value[:, start:stop] for value in (x_LMI, g_LMO, h_LMR, gh_LMR)))
                    _add_grads(slices, cast[group][1], grads[group], grads[groups + group], ctx.scale, x_LMI.numel())
            gx_BTI = None
            if ctx.needs_input_grad[0]:
                gx_LMI = torch.empty_like(x_LMI, memory_format=torch.contiguous_format)
                for group, start, stop in ctx.pieces:
                    if group is None:
                        gx_LMI[:, start:stop].zero_()
                    else:
                        _add_product(gx_LMI[:, start:stop], gh_LMR[:, start:stop], cast[group][0], beta=0)
                gx_BTI = _unsort(gx_LMI, ctx.order).view_as(x_BTI).to(x_BTI.dtype)
        return gx_BTI, g_BTO, None, None, None, *_in_dtype(grads, factors)


class _Slices(NamedTuple):
    """One piece in backward: the input, the output's gradient, the projection, and where its gradient is written."""

    x_LMI: Tensor
    g_LMO: Tensor
    h_LMR: Tensor
    gh_LMR: Tensor


def _add_grads(slices: _Slices, B_OR: Tensor, gA_RI: Tensor, gB_OR: Tensor, scale: float, most_copied: int) -> None:
    """Add one piece's part to the gradients of A and B, and write the gradient of its projection.

    The rows' slices are concatenated, because one product over all of them is faster than a sum over rows; only as many
    rows at a time as keep the copies smaller than the input's gradient, which is allocated afterwards.
    """
    numbers_per_row = slices.x_LMI.shape[1] * max(slices.x_LMI.shape[2], slices.g_LMO.shape[2])
    at_once = max(1, most_copied // max(1, numbers_per_row))
    for x, g, h, gh in zip(*(torch.split(value, at_once) for value in slices), strict=True):
        g_NO = g.flatten(0, 1)
        gh_NR = _scaled(g_NO @ transposed(B_OR), scale)
        gh.copy_(gh_NR.view_as(gh))
        gB_OR.T.add_(_outer(h.flatten(0, 1), g_NO), alpha=scale)
        del g_NO
        gA_RI.addmm_(gh_NR.T, x.flatten(0, 1))


def _add_product(out_LMO: Tensor, x_LMI: Tensor, W_IO: Tensor, beta: float = 1, alpha: float = 1) -> None:
    """``out = beta · out + alpha · x W`` in place; ``out`` may be a slice of every row."""
    if out_LMO.shape[0] == 1:
        out_LMO[0].addmm_(x_LMI[0], W_IO, beta=beta, alpha=alpha)
    else:
        out_LMO.baddbmm_(x_LMI, W_IO.expand(x_LMI.shape[0], -1, -1), beta=beta, alpha=alpha)


def _sort(value_BTD: Tensor, order: Order | None) -> Tensor:
    """All tokens as one row (1, N, D), sorted by group; unchanged without an order."""
    return value_BTD if order is None else value_BTD.flatten(0, 1).index_select(0, order.sorted_N)[None]


def _unsort(value_LMD: Tensor, order: Order | None) -> Tensor:
    return value_LMD if order is None else value_LMD[0].index_select(0, order.back_N)
