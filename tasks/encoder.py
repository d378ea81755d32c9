"""The contract of frozen encoders: decoded items in, features out. Shapes: N tokens of an item, D features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """A frozen encoder with its own preprocessing.

    The features of an item do not depend on the other items of the batch (up to rounding), so that they can be cached.
    Because of the rounding, cached features are those of the same call: with one item per call, a file is encoded once
    for all budgets and seeds; with more, once for each set of files that are encoded together.

    A plugin that adds an encoder to a modality sets ``modality`` and is registered under ``harness.encoders``.

    Attributes:
        width: D.
    """

    width: int
    modality: ClassVar[str] = ""  # registry name of the modality whose decoded items a plugin's encoder takes
    # Of ``encode``, at most 64. Large encoders are as fast with one, which also shares features among the most trials.
    items_per_call: ClassVar[int] = 64
    result_version: ClassVar[int] = 1  # of a plugin: raise it when features change, so that trials get new ids

    @classmethod
    def files(cls) -> Sequence[Path]:
        """Of a plugin: files that features depend on, such as weights; their content is part of trial ids."""
        return ()

    @classmethod
    def make(cls, weights: bool) -> Encoder:
        """The encoder of a plugin, in fp32 and evaluation mode; without weights on the ``meta`` device."""
        if weights:
            return cls().eval()
        with torch.device("meta"):
            return cls().eval()

    @abstractmethod
    def encode(self, items: Sequence[Any]) -> list[Tensor]:
        """Features (N, D) of each item on the encoder's device; N may differ from item to item.

        On the ``meta`` device they have their shapes and no values, from which the cost of a trial is predicted.
        """

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
