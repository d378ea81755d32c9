"""What a frozen encoder is to the rest: decoded items in, features out. Shapes: N tokens of an item, D features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """A frozen encoder with its own preprocessing.

    What it makes of an item does not depend on the other items of the batch (to rounding), so that it can be kept.

    Attributes:
        width: D.
    """

    width: int

    @abstractmethod
    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        """Features (N, D) of each item on the encoder's device; N may differ from item to item."""

    def check(self, item: Any) -> str | None:
        """Why this item cannot be encoded (a recording that is too long), in words; None: it can.

        Needs no weights: it is asked of an empty encoder before anything is computed.
        """
        return None

    @property
    def device(self) -> torch.device:
        """Where ``encode`` computes; an encoder without weights stays on the CPU."""
        weight = next(iter([*self.parameters(), *self.buffers()]), None)
        return torch.device("cpu") if weight is None else weight.device
