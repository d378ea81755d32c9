"""SSF per context group: scale and shift the output of every linear layer, ``y' = gamma ⊙ y + beta``.

Lian et al. 2022, "Scaling & Shifting Your Features", arXiv 2210.08823, equation 3. Gamma is one and beta zero at start.

Shapes: B rows, T positions, I input features, O output features of the layer, D the same outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from harness import AdapterConfig, AdapterMethod, Delta, Target


class SSFConfig(AdapterConfig):
    """Options of ``method: ssf`` in an experiment."""

    train: Literal["scale", "shift", "both"] = "both"


class SSFDelta(Delta):
    """The change that one group makes to one layer."""

    undecayed = ("gamma",)  # weight decay would pull it to 0, but the identity is 1

    def __init__(self, out_features: int, train: str) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(out_features)) if train != "shift" else None
        self.beta = nn.Parameter(torch.zeros(out_features)) if train != "scale" else None

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``gamma ⊙ y + beta``, for this group's tokens only; parameters may have a wider type than the value."""
        if self.gamma is not None:
            value_BTD = value_BTD * self.gamma.to(value_BTD.dtype)
        return value_BTD if self.beta is None else value_BTD + self.beta.to(value_BTD.dtype)

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """``gamma ⊙ (W x + b) + beta`` is again a linear layer."""
        if self.gamma is not None:
            weight_OI, bias_O = weight_OI * self.gamma[:, None], bias_O * self.gamma
        return weight_OI, bias_O if self.beta is None else bias_O + self.beta


class SSF(AdapterMethod):
    """Scale and shift the outputs of all linear layers."""

    summary = "learned scale and shift of every linear layer's output"
    Config = SSFConfig
    config: SSFConfig

    def label(self) -> str:
        """Its name on the leaderboard."""
        return "SSF" if self.config.train == "both" else f"SSF {self.config.train} only"

    def roles(self) -> frozenset[str]:
        """Attention and feed-forward layers."""
        return frozenset({"q", "k", "v", "o", "gate", "up", "down"})

    def delta(self, target: Target, generator: torch.Generator) -> Delta:
        """One group's parameters for one layer; nothing here is random, so ``generator`` is not used."""
        return SSFDelta(target.out_features, self.config.train)
