"""Baselines for context-specific LoRA: concatenate-and-mask, and Context-PEFT's Algorithm 1 as a one-hot einsum.

Both use plain autograd, with the same parameters, names and values as LoRA (Context-PEFT: arXiv 2312.08900).
Shapes: B rows, T positions, I and O features of a layer, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import base
from adapters.methods.lora import LoRA
from adapters.placement.roles import Target
from adapters.placement.router import Layout


class MaskChange(base.Change):
    """All groups' pairs concatenated to one of rank G · R; other groups' states are multiplied by zero."""

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + s · B_cat (mask ⊙ A_cat x)``."""
        deltas = [self.delta(group) for group in self.groups]
        h_BTK = F.linear(x_BTI, torch.cat([d.lora_A for d in deltas]))
        owner_XTG1 = layout.lookup(self.groups).owner_XTG[..., None]
        h_BTK = (h_BTK.unflatten(-1, (len(deltas), -1)) * owner_XTG1).flatten(-2)
        B_OK = torch.cat([d.lora_B for d in deltas], dim=1)
        changed_NO = torch.addmm(value_BTD.flatten(0, 1), h_BTK.flatten(0, 1), B_OK.T, alpha=deltas[0].scale)
        return changed_NO.view_as(value_BTD)


class OneHotChange(base.Change):
    """Every group's update of every token, then a one-hot selection."""

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + s · Σ_g onehot_g · B_g A_g x``."""
        deltas = [self.delta(group) for group in self.groups]
        A_GRI, B_GOR = torch.stack([d.lora_A for d in deltas]), torch.stack([d.lora_B for d in deltas])
        h_BTGR = torch.einsum("bti,gri->btgr", x_BTI, A_GRI)
        update_BTGO = torch.einsum("btgr,gor->btgo", h_BTGR, B_GOR)
        onehot_XTG = layout.lookup(self.groups).owner_XTG.to(value_BTD.dtype).expand(x_BTI.shape[0], -1, -1)
        update_BTO = torch.einsum("btgo,btg->bto", update_BTGO, onehot_XTG)
        return torch.add(value_BTD, update_BTO, alpha=deltas[0].scale)


class _Comparator(LoRA):
    change_class: type[base.Change]

    @property
    def name(self) -> str:
        """``lora``, for the same parameter paths as LoRA."""
        return "lora"

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """The comparator's form."""
        return self.change_class(deltas)


class MaskLoRA(_Comparator):
    """Concatenate and mask."""

    change_class = MaskChange


class OneHotLoRA(_Comparator):
    """One-hot einsum."""

    change_class = OneHotChange
