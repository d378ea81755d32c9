"""Small quantised models beside plain ones that have the weights which their packed ones stand for.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapters.base import AdapterMethod
from tests.support.adapters import adapt

WIDTH = 64


def embeds(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 11, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def logits(model: Any) -> Tensor:
    found_BTV: Tensor = model(inputs_embeds=embeds(model.dtype), use_cache=False).logits
    return found_BTV


def far(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def check_training(model: Any, plain: Any, method: AdapterMethod, evaluated: bool = False) -> None:
    """Logits and the adapters' gradients are those of the plain model, up to rounding in fp32.

    Args:
        model: with packed weights.
        plain: with the weights that these stand for.
        method: of the adapters that both get.
        evaluated: the packed one computes logits in evaluation before it is trained.
    """
    found, expected = adapt(model.train(), method), adapt(plain.train(), method)
    expected.to(plain.dtype).load_state_dict(found.state_dict())
    if evaluated:
        with torch.no_grad():
            logits(model.eval())
        model.train()
    found_BTV, expected_BTV = logits(model), logits(plain)
    assert far(found_BTV, expected_BTV) < 1e-5
    for logits_BTV in (found_BTV, expected_BTV):
        logits_BTV.square().mean().backward()
    for name, p in found.named_parameters():
        assert p.grad is not None, name
        assert far(p.grad, expected.get_parameter(name).grad) < 1e-4, name  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.parameters())
