"""What counts as a linear layer, and how many features it has."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_conv1d(layer: nn.Module | None) -> bool:
    """Whether it is the linear layer of GPT-2, whose weight is transposed.

    transformers takes a second to import, which a process that only reads options can do without: where it has not been
    imported, there is no such layer.
    """
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(layer, library.Conv1D)


def is_linear(layer: nn.Module) -> bool:
    """True for quantised layers too, which name their features as ``nn.Linear`` does."""
    return is_conv1d(layer) or (hasattr(layer, "in_features") and hasattr(layer, "out_features"))


def features_of(layer: Any) -> tuple[int, int]:
    """Input and output features of a linear layer."""
    return (layer.nx, layer.nf) if is_conv1d(layer) else (int(layer.in_features), int(layer.out_features))
