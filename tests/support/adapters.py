"""Adapters attached to a tiny model, with parameters that are not their initialisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.methods.bitfit import BitFit, BitFitConfig
from adapters.methods.ia3 import IA3, IA3Config
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.router import Router
from harness.core.contexts import Segment, resolve_grouping

LORA, BITFIT, IA3_ = LoRA(LoRAConfig(rank=3, alpha=5.0)), BitFit(BitFitConfig()), IA3(IA3Config())
METHODS: dict[str, AdapterMethod] = {"lora": LORA, "bitfit": BITFIT, "ia3": IA3_}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
TWO_LONG = (Segment(0, 1, "text"), Segment(1, 6, "image"), Segment(6, 11, "text"))


def disturb(parameters: Any, seed: int = 2, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=scale)


def adapt(model: Any, methods: AdapterMethod | Mapping[str, AdapterMethod], grouping: Any = "specific") -> Adapters:
    """Attach with random parameters and the layout TWO_LONG."""
    router = Router(resolve_grouping(grouping, ("image", "text"))[0])
    router.set_layout(TWO_LONG)
    by_group = methods if isinstance(methods, Mapping) else dict.fromkeys(router.groups, methods)
    adapters = Adapters(model, by_group, router, seed=0)
    disturb(adapters.parameters())
    adapters.attach(model)
    return adapters


def embeds(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(1))


GROUPINGS: dict[str, Any] = {
    "agnostic": "agnostic",
    "specific": "specific",
    "image and audio share a group": {"image": "vision", "audio": "vision", "text": "language"},
    "image has none": {"image": None, "audio": "sound", "text": "language"},
    "only audio has one": {"image": None, "audio": "sound", "text": None},
}
