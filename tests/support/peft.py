"""Our adapters against the peft library's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.adapters import embeds
from tests.support.models import tiny_gpt2, tiny_llama, tiny_opt


def relative(found: Tensor, expected: Tensor) -> float:
    assert expected.abs().max() > 0
    return ((found - expected).abs().max() / expected.abs().max()).item()


MODULES = {
    tiny_llama: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    tiny_opt: ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    tiny_gpt2: ["c_attn", "c_proj", "c_fc"],
}


def check_equal(model: Any, peft_model: Any, theirs: Any, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """PEFT trains the same parameters, and logits and their gradients are equal."""
    assert {id(p) for _, p in pairs} == {id(p) for p in peft_model.parameters() if p.requires_grad}
    logits = [m(inputs_embeds=embeds().double(), use_cache=False).logits for m in (model, theirs)]
    for each in logits:
        each.square().sum().backward()
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-10, atol=1e-10)
    for ours, peft in pairs:
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, peft.grad, rtol=1e-8, atol=1e-8)
        assert ours.grad.any()
