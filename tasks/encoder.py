"""The contract of frozen encoders: decoded items in, features out. Shapes: N tokens of an item, D features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """A frozen encoder with its own preprocessing.

    The features of an item do not depend on the other items of the batch (up to rounding), so that they can be cached.

    Attributes:
        width: D.
    """

    width: int

    @abstractmethod
    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        """Features (N, D) of each item on the encoder's device; N may differ from item to item."""

    def check(self, item: Any) -> str | None:
        """The reason why this item cannot be encoded (a recording that is too long); None: it can.

        Needs no weights: it is called on an empty encoder before anything is computed.
        """
        return None

    @property
    def device(self) -> torch.device:
        """Where ``encode`` computes; an encoder without weights stays on the CPU."""
        weight = next(iter([*self.parameters(), *self.buffers()]), None)
        return torch.device("cpu") if weight is None else weight.device
