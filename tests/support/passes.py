"""Adapters of every method, and the gradients of passes through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.adapted import ROWS_BT, each_spec
from tests.support.adapters import embeds

OTHER_BT = ROWS_BT.flip(1)
PADDED_BT = torch.ones(3, 11, dtype=torch.long).index_fill(1, torch.tensor([10]), 0)
METHODS = (
    "lora", "dora", "vera", "bitfit", "ia3", "ln_tuning", "bottleneck", "moka", "soft_prompt+bitfit", "mmca+lora",
)  # fmt: skip
each_method = each_spec(*METHODS)


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
