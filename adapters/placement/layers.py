"""What counts as a linear layer, and how many features it has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def is_linear(layer: nn.Module) -> bool:
    """True for quantised layers too, which name their features as ``nn.Linear`` does."""
    return isinstance(layer, Conv1D) or (hasattr(layer, "in_features") and hasattr(layer, "out_features"))


def features_of(layer: Any) -> tuple[int, int]:
    """Input and output features of a linear layer."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (int(layer.in_features), int(layer.out_features))
