"""Inputs and logits of a model with three contexts and a different layout per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapters.attach import Adapters

CONTEXTS = ("image", "question", "answer")


def embeds(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, adapters: Adapters, x_BTD: Tensor, ids_XT: Tensor, **options: Any) -> Tensor:
    adapters.router.set_context_ids(ids_XT)
    logits_BTV: Tensor = model(inputs_embeds=x_BTD, use_cache=False, **options).logits
    return logits_BTV
