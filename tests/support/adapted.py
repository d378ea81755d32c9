"""Models adapted with ``harness.adapt``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import harness
from tests.support.adapters import disturb

IMAGE, TEXT = 0, 1
IDS_T = torch.tensor([TEXT] + [IMAGE] * 5 + [TEXT] * 5)  # as TWO_LONG
ROWS_BT = torch.stack([IDS_T, IDS_T.flip(0), torch.tensor([TEXT, IMAGE] * 5 + [TEXT])])
LORA = {"method": "lora", "rank": 3, "alpha": 5.0}
# Every method, and its variants that compute something else.
SPECS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora, many columns": {"method": "lora", "rank": 16},
    "pissa": {"method": "lora", "rank": 3, "init_lora_weights": "pissa"},
    "dora": {"method": "dora", "rank": 3},
    "dora, many columns": {"method": "dora", "rank": 16},
    "vera": {"method": "vera", "rank": 5},
    "bitfit": {"method": "bitfit"},
    "ia3": {"method": "ia3"},
    "ln_tuning": {"method": "ln_tuning"},
    "bottleneck": {"method": "bottleneck", "bottleneck_size": 4},
    "parallel bottleneck": {"method": "bottleneck", "bottleneck_size": 4, "placement": "parallel"},
    "moka": {"method": "moka", "rank": 3},
    "soft_prompt": {"method": "soft_prompt", "num_virtual_tokens": 2},
    "soft_prompt+bitfit": {"method": "soft_prompt+bitfit", "num_virtual_tokens": 2},
    "mmca+lora": {"method": "mmca+lora", "rank": 3},
}


def each_spec(*names: str) -> pytest.MarkDecorator:
    """One case for each of the named ``SPECS``."""
    return pytest.mark.parametrize("spec", [SPECS[name] for name in names], ids=names)


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
