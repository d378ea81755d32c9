"""Checks of what plugins and tokenizers return, made for every file and batch before it reaches the device.

On a GPU, a token id out of range ends the process without naming an example; features that are not finite show only as
a loss that is not. Shapes: B rows, T positions, N tokens of an item, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def check_features(found: Any, items: int, width: int) -> None:
    """Check an encoder's features of several files.

    Args:
        found: what the encoder returned for them.
        items: their number.
        width: D, as declared by the encoder.

    Raises:
        ValueError: it is not one tensor (N, D) of floats for each file.
    """
    if not isinstance(found, Sequence | Tensor) or len(found) != items:
        count = len(found) if hasattr(found, "__len__") else type(found).__name__
        raise ValueError(f"the encoder returned {count} items for {items} files; allowed: one tensor for each file")
    for number, x_ND in enumerate(found):
        if not isinstance(x_ND, Tensor) or not x_ND.is_floating_point():
            kind = x_ND.dtype if isinstance(x_ND, Tensor) else type(x_ND).__name__
            raise ValueError(f"the encoder returned {kind} for item {number}; allowed: a tensor of floats")
        if x_ND.ndim != 2 or x_ND.shape[1] != width or not len(x_ND):
            raise ValueError(
                f"the encoder returned features of shape {tuple(x_ND.shape)} for item {number}; "
                f"allowed: (N, {width}), its declared width, with N of 1 or more"
            )


def check_finite(features: Sequence[Tensor]) -> None:
    """Check that features are finite; on the CPU, because on a GPU each check would wait for it.

    Raises:
        ValueError: they are not.
    """
    for number, x_ND in enumerate(features):
        if not torch.isfinite(x_ND).all():
            raise ValueError(f"the encoder returned features of item {number} that are not finite (NaN or infinity)")


def check_ids(ids_BT: np.ndarray, vocabulary: int) -> None:
    """Check that token ids are in the language model's vocabulary.

    Raises:
        ValueError: one is not; then the tokenizer is of another model.
    """
    if ids_BT.min(initial=0) < 0 or ids_BT.max(initial=0) >= vocabulary:
        wrong = int(ids_BT[(ids_BT < 0) | (ids_BT >= vocabulary)][0])
        raise ValueError(
            f"the tokenizer returned token id {wrong}; allowed: 0 to {vocabulary - 1}, the language model's vocabulary"
        )
