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

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``y + b ⊙ B (d ⊙ A dropout(x))``."""
        return self.add(x_BTI, value_BTD, self.vera_lambda_d, self.vera_lambda_b)

    def add(self, x_BTI: Tensor, value_BTD: Tensor, d_R: Tensor, b_O: Tensor) -> Tensor:
        """``forward`` with the given vectors, (R,) and (O,), or one per token, (X, T, R) and (X, T, O)."""
        a_RI, b_OR = self._sliced()
        dtype = value_BTD.dtype
        if self.dropout:
            x_BTI = F.dropout(x_BTI, self.dropout, self.training)
        hidden_BTR = F.linear(x_BTI, a_RI.to(x_BTI.dtype)).to(dtype) * d_R.to(dtype)
        return value_BTD + F.linear(hidden_BTR, b_OR.to(dtype)).to(dtype) * b_O.to(dtype)

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """``W + diag(b) B diag(d) A``."""
        a_RI, b_OR = self._sliced()
        return weight_OI + (self.vera_lambda_b[:, None] * b_OR) @ (self.vera_lambda_d[:, None] * a_RI), bias_O

    def _sliced(self) -> tuple[Tensor, Tensor]:
        (projections,) = self._projections
        return projections.vera_A[:, : self.in_features], projections.vera_B[: self.out_features]


class VeRAChange(base.Change):
    """Looks up every token's vectors, then applies the projections once.

    The cost does not grow with the number of groups.
    """

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + b_c ⊙ B (d_c ⊙ A dropout(x))``."""
        if layout.owned_by(self.groups):
            return super().forward(x_BTI, value_BTD, layout)
        d_XTR, b_XTO = (self.table(name, layout, 0.0) for name in ("vera_lambda_d", "vera_lambda_b"))
        changed_BTD: Tensor = self.delta(self.groups[0]).add(x_BTI, value_BTD, d_XTR, b_XTO)
        return changed_BTD


class VeRA(base.AdapterMethod):
    """Vector-based random matrix adaptation."""

    summary = "frozen random projections shared by all layers, two trained vectors per layer"
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
        return VeRAChange(deltas)
