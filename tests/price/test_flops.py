"""Operations that torch's counter of FLOPs does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from harness.price.flops import FORMULAS
from harness.price.rows import rows_of
from harness.price.trace import trace
from tests.support.trials import spec_of


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def test_products_that_are_added_in_place_count_as_others() -> None:
    a_MK, b_KN, c_MN = torch.zeros(3, 5), torch.zeros(5, 7), torch.zeros(3, 7)
    with counter() as found:
        c_MN.addmm_(a_MK, b_KN)
    assert found.get_total_flops() == 2 * 3 * 5 * 7
    with counter() as found:
        c_MN[None].baddbmm_(a_MK[None], b_KN[None])
    assert found.get_total_flops() == 2 * 3 * 5 * 7


def test_attention_on_a_cpu_counts_its_two_products() -> None:
    q_BHTD = torch.randn(2, 3, 11, 8, requires_grad=True)
    with counter() as found:
        out_BHTD = F.scaled_dot_product_attention(q_BHTD, q_BHTD, q_BHTD)
    forward = 2 * (2 * 2 * 3 * 11 * 11 * 8)
    assert found.get_total_flops() == forward
    with counter() as found:
        out_BHTD.sum().backward()
    assert found.get_total_flops() == 2.5 * forward  # scores again, and the gradients of four operands


@pytest.mark.parametrize("grouping", ["agnostic", "specific"])
def test_a_step_of_lora_has_more_than_one_of_the_frozen_model(grouping: str, tmp_path: Path) -> None:
    budget = {"examples": 24, "epochs": 1}
    frozen = spec_of(tmp_path, {"method": "none", "learning_rate": 1e-3}, budget=budget)
    adapter = {"method": "lora", "rank": 2, "grouping": grouping, "learning_rate": 1e-3}
    adapted = spec_of(tmp_path, adapter, budget=budget)
    batch = rows_of(frozen, None).first
    (before,), (after,) = trace(frozen, batch), trace(adapted, batch)
    assert before.forward_flops < after.forward_flops < 1.5 * before.forward_flops
    assert before.step_flops < after.step_flops < 1.5 * before.step_flops
