"""``harness.adapt`` on a small model of every causal LM class of the installed transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import harness
from harness.core.errors import UserError
from tests.support.adapters import disturb
from tests.support.zoo import causal_lms, small

IDS_BT = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
CONTEXTS_BT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 1, 1, 1]])
LORA = {"method": "lora", "rank": 2}
TIED = ("zamba", "zamba2")  # their blocks share weights


def adapted(model_type: str, grouping: str) -> harness.AdaptedModel:
    try:
        model = small(model_type)
    except Exception as error:
        pytest.skip(f"transformers builds no small model: {error}")
    try:
        found = harness.adapt(model, LORA, grouping=grouping)
    except UserError as error:
        pytest.skip(f"refused: {error}")
    disturb(found.adapters.parameters(), scale=0.1)
    return found


def logits(model: Any, **more: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS_BT, use_cache=False, **more).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_lms())
@pytest.mark.filterwarnings("ignore:the .* model is adapted without")
def test_every_adapter_parameter_has_a_gradient(model_type: str) -> None:
    model = adapted(model_type, "specific")
    logits(model, context_ids=CONTEXTS_BT).float().square().mean().backward()  # type: ignore[no-untyped-call]
    for name, p in model.adapters.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_lms())
@pytest.mark.filterwarnings("ignore:the .* model is adapted without")
def test_merged_it_computes_the_same(model_type: str) -> None:
    model = adapted(model_type, "agnostic")
    with torch.no_grad():
        expected_BTV = logits(model, context_ids=CONTEXTS_BT)
        if model_type in TIED:
            with pytest.raises(UserError, match="its weight is also that of"):
                model.merge()
            return
        found_BTV = logits(model.merge())
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-3, atol=1e-4 * float(expected_BTV.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["xlstm", "llama"])
def test_it_learns(model_type: str) -> None:
    model = adapted(model_type, "specific")
    optimizer = torch.optim.AdamW(model.adapters.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        logits_BTV = logits(model, context_ids=CONTEXTS_BT)
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0], (losses[0], losses[-1])
