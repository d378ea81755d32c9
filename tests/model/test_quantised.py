"""Adapters on 8-bit and 4-bit base models (QLoRA, arXiv 2305.14314): where bitsandbytes is installed, CPU included.

The reference is a plain model with the weights that the quantised ones stand for, with the same adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.methods.lora import LoRA, LoRAConfig
from adapters.placement.four_bit import FourBit
from adapters.placement.roles import ROLES, find_targets
from harness.core.contexts import Segment
from harness.core.errors import UserError
from tests.support.adapters import adapt, disturb, each_method
from tests.support.quantised import check_training, far, logits

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")

KINDS = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
LAYERS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}
each_kind = pytest.mark.parametrize("kind", KINDS)
CONFIG = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


def load(saved: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    options = {**KINDS[kind], **({"bnb_4bit_compute_dtype": dtype} if kind == "4bit" else {})}
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=BitsAndBytesConfig(**options), dtype=dtype)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == LAYERS[kind]
    return model.eval().requires_grad_(False)


def dequantised(model: Any) -> Any:
    """A plain model with the same weights."""
    plain = LlamaForCausalLM(LlamaConfig(**CONFIG)).requires_grad_(False)
    weights = {name: x for name, x in model.state_dict().items() if name in plain.state_dict()}
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weights[f"{name}.weight"] = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            weights[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    plain.load_state_dict(weights)
    return plain.eval()


def start(model: nn.Module, method: AdapterMethod) -> Adapters:
    """Attached at its initialisation."""
    adapters = adapt(model, method)
    fresh = Adapters(model, dict.fromkeys(adapters.router.groups, method), adapters.router, seed=0)
    adapters.load_state_dict(fresh.state_dict())
    return adapters


def not_repacked(model: Any) -> Tensor:
    """The logits without adapters, by the operators that they leave to 4-bit layers."""
    as_adapters_do = FourBit(model)
    try:
        return logits(model)
    finally:
        as_adapters_do.undo()


@each_kind
@each_method
def test_at_initialisation_it_is_the_quantised_model_bit_for_bit(saved: Path, kind: str, method: AdapterMethod) -> None:
    model = load(saved, kind)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        bare_BTV = not_repacked(model)
        adapters = start(model, method)
        assert torch.equal(logits(model), bare_BTV)
        disturb(adapters.parameters())
        assert (logits(model) != bare_BTV).any(dim=-1).all()
        adapters.detach()
        assert torch.equal(not_repacked(model), bare_BTV)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@each_kind
@each_method
def test_training_equals_that_on_the_dequantised_weights(saved: Path, kind: str, method: AdapterMethod) -> None:
    """In training mode, in which bitsandbytes' CPU layers do not quantise activations: float32 rounding only."""
    model = load(saved, kind)
    check_training(model, dequantised(model), method)


@each_method
def test_training_after_an_evaluation_has_the_same_gradients(saved: Path, method: AdapterMethod) -> None:
    model = load(saved, "4bit")
    check_training(model, dequantised(model), method, evaluated=True)


def test_a_4_bit_model_that_was_evaluated_before_is_refused_where_its_gradients_would_be_wrong(saved: Path) -> None:
    model = load(saved, "4bit")
    layer = model.model.layers[0].mlp.up_proj
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 alone")
    with torch.no_grad():
        logits(model)
    with pytest.raises(UserError, match=r"layer model.layers.0.self_attn.q_proj: .* load the model again and adapt it"):
        adapt(model, LoRA(LoRAConfig()))
    assert model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu


@each_method
def test_8_bit_activations_in_evaluation_move_the_logits_a_little(saved: Path, method: AdapterMethod) -> None:
    """LLM.int8() rounds activations to 8 bits; what adapters add is in full precision."""
    model = load(saved, "8bit")
    plain = dequantised(model)
    adapt(model, method), adapt(plain, method)
    with torch.no_grad():
        assert 0 < far(logits(model), logits(plain)) < 0.05


@each_kind
@each_method
def test_a_group_without_a_token_gets_zero_gradients(saved: Path, kind: str, method: AdapterMethod) -> None:
    model = load(saved, kind).train()
    adapters = adapt(model, method)
    adapters.router.set_layout([Segment(0, 11, "text")])
    logits(model).square().sum().backward()
    for name, p in adapters.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any().item() is (".deltas.group_text." in name), name


@each_kind
@each_method
def test_a_bf16_base_takes_float32_adapters(saved: Path, kind: str, method: AdapterMethod) -> None:
    model = load(saved, kind, torch.bfloat16)
    adapters = adapt(model, method)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    found_BTV = logits(model.train())
    assert found_BTV.dtype == torch.bfloat16
    found_BTV.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters())


@each_kind
def test_a_few_steps_lower_the_loss(saved: Path, kind: str) -> None:
    model = load(saved, kind).train()
    adapters = start(model, LoRA(LoRAConfig(rank=4)))
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.01)
    ids_BT = torch.arange(11).expand(3, 11)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(logits(model).flatten(0, 1), ids_BT.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@each_kind
def test_layers_are_found_as_in_a_plain_model_but_their_weights_cannot_be_read(saved: Path, kind: str) -> None:
    """DoRA and merging need them."""
    model = load(saved, kind)
    targets = find_targets(model, ROLES)
    assert targets == find_targets(dequantised(model), ROLES)
    linear = [t for t in targets if t.role not in {"mlp", "norm"}]
    assert len(linear) == 14
    for target in linear:
        with pytest.raises(
            UserError, match=rf"layer {target.path} \({LAYERS[kind]}\) has no weight matrix .* quantised"
        ):
            target.weight()
