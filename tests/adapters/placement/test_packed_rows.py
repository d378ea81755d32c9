"""Sequences packed in a row are as they are alone, whatever adapters let tokens see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import harness
from tests.support.adapters import disturb
from tests.support.models import tiny_llama

SPECS: dict[str, Any] = {
    "moka": {"method": "moka", "rank": 4},
    "moka with an instruction": {"method": "moka", "rank": 4, "instruction_groups": ["text"]},
    "soft_prompt": {"method": "soft_prompt", "num_virtual_tokens": 3},
    "soft_prompt+moka": {"method": "soft_prompt+moka", "num_virtual_tokens": 3},
    "soft_prompt+mmca": {"method": "soft_prompt+mmca", "num_virtual_tokens": 3},
    "mmca+lora": {"method": "mmca+lora", "rank": 4},
}


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_packed_as_alone(name: str) -> None:
    adapted = harness.adapt(tiny_llama(), SPECS[name], contexts=("image", "text"), grouping="specific")
    disturb(adapted.adapters.parameters())
    generator = torch.Generator().manual_seed(0)
    ids_1T = torch.randint(3, 64, (1, 9), generator=generator)
    context_ids_T = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0, 1])
    parts = slice(0, 4), slice(4, 9)
    alone = [adapted(input_ids=ids_1T[:, part], context_ids=context_ids_T[part]).logits for part in parts]
    positions_1T = torch.cat([torch.arange(4), torch.arange(5)])[None]
    found_1TV = adapted(input_ids=ids_1T, context_ids=context_ids_T, position_ids=positions_1T, use_cache=False).logits
    torch.testing.assert_close(found_1TV, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    one_1TV = adapted(input_ids=ids_1T, context_ids=context_ids_T, use_cache=False).logits
    assert not torch.allclose(one_1TV[:, 4:], alone[1], atol=1e-2), "the sequences would not differ if they were one"
