"""IA3 per context group: learned element-wise scaling of keys, values and the feed-forward activation.

Liu et al. 2022, arXiv 2205.05638. The feed-forward vector scales the *input* of the down projection (the activation
between up and down), as in the paper and in Hugging Face PEFT. All vectors are initialised to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from adapters import base
from adapters.placement.roles import Target
from adapters.placement.router import Layout


class IA3Config(base.Config):
    """Options."""

    where: base.Where = "AF"


class Scale(base.Delta):
    """One vector (O,) that scales keys or values, or (I,) that scales the input of the down projection."""

    undecayed = ("ia3_l",)

    def __init__(self, features: int, acts_on: Literal["input", "output"]) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(features))
        self.acts_on = acts_on

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``l ⊙ value``."""
        return value_BTD * self.vector("ia3_l").to(value_BTD.dtype)

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """Scales rows of the weight and the bias, or columns of the weight."""
        scale_D = self.vector("ia3_l")
        if self.acts_on == "input":
            return weight_OI * scale_D, bias_O
        return weight_OI * scale_D[:, None], bias_O * scale_D

    def vector(self, name: str) -> Tensor:
        """``l``; of stacked groups the product of both."""
        return reduce(torch.mul, (delta.vector(name) for delta in self.below), super().vector(name))


class ScaleChange(base.Change):
    """Looks up every token's scale, then multiplies once: the cost does not grow with the number of groups."""

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``l_c ⊙ value``."""
        return value_BTD * self.vector("ia3_l", layout, 1.0, value_BTD.dtype)


class IA3(base.AdapterMethod):
    """Three scaling vectors per block."""

    summary = "learned scaling of keys, values and the feed-forward activation"
    not_stacked = None
    Config = IA3Config
    config: IA3Config

    def label(self) -> str:
        """``IA3``, plus `where` if it is not AF."""
        return "IA3" + base.place_label(self.config.where)

    def roles(self) -> frozenset[str]:
        """k and v in attention, down in feed-forward."""
        return frozenset({"k", "v", "down"}) & base.roles_of(self.config.where)

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """A vector over the outputs of k and v, or over the inputs of down."""
        return Scale(target.in_features, "input") if target.role == "down" else Scale(target.out_features, "output")

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """All groups in one multiplication."""
        return ScaleChange(deltas)
