"""VeRA per context group: a frozen random pair of projections for all layers and groups, two trained vectors per layer.

``y = W x + b ⊙ B (d ⊙ A x)``: Kopiczko et al. 2023, arXiv 2310.11454, equation 2. ``A`` and ``B`` are drawn once, in
the size of the largest layer; each layer uses their first columns and rows, as in Hugging Face PEFT. ``b`` is
initialised to zero, so the adapter starts as the identity. The projections are buffers, saved with the adapter. A rank
larger than a layer is allowed, as in the paper.

Shapes: B rows, T positions, I and O input and output features, R rank, X 1 or B rows (see ``Layout``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import base
from adapters.placement.roles import Target
from adapters.placement.router import Layout


class VeRAConfig(base.Config):
    """Options, named as in Hugging Face PEFT where it has them."""

    rank: PositiveInt = 256
    d_initial: Annotated[float, Field(gt=0)] = 0.1  # initial value of the vector d
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    where: base.Where = "AF"


class Projections(nn.Module):
    """The frozen random pair shared by all layers and groups: ``vera_A`` (R, largest I), ``vera_B`` (largest O, R)."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("vera_A", torch.empty(rank, in_features))
        self.register_buffer("vera_B", torch.empty(out_features, rank))
        for buffer in (self.vera_A, self.vera_B):
            nn.init.kaiming_uniform_(buffer, generator=generator)


class VeRADelta(base.Delta):
    """Two vectors: ``vera_lambda_d`` (R,) between the projections and ``vera_lambda_b`` (O,) after them."""

    def __init__(self, target: Target, config: VeRAConfig) -> None:
        super().__init__()
        self.vera_lambda_d = nn.Parameter(torch.full((config.rank,), config.d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(target.out_features))
        self.in_features, self.out_features = target.in_features, target.out_features
        self.dropout = config.dropout
        self._projections: tuple[Projections, ...] = ()

    def use(self, projections: Projections) -> None:
        """Set the shared projections. Kept in a tuple so that they are not a submodule, and saved only once."""
        self._projections = (projections,)
        for delta in self.below:
            delta.use(projections)

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``y + b ⊙ B (d ⊙ A dropout(x))``; of stacked groups the updates of both."""
        (projections,) = self._projections
        pair = projections.vera_A, projections.vera_B
        for delta in (*self.below, self):
            value_BTD = delta.add(x_BTI, value_BTD, (delta.vera_lambda_d, delta.vera_lambda_b), pair)
        return value_BTD

    def add(
        self, x_BTI: Tensor, value_BTD: Tensor, vectors: tuple[Tensor, Tensor], pair: tuple[Tensor, Tensor]
    ) -> Tensor:
        """``forward`` with the given vectors and projections.

        Args:
            x_BTI: the layer's input.
            value_BTD: the layer's output.
            vectors: ``d`` and ``b``, (R,) and (O,), or one per token, (X, T, R) and (X, T, O).
            pair: the shared projections, in the size of the largest layer.
        """
        a_RI, b_OR = self._sliced(*pair)
        (d_R, b_O), dtype = vectors, value_BTD.dtype
        if self.dropout:
            x_BTI = F.dropout(x_BTI, self.dropout, self.training)
        hidden_BTR = F.linear(x_BTI, a_RI.to(x_BTI.dtype)).to(dtype) * d_R.to(dtype)
        return value_BTD + F.linear(hidden_BTR, b_OR.to(dtype)).to(dtype) * b_O.to(dtype)

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """``W + diag(b) B diag(d) A``."""
        (projections,) = self._projections
        a_RI, b_OR = self._sliced(projections.vera_A, projections.vera_B)
        for delta in (*self.below, self):
            weight_OI = weight_OI + (delta.vera_lambda_b[:, None] * b_OR) @ (delta.vera_lambda_d[:, None] * a_RI)
        return weight_OI, bias_O

    def _sliced(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        return a_RI[:, : self.in_features], b_OR[: self.out_features]


class VeRAChange(base.Change):
    """Looks up every token's vectors, then applies the projections once.

    The cost does not grow with the number of groups.
    """

    def __init__(self, deltas: Mapping[str, base.Delta], projections: Projections) -> None:
        super().__init__(deltas)
        self._projections = (projections,)  # not a submodule (see VeRADelta.use)

    @property
    def projections(self) -> Projections:
        """What all layers share."""
        return self._projections[0]

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + b_c ⊙ B (d_c ⊙ A dropout(x))``; of stacked groups also the update that all tokens share."""
        dtype, first = value_BTD.dtype, self.delta(self.groups[0])
        vectors = tuple(self.vector(name, layout, 0.0, dtype) for name in ("vera_lambda_d", "vera_lambda_b"))
        pair = self._pair(layout, dtype)
        for delta in first.below:
            value_BTD = delta.add(x_BTI, value_BTD, (delta.vera_lambda_d, delta.vera_lambda_b), pair)
        changed_BTD: Tensor = first.add(x_BTI, value_BTD, vectors, pair)
        return changed_BTD

    def _pair(self, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The projections in a dtype, cast once per pass, or generation, for all layers."""
        a_RI, b_OR = self.projections.vera_A, self.projections.vera_B
        if a_RI.dtype == dtype or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return a_RI, b_OR
        # Buffers are replaced when they move, and counted when they are written (by load_state_dict).
        version = 0 if a_RI.is_inference() else a_RI._version + b_OR._version
        return layout.keep(
            (a_RI, b_OR, version, dtype),
            lambda: layout.constant((self.projections, dtype), lambda: (a_RI.to(dtype), b_OR.to(dtype))),
        )


class VeRA(base.AdapterMethod):
    """Vector-based random matrix adaptation."""

    summary = "frozen random projections shared by all layers, two trained vectors per layer"
    not_stacked = None
    Config = VeRAConfig
    config: VeRAConfig

    def label(self) -> str:
        """``VeRA r=256``, plus `where` if it is not AF."""
        return f"VeRA r={self.config.rank}" + base.place_label(self.config.where)

    def roles(self) -> frozenset[str]:
        """Attention, feed-forward or both."""
        return base.roles_of(self.config.where)

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """Two vectors."""
        return VeRADelta(target, self.config)

    def shared(self, targets: Sequence[Target], generator: torch.Generator) -> nn.Module:
        """The projections, in the size of the largest layer."""
        in_features, out_features = max(t.in_features for t in targets), max(t.out_features for t in targets)
        return Projections(in_features, out_features, self.config.rank, generator)

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """A change that computes all groups in one pass; every delta gets the projections."""
        assert isinstance(shared, Projections)  # noqa: S101 - what this class's `shared` made
        for delta in deltas.values():
            assert isinstance(delta, VeRADelta)  # noqa: S101
            delta.use(shared)
        return VeRAChange(deltas, shared)
