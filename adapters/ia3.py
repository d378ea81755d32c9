"""IA3 per context group: learned element-wise scaling of keys, values and the feed-forward activation.

Liu et al. 2022, arXiv 2205.05638. The feed-forward vector scales the *input* of the down projection (the activation
between up and down), as in the paper and in Hugging Face PEFT. All vectors are one at start.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from adapters import base


class IA3Config(base.Config):
    """Options."""

    where: base.Where = "AF"


class Scale(base.Delta):
    """Scales keys, values, or the activation that enters the down projection."""

    def __init__(self, features: int, acts_on: Literal["input", "output"]) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(features))
        self.acts_on = acts_on

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``l ⊙ value``."""
        return value_BTD * self.ia3_l


class IA3(base.AdapterMethod):
    """Three scaling vectors per block."""

    summary = "learned scaling of keys, values and the feed-forward activation"
    Config = IA3Config
    config: IA3Config

    def label(self) -> str:
        """``IA3``, with the place where it is not everywhere."""
        return "IA3" if self.config.where == "AF" else f"IA3 {self.config.where}"

    def roles(self) -> frozenset[str]:
        """Keys and values in attention, the input of down in the feed-forward part."""
        return frozenset({"k", "v", "down"}) & base.roles_of(self.config.where)

    def delta(self, role: str, in_features: int, out_features: int, generator: torch.Generator) -> base.Delta:
        """A vector over the output of k and v, over the input of down."""
        return Scale(in_features, "input") if role == "down" else Scale(out_features, "output")

    def num_parameters(self, role: str, in_features: int, out_features: int) -> int:
        """``in`` for down, ``out`` for k and v."""
        return in_features if role == "down" else out_features
