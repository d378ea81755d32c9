"""LoRA per context group: ``h = W x + (alpha / r) B A x``.

Hu et al. 2021, arXiv 2106.09685; Context-LoRA in Context-PEFT, arXiv 2312.08900. The product ``B A`` is never formed.
``A`` is drawn as ``nn.Linear`` draws its weights and ``B`` is zero, so at start nothing changes.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import base
from adapters.roles import Target


class LoRAConfig(base.Config):
    """Options, named as in Hugging Face PEFT where it has them."""

    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] | None = None  # the product is scaled by alpha / rank; default: alpha = rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    where: base.Where = "AF"


class LoRADelta(base.Delta):
    """One low-rank pair. Shapes: R rank."""

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.scale = (config.alpha or config.rank) / config.rank
        self.dropout = config.dropout

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``y + scale · B A dropout(x)``."""
        if self.dropout:
            x_BTI = F.dropout(x_BTI, self.dropout, self.training)
        update_BTD = F.linear(F.linear(x_BTI, self.lora_A), self.lora_B)
        return torch.add(value_BTD, update_BTD, alpha=self.scale)

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """``W + scale · B A``."""
        return weight_OI + self.scale * self.lora_B @ self.lora_A, bias_O


class LoRA(base.AdapterMethod):
    """Low-rank adaptation of every linear layer in the chosen roles."""

    summary = "low-rank update of the linear layers: W x + (alpha / r) B A x"
    Config = LoRAConfig
    config: LoRAConfig

    def label(self) -> str:
        """``LoRA r=4``, with the place where it is not everywhere."""
        return f"LoRA r={self.config.rank}" + base.place_label(self.config.where)

    def roles(self) -> frozenset[str]:
        """Attention, feed-forward or both."""
        return base.roles_of(self.config.where)

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """One low-rank pair."""
        return LoRADelta(target.in_features, target.out_features, self.config, generator)
