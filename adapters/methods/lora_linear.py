"""A linear layer and its low-rank pairs as one operation: ``y = W x + b + s · B_g A_g x``.

Adding ``s · B A x`` to the layer's output reads and writes all of it, and so does backward with the gradient of the
input. Two ways avoid that:

- *folded*: ``W_g = W + s · B_g A_g`` for each group that has tokens, then one product per group over its sorted tokens.
  Two passes over the weight instead of two over the tokens' inputs and outputs, so it is chosen where there are fewer
  numbers in the weights than in the tokens.
- *added*: the layer's own product, to which those of the pairs are added in place; groups by a mask, as in lora_forms.

What neither suits (many groups × rank, quantised or partitioned weights, dropout, autocast, compilation) is computed by
the layer and ``lora_forms.low_rank``, one after the other. All differ by rounding only.

For backward *folded* keeps the layer's input (sorted, once for layers that read the same), *added* the input and R
numbers per token. The weight itself gets no gradient, so it must not want one.

Shapes: B rows, T positions, N = B · T tokens, I and O input and output features, R rank, G groups, K = G · R.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adapters.methods.lora_forms import MOST_MASKED_COLUMNS, pieces_of
from adapters.placement.order import Order, Piece, order_of, sort
from adapters.placement.router import Layout

_FOLDED_BYTES = 4  # of a number, at least: in 16 bits, the sum of a weight and a small update would lose the update
Pairs = Mapping[str, tuple[Tensor, Tensor]]
Part = tuple[nn.Linear, Pairs]


def linear(x_BTI: Tensor, parts: Sequence[Part], layout: Layout, scale: float) -> tuple[Tensor, ...] | None:
    """The outputs of layers that read one input, each with ``scale · B_g A_g x`` for the group g that owns each token.

    Gradients are those of x and of the pairs; a group without a token has zero gradients, not None.

    Args:
        x_BTI: the layers' input.
        parts: each linear layer with its pairs: group → A (R, I) and B (O, R). Groups and rank are the same in all.
        layout: which group owns each position.
        scale: factor of all products.

    Returns:
        For each layer (B, T, O), or None: neither way fits.
    """
    if not all(_can_read(layer, x_BTI) for layer, _ in parts):
        return None
    groups = tuple(parts[0][1])
    owned = layout.keep((_owned, groups), lambda: _owned(layout, groups))
    if not owned:
        return None
    factors = [[*(A_RI for A_RI, _ in pairs.values()), *(B_OR for _, B_OR in pairs.values())] for _, pairs in parts]
    few = len(groups) * factors[0][0].shape[0] <= MOST_MASKED_COLUMNS
    same_dtype = factors[0][0].dtype == x_BTI.dtype
    if same_dtype and (len(owned) == 1 or not few) and _fewer_in_weights(x_BTI, parts, owned):
        return _folded(x_BTI, [layer for layer, _ in parts], layout, groups, owned, factors, scale)
    if len(owned) == 1 and len(groups) == 1:
        owner_G1N = None
    elif few:
        owner_G1N = _owner(layout, groups, x_BTI)
    else:
        return None
    plan = _Plan((), None, scale, len(parts), len(groups))
    weights = [*(layer.weight for layer, _ in parts), *(layer.bias for layer, _ in parts)]
    flat = [factor for own in factors for factor in own]
    added: tuple[Tensor, ...] = _Added.apply(x_BTI, owner_G1N, plan, *weights, *flat)  # type: ignore[no-untyped-call]
    return _of_rows(added, x_BTI)


def _of_rows(outputs: Sequence[Tensor], x_BTI: Tensor) -> tuple[Tensor, ...]:
    """(N, O) → (B, T, O), outside the function: a view made inside of it cannot be changed in place (Llama 4 does)."""
    return tuple(y_NO.view(*x_BTI.shape[:-1], -1) for y_NO in outputs)


def _owner(layout: Layout, groups: tuple[str, ...], x_BTI: Tensor) -> Tensor:
    """One where a group owns the token, else zero: (G, 1, N)."""
    rows, dtype = x_BTI.shape[0], x_BTI.dtype

    def make() -> Tensor:
        owner_XTG = layout.lookup(groups).owner_XTG
        return owner_XTG.expand(rows, -1, -1).flatten(0, 1).T.to(dtype).contiguous()[:, None]

    return layout.keep((_owner, groups, rows, dtype), make)


def _fewer_in_weights(x_BTI: Tensor, parts: Sequence[Part], owned: Sequence[int | None]) -> bool:
    """Whether forward and backward make fewer numbers of folded weights than they add to outputs and gradients."""
    if x_BTI.element_size() < _FOLDED_BYTES:
        return False
    tokens, present = x_BTI.shape[0] * x_BTI.shape[1], sum(group is not None for group in owned)
    features = [(layer.in_features, layer.out_features) for layer, _ in parts]
    return 2 * present * sum(i * o for i, o in features) <= tokens * sum(i + o for i, o in features)


def _folded(
    x_BTI: Tensor, layers: Sequence[nn.Linear], layout: Layout, groups: tuple[str, ...], owned: Sequence[int | None],
    factors: Sequence[Sequence[Tensor]], scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    if len(owned) == 1:
        order, kept_NI = None, x_BTI.detach().flatten(0, 1)
        pieces: tuple[Piece, ...] = (Piece(owned[0], 0, kept_NI.shape[0]),)
    else:
        order = order_of(layout, groups, x_BTI.shape[0])
        pieces = tuple(piece for piece in order.pieces if piece.start < piece.stop)
        kept_NI = sort(x_BTI.detach().flatten(0, 1), order)
    weights = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
    plan = _Plan(pieces, order, scale, len(layers), len(groups))
    flat = [factor for own in factors for factor in own]
    outputs: tuple[Tensor, ...] = _Folded.apply(x_BTI, kept_NI, plan, *weights, *flat)  # type: ignore[no-untyped-call]
    return _of_rows(outputs, x_BTI)


def _can_read(layer: nn.Linear, x_BTI: Tensor) -> bool:
    """Whether the weight is a whole frozen matrix in the input's dtype, on its device."""
    weight_OI, bias_O = layer.weight, layer.bias
    whole = type(weight_OI) in (nn.Parameter, FakeTensor)  # of a trace without values, which must take the same way
    if not whole or hasattr(weight_OI, "ds_id") or weight_OI.requires_grad:
        return False  # quantised, a part of it (FSDP's, ZeRO-3's), or trained
    if bias_O is not None and (bias_O.requires_grad or bias_O.dtype != x_BTI.dtype):
        return False
    if torch.is_autocast_enabled(x_BTI.device.type):
        return False
    return weight_OI.dtype == x_BTI.dtype and weight_OI.device == x_BTI.device and x_BTI.numel() > 0


def _owned(layout: Layout, groups: tuple[str, ...]) -> tuple[int | None, ...]:
    """Indices of the groups that have tokens, None for tokens of no group; empty where this is no group's pass."""
    if layout.spans is None:
        counts = [layout.positions[group].shape[0] for group in groups]
        found: list[int | None] = [index for index, count in enumerate(counts) if count]
        if sum(counts) < layout.host_ids_XT.size:
            found.append(None)
    else:
        found = list(dict.fromkeys(piece.group for piece in pieces_of(layout, groups) if piece.stop > piece.start))
    return () if set(found) <= {None} else tuple(found)


def _fold(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight_OI, B_OR, A_RI, alpha=scale)


class _Plan(NamedTuple):
    """What is computed: the numbers of layers and groups, and the pieces that are folded, sorted by ``order`` if any.

    Tensors follow each other as weights, biases, and for each layer the A's and then the B's of its groups.
    """

    pieces: tuple[Piece, ...]
    order: Order | None
    scale: float
    layers: int
    groups: int

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Weights, biases and factors."""
        return tensors[: self.layers], tensors[self.layers : 2 * self.layers], tensors[2 * self.layers :]

    def joined(self, factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """All A's as one (L · K, I), and each layer's B's as one (O, K)."""
        count = self.groups
        of_A: list[Tensor] = []
        of_B: list[Tensor] = []
        for first in range(0, len(factors), 2 * count):
            of_A += factors[first : first + count]
            own = factors[first + count : first + 2 * count]
            of_B.append((own[0] if count == 1 else torch.cat([*own], dim=1)).to(dtype))
        return (of_A[0] if len(of_A) == 1 else torch.cat(of_A)).to(dtype), of_B

    def parted(self, gA_KI: Tensor, gBs_KO: Sequence[Tensor], factors: Sequence[Tensor]) -> Iterator[Tensor]:
        """The gradients of what ``joined`` joins, in the factors' order and dtypes."""
        rank, count = factors[0].shape[0], self.groups
        of_A = torch.split(gA_KI, rank)
        for layer, gB_KO in enumerate(gBs_KO):
            own = [*of_A[layer * count : (layer + 1) * count], *(gB_RO.T for gB_RO in torch.split(gB_KO, rank))]
            yield from (grad.to(factors[0].dtype) for grad in own)

    def pair(self, factors: Sequence[Tensor], layer: int, group: int) -> tuple[Tensor, Tensor]:
        """A and B of a layer and a group."""
        first = 2 * self.groups * layer + group
        return factors[first], factors[first + self.groups]

    def weight(self, weight_OI: Tensor, factors: Sequence[Tensor], layer: int, group: int | None) -> Tensor:
        """The weight of a layer for the tokens of a group."""
        return weight_OI if group is None else _fold(weight_OI, *self.pair(factors, layer, group), self.scale)


class _Folded(torch.autograd.Function):
    """One product per layer and piece, with the weight that the piece's group makes of the layer's."""

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, kept_NI: Tensor, plan: _Plan, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, factors = plan.split(tensors)
        ctx.plan, ctx.axes = plan, x_BTI.shape[:-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kept_NI, *weights, *factors)
        outputs = []
        for layer, (weight_OI, bias_O) in enumerate(zip(weights, biases, strict=True)):
            if plan.order is None:
                y_NO = F.linear(kept_NI, plan.weight(weight_OI, factors, layer, plan.pieces[0].group), bias_O)
            else:
                y_NO = kept_NI.new_empty(kept_NI.shape[0], weight_OI.shape[0])
                for group, start, stop in plan.pieces:
                    own_IO = plan.weight(weight_OI, factors, layer, group).T
                    if bias_O is None:
                        torch.mm(kept_NI[start:stop], own_IO, out=y_NO[start:stop])
                    else:
                        torch.addmm(bias_O, kept_NI[start:stop], own_IO, out=y_NO[start:stop])
                y_NO = y_NO.index_select(0, plan.order.back_N)
            outputs.append(y_NO)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs_NO: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, (kept_NI, *tensors) = ctx.plan, ctx.saved_tensors
        weights, factors, order = tensors[: plan.layers], tensors[plan.layers :], plan.order
        gs = {layer: g for layer, g in enumerate(gs_NO) if g is not None}
        if order is not None:
            gs = {layer: g.index_select(0, order.sorted_N) for layer, g in gs.items()}
        gx_NI = torch.empty_like(kept_NI) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = [None] * len(factors)
        for group, start, stop in plan.pieces:
            whole = order is None
            x_MI = kept_NI if whole else kept_NI[start:stop]
            own = {layer: g_NO if whole else g_NO[start:stop] for layer, g_NO in gs.items()}
            if group is not None:
                pairs = [plan.pair(factors, layer, group) for layer in gs]
                for layer, grad in zip(gs, _grads(x_MI, list(own.values()), pairs, plan.scale), strict=True):
                    first = 2 * plan.groups * layer + group
                    grads[first], grads[first + plan.groups] = grad
            if gx_NI is not None:
                gx_MI = gx_NI if whole else gx_NI[start:stop]
                for number, (layer, g_MO) in enumerate(own.items()):
                    gx_MI.addmm_(g_MO, plan.weight(weights[layer], factors, layer, group), beta=int(number > 0))
        if gx_NI is not None:
            gx_NI = (gx_NI if order is None else gx_NI.index_select(0, order.back_N)).view(*ctx.axes, -1)
        done = (torch.zeros_like(of) if grad is None else grad for grad, of in zip(grads, factors, strict=True))
        return gx_NI, None, None, *([None] * (2 * plan.layers)), *done


def _grads(
    x_MI: Tensor, gs: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of each layer's pair (A, B) from the tokens of one group: all A's in one product."""
    A_KI = pairs[0][0] if len(pairs) == 1 else torch.cat([A_RI for A_RI, _ in pairs])
    h_KM = A_KI @ x_MI.T
    gh_KM = torch.empty_like(h_KM)
    places = _places(len(pairs), pairs[0][0].shape[0])
    for place, g_MO, (_, B_OR) in zip(places, gs, pairs, strict=True):
        torch.mm(B_OR.T, g_MO.T, out=gh_KM[place])
    gA_KI = _scaled(gh_KM @ x_MI, scale)
    for place, g_MO in zip(places, gs, strict=True):
        yield gA_KI[place], _scaled(h_KM[place] @ g_MO, scale).T


def _places(count: int, size: int) -> list[slice]:
    return [slice(index * size, (index + 1) * size) for index in range(count)]


def _scaled(product: Tensor, scale: float) -> Tensor:
    return product if scale == 1 else product.mul_(scale)


class _Added(torch.autograd.Function):
    """The layers' own products, to which those of all groups' pairs are added in place.

    Rows of h (L · K, N) are ordered by layer, group and rank; a group's are zero where another one owns the token.
    """

    @staticmethod
    def forward(ctx: Any, x_BTI: Tensor, owner_G1N: Tensor | None, plan: _Plan, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, factors = plan.split(tensors)
        A_KI, Bs_OK = plan.joined(factors, x_BTI.dtype)
        x_NI = x_BTI.flatten(0, 1)
        h_KN = kept_RN = A_KI @ x_NI.T
        if owner_G1N is not None:
            own_LGRN = h_KN.view(plan.layers, plan.groups, -1, x_NI.shape[0]).mul_(owner_G1N)
            kept_RN = own_LGRN.sum(dim=1)  # all but the owner's are zero
        ctx.plan, ctx.owner_G1N = plan, owner_G1N  # the owner is the layout's, of which there is one for all layers
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_BTI, kept_RN, *weights, *factors)
        outputs = []
        places = _places(plan.layers, Bs_OK[0].shape[1])
        for place, weight_OI, bias_O, B_OK in zip(places, weights, biases, Bs_OK, strict=True):
            y_NO = F.linear(x_NI, weight_OI, bias_O)
            y_NO.addmm_(h_KN[place].T, B_OK.T, alpha=plan.scale)
            outputs.append(y_NO)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs_NO: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, owner_G1N, (x_BTI, h_KN, *tensors) = ctx.plan, ctx.owner_G1N, ctx.saved_tensors
        weights, factors = tensors[: plan.layers], tensors[plan.layers :]
        A_KI, Bs_OK = plan.joined(factors, x_BTI.dtype)
        x_NI, places = x_BTI.flatten(0, 1), _places(plan.layers, Bs_OK[0].shape[1])
        gs = {layer: g for layer, g in enumerate(gs_NO) if g is not None}
        shape = plan.layers, plan.groups, -1, x_NI.shape[0]
        gh_KN = x_NI.new_empty(A_KI.shape[0], x_NI.shape[0])
        for layer, place in enumerate(places):
            if layer in gs:
                torch.mm(Bs_OK[layer].T, gs[layer].T, out=gh_KN[place])
            else:
                gh_KN[place].zero_()
        gh_KN = _scaled(gh_KN, plan.scale)
        if owner_G1N is not None:
            gh_KN.view(shape).mul_(owner_G1N)
            h_KN = (h_KN.unsqueeze(1) * owner_G1N).flatten(0, 2)
        gx_BTI = None
        if ctx.needs_input_grad[0]:
            gx_NI = torch.mm(gh_KN.T, A_KI)
            for layer, g_NO in gs.items():
                gx_NI.addmm_(g_NO, weights[layer])
            gx_BTI = gx_NI.view_as(x_BTI)
        gA_KI = gh_KN @ x_NI
        gBs_KO = [
            _scaled(h_KN[place] @ gs[layer], plan.scale) if layer in gs else A_KI.new_zeros(B_OK.T.shape)
            for layer, (place, B_OK) in enumerate(zip(places, Bs_OK, strict=True))
        ]
        return gx_BTI, None, None, *([None] * (2 * plan.layers)), *plan.parted(gA_KI, gBs_KO, factors)
