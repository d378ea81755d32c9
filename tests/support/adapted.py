"""Models adapted with ``harness.adapt``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import harness
from tests.support.adapters import disturb

IMAGE, TEXT = 0, 1
IDS_T = torch.tensor([TEXT] + [IMAGE] * 5 + [TEXT] * 5)  # as TWO_LONG
ROWS_BT = torch.stack([IDS_T, IDS_T.flip(0), torch.tensor([TEXT, IMAGE] * 5 + [TEXT])])
LORA = {"method": "lora", "rank": 3, "alpha": 5.0}


def adapted_model(model: Any, spec: Any = None, grouping: Any = "specific", **options: Any) -> harness.AdaptedModel:
    adapted = harness.adapt(model, spec or LORA, grouping=grouping, **options)
    disturb(adapted.adapters.parameters())
    return adapted


@torch.no_grad()
def logits(adapted: Any, x_BTD: Tensor, ids: Tensor, **kwargs: Any) -> Tensor:
    logits_BTV: Tensor = adapted(inputs_embeds=x_BTD, context_ids=ids, **kwargs).logits
    return logits_BTV


def traces(model: Any) -> dict[str, Any]:
    """The state of a module, including hooks and attributes, without the values of its tensors."""
    return {name: sorted((key, str(value)) for key, value in vars(m).items()) for name, m in model.named_modules()}
