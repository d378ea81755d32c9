"""BitFit per context group: a trainable bias added to every projection's output, even if the base layer has none.

Ben Zaken et al. 2021, arXiv 2106.10199; Context-BitFit (Context-PEFT, arXiv
2312.08900) adds one bias vector per context.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from adapters import base
from adapters.placement.roles import Target
from adapters.placement.router import Layout


class BitFitConfig(base.Config):
    """Options."""

    where: base.Where = "AF"


class BitFitDelta(base.Delta):
    """One bias vector (O,), zero at initialisation."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``y + b``."""
        return value_BTD + self.vector("bias").to(value_BTD.dtype)

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """Adds ``b`` to the layer's bias."""
        return weight_OI, bias_O + self.vector("bias")

    def vector(self, name: str) -> Tensor:
        """``b``; of stacked groups the sum of both."""
        own_O = super().vector(name)
        return reduce(torch.add, (delta.vector(name) for delta in self.below), own_O)


class BitFitChange(base.Change):
    """Looks up every token's bias, then adds once: the cost does not grow with the number of groups."""

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + b_c``."""
        return value_BTD + self.vector("bias", layout, 0.0, value_BTD.dtype)


class BitFit(base.AdapterMethod):
    """A bias per projection."""

    summary = "a trainable bias on every projection's output"
    not_stacked = None
    Config = BitFitConfig
    config: BitFitConfig

    def label(self) -> str:
        """``BitFit``, plus `where` if it is not AF."""
        return "BitFit" + base.place_label(self.config.where)

    def roles(self) -> frozenset[str]:
        """Attention, feed-forward or both."""
        return base.roles_of(self.config.where)

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """One bias."""
        return BitFitDelta(target.out_features)

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """All groups in one addition."""
        return BitFitChange(deltas)
