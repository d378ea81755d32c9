"""Agnostic LoRA and IA3 equal the peft library's own layers given the same weights, in forward and gradients.

Shapes: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import harness
from adapters.attach import AdaptedLayer
from tests.support.adapters import disturb
from tests.support.models import tiny_gpt2, tiny_llama, tiny_opt
from tests.support.peft import relative

pytestmark = pytest.mark.quick

MODELS = {"llama": tiny_llama, "opt": tiny_opt, "gpt2": tiny_gpt2}
# All linear layers of a block; which of them IA3 scales, and of which it scales the input.
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
}
SCALED = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
}


def embeds(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 11, 32, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def adapted_by_us(model: Any, spec: dict[str, Any]) -> harness.AdaptedModel:
    """With random parameters, so that every part of the computation counts."""
    adapted = harness.adapt(model, spec)
    disturb(adapted.adapters.parameters())
    return adapted


def our_layers(adapted: harness.AdaptedModel) -> list[tuple[AdaptedLayer, Any]]:
    layers = [layer for layer in adapted.adapters.layers.values() if isinstance(layer, AdaptedLayer)]
    return [(layer, next(iter(layer.changes.values())).delta("all")) for layer in layers]


def run(model: Any, x_BTD: Tensor, **kwargs: Any) -> Tensor:
    """Logits; their gradients are left in the inputs and the parameters."""
    logits_BTV: Tensor = model(inputs_embeds=x_BTD, use_cache=False, **kwargs).logits
    weights_BTV = torch.randn(logits_BTV.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits_BTV * weights_BTV.to(logits_BTV.dtype)).sum().backward()
    return logits_BTV.detach()


def logits_of_both(adapted: harness.AdaptedModel, theirs: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    """Compare logits and the input's gradient; the parameters' gradients are there afterwards."""
    ours_BTD, theirs_BTD = embeds(dtype), embeds(dtype)
    found_BTV = run(adapted, ours_BTD, context_ids=torch.zeros(11, dtype=torch.long))
    assert relative(found_BTV, run(theirs, theirs_BTD)) < tolerance
    assert ours_BTD.grad is not None
    assert theirs_BTD.grad is not None
    assert relative(ours_BTD.grad, theirs_BTD.grad) < tolerance


each_family = pytest.mark.parametrize("family", MODELS)
# Rounding is all there may be; logits and gradients are relative to the largest of them.
each_dtype = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["float64", "float32"]
)


@each_dtype
@each_family
def test_lora(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = MODELS[family]().to(dtype)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR[family], fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    adapted = adapted_by_us(model, {"method": "lora", "rank": 3, "alpha": 5.0}).eval()
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for layer, delta in our_layers(adapted):
        their_layer: Any = theirs.base_model.model.get_submodule(layer.target.path)
        pairs += [
            (delta.lora_A, their_layer.lora_A["default"].weight),
            (delta.lora_B, their_layer.lora_B["default"].weight),
        ]
    assert len(pairs) == 2 * 2 * len(LINEAR[family]) == sum(p.requires_grad for p in theirs.parameters())
    with torch.no_grad():
        for our, their in pairs:
            their.copy_(our)
    logits_of_both(adapted, theirs, dtype, tolerance)
    for our, their in pairs:
        assert our.grad is not None
        assert their.grad is not None
        assert relative(our.grad, their.grad) < tolerance


@each_dtype
@each_family
def test_ia3(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """GPT-2 has q, k and v in one layer: there PEFT's vector is ours for k and v, and one for q."""
    model = MODELS[family]().to(dtype)
    scaled, inside = SCALED[family]
    config = peft.IA3Config(target_modules=scaled, feedforward_modules=inside, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    adapted = adapted_by_us(model, {"method": "ia3"}).eval()
    pairs: list[tuple[nn.Parameter, nn.Parameter, list[int]]] = []
    for layer, delta in our_layers(adapted):
        their_layer: Any = theirs.base_model.model.get_submodule(layer.target.path)
        rows = list(layer.target.rows or range(delta.ia3_l.numel()))
        pairs.append((delta.ia3_l, their_layer.ia3_l["default"], rows))
    assert (
        len({id(their) for _, their, _ in pairs})
        == 2 * len(scaled)
        == sum(p.requires_grad for p in theirs.parameters())
    )
    with torch.no_grad():
        for our, their, rows in pairs:
            their.view(-1)[rows] = our
    logits_of_both(adapted, theirs, dtype, tolerance)
    for our, their, rows in pairs:
        assert our.grad is not None
        assert their.grad is not None
        assert relative(our.grad, their.grad.flatten()[rows]) < tolerance
