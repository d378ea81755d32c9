"""Adapters of every method, and the gradients of passes through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.adapted import LORA, ROWS_BT
from tests.support.adapters import embeds

OTHER_BT = ROWS_BT.flip(1)
PADDED_BT = torch.ones(3, 11, dtype=torch.long).index_fill(1, torch.tensor([10]), 0)
SPECS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": {"method": "dora", "rank": 3},
    "vera": {"method": "vera", "rank": 5},
    "bitfit": {"method": "bitfit"},
    "ia3": {"method": "ia3"},
    "ln_tuning": {"method": "ln_tuning"},
    "bottleneck": {"method": "bottleneck", "bottleneck_size": 4},
    "moka": {"method": "moka", "rank": 3},
    "soft_prompt": {"method": "soft_prompt+bitfit", "num_virtual_tokens": 2},
    "mmca": {"method": "mmca+lora", "rank": 3},
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def loss(adapted: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    x_BTD = embeds().requires_grad_()  # the reentrant form needs an input with a gradient
    total: Tensor = adapted(inputs_embeds=x_BTD, context_ids=ids, attention_mask=mask, use_cache=False).logits
    return total.square().mean()


def gradients(adapted: Any, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    run().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in adapted.adapters.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(grad.abs().max() > 0 for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
