"""BitFit per context group: a trainable bias added to every projection's output, also where the base has none.

Ben Zaken et al. 2021, arXiv 2106.10199; Context-PEFT's Context-BitFit adds a second bias vector for each context.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapters import base


class BitFitConfig(base.Config):
    """Options."""

    where: base.Where = "AF"


class BitFitDelta(base.Delta):
    """One bias vector, zero at start."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``y + b``."""
        return value_BTD + self.bias


class BitFit(base.AdapterMethod):
    """A bias per projection."""

    summary = "a trainable bias on every projection's output"
    Config = BitFitConfig
    config: BitFitConfig

    def label(self) -> str:
        """``BitFit``, with the place where it is not everywhere."""
        return "BitFit" if self.config.where == "AF" else f"BitFit {self.config.where}"

    def roles(self) -> frozenset[str]:
        """Attention, feed-forward or both."""
        return base.roles_of(self.config.where)

    def delta(self, role: str, in_features: int, out_features: int, generator: torch.Generator) -> base.Delta:
        """One bias."""
        return BitFitDelta(out_features)

    def num_parameters(self, role: str, in_features: int, out_features: int) -> int:
        """``out``."""
        return out_features
