"""Frozen weights in 4 and 8 bits: what they stand for, and the products with them, beside float64.

Shapes: B rows, T positions, V vocabulary, I and O input and output features, N weights, K blocks.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
)

from adapters.base import AdapterMethod
from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model import backbones
from harness.model.backbones import build_empty, load_language_model
from harness.model.build import shared_copy
from harness.model.kept import bytes_of
from harness.model.packed import NF4Linear, PackedLinear, count, packed_layers, scale_bytes
from tests.support.adapters import each_method
from tests.support.quantised import check_training, embeds, far, logits

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")

FORMS = ("nf4", "int8")
each_form = pytest.mark.parametrize("form", FORMS)
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases": LlamaConfig(**SMALL | {"attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "opt": OPTConfig(
        vocab_size=64, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    ),
}  # fmt: skip
# The 16 numbers of NF4 (QLoRA, appendix E).
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


@pytest.fixture
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "load_tokenizer", lambda _: None)


pytestmark = pytest.mark.usefixtures("_no_tokenizer")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("model")
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


def load(folder: Path, form: str, **options: Any) -> Any:
    found = load_language_model(Backbone(language_model=str(folder), quantization=form, **options))  # type: ignore[arg-type]
    return found.model.requires_grad_(False)


def plain(model: Any) -> Any:
    """A model in float64 of plain layers, with the weights that the packed ones stand for."""
    made = LlamaForCausalLM(model.config).double().requires_grad_(False)
    weights = {name: x for name, x in model.state_dict().items() if name in made.state_dict()}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    made.load_state_dict(weights | {f"{name}.weight": layer.unpacked(torch.float64) for name, layer in layers.items()})
    return made.eval()


@each_form
def test_weights_are_those_that_bitsandbytes_has(saved: dict[str, Path], form: str) -> None:
    options = {"load_in_8bit": True}
    if form == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # type: ignore[dict-item]
    theirs = AutoModelForCausalLM.from_pretrained(
        saved["llama"], quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
    )
    model = load(saved["llama"], form)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = theirs.get_submodule(name).weight
        if form == "nf4":
            expected_OI = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:
            expected_OI = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        torch.testing.assert_close(layer.unpacked(torch.float32), expected_OI, rtol=1e-6, atol=0)


def test_nf4_is_the_nearest_number_of_its_block(saved: dict[str, Path]) -> None:
    """Of the paper's table, times the largest magnitude of the block, which has an error of its own."""
    original = AutoModelForCausalLM.from_pretrained(saved["llama"], dtype=torch.float32)
    layer = load(saved["llama"], "nf4").model.layers[0].mlp.down_proj
    weight_KN = original.model.layers[0].mlp.down_proj.weight.detach().numpy().reshape(-1, 64).astype(np.float64)
    largest_K1 = np.abs(weight_KN).max(axis=1, keepdims=True)
    nearest_KN = NF4[np.abs(weight_KN[..., None] / largest_K1[..., None] - NF4).argmin(axis=-1)]
    found_KN = layer.unpacked(torch.float32).numpy().reshape(-1, 64)
    # Blocks' scales are rounded to 8 bits: by less than 2 % of the largest scale of 256 blocks.
    assert np.abs(found_KN - nearest_KN * largest_K1).max() < 0.02 * largest_K1.max()
    assert np.abs(found_KN - weight_KN).max() < 0.2 * largest_K1.max()


@each_form
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_values_has_the_same_layers(saved: dict[str, Path], form: str, family: str) -> None:
    model = load(saved[family], form)
    empty = build_empty(Backbone(language_model=str(saved[family]), quantization=form))
    original = AutoModelForCausalLM.from_pretrained(saved[family])
    assert [(name, x.shape, x.dtype) for name, x in empty.state_dict().items()] == [
        (name, x.shape, x.dtype) for name, x in model.state_dict().items()
    ]
    assert all(p.is_meta for p in empty.parameters())
    assert not any(p.requires_grad for layer in packed_layers(model) for p in layer.parameters())
    assert count(empty) == count(model) == sum(p.numel() for p in original.parameters())
    assert packed_layers(model)
    assert type(model.get_output_embeddings()) is nn.Linear


@each_form
def test_bytes_are_those_of_the_packed_weights_and_their_scales(saved: dict[str, Path], form: str) -> None:
    model = load(saved["llama"], form)
    packed = sum(layer.weights for layer in packed_layers(model))
    own = sum(layer.weight.nbytes for layer in packed_layers(model))
    assert own == packed / 2 if form == "nf4" else own == packed
    # nf4: a byte for 64 weights, four for 256 of those bytes (here one block or two), 256 numbers of a code, an offset.
    scales = {
        "nf4": sum(
            n // 64 + 4 * -(-n // 64 // 256) + 4 * 257 for n in (layer.weights for layer in packed_layers(model))
        ),
        "int8": sum(4 * layer.out_features for layer in packed_layers(model)),
    }
    assert scale_bytes(model) == scales[form]
    assert bytes_of(model) >= sum(p.nbytes for p in model.parameters()) + scales[form]


@each_form
@each_method
@pytest.mark.parametrize("family", ["llama", "llama with biases"])
def test_logits_and_gradients_are_those_of_the_unpacked_weights(
    saved: dict[str, Path], form: str, method: AdapterMethod, family: str
) -> None:
    """In float64; up to the rounding of fp32."""
    model = load(saved[family], form)
    check_training(model, plain(model), method)


@each_form
def test_evaluation_and_training_compute_the_same_and_change_nothing(saved: dict[str, Path], form: str) -> None:
    """bitsandbytes' own 4-bit layer has no gradient once it has evaluated on a CPU with AVX512-BF16."""

    def gradient(model: Any) -> Tensor:
        x_BTD = embeds().requires_grad_()
        model.train()(inputs_embeds=x_BTD).logits.square().mean().backward()
        assert x_BTD.grad is not None
        return x_BTD.grad

    model = load(saved["llama"], form)
    before, fresh = copy.deepcopy(model.state_dict()), gradient(load(saved["llama"], form))
    with torch.no_grad():
        evaluated_BTV = logits(model.eval())
    assert torch.equal(logits(model.train()), evaluated_BTV)
    assert torch.equal(gradient(model), fresh)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    # One row of three is computed as it is alone, but for the rounding of a product of more rows.
    with torch.no_grad():
        alone_BTV = model(inputs_embeds=embeds()[:1], use_cache=False).logits
    torch.testing.assert_close(alone_BTV, evaluated_BTV[:1], rtol=1e-4, atol=1e-5)


@each_form
def test_no_cast_of_the_model_rounds_what_a_weight_stands_for(saved: dict[str, Path], form: str) -> None:
    model = load(saved["llama"], form)
    expected = [layer.unpacked(torch.float32) for layer in packed_layers(model)]
    model.to(torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    for layer, weight_OI in zip(packed_layers(model), expected, strict=True):
        assert torch.equal(layer.unpacked(torch.float32), weight_OI)
    assert logits(model).dtype == torch.bfloat16


@each_form
def test_a_base_in_bf16_computes_in_it(saved: dict[str, Path], form: str) -> None:
    model = load(saved["llama"], form, dtype="bf16")
    found_BTV = logits(model)
    assert found_BTV.dtype == torch.bfloat16
    assert far(found_BTV, logits(plain(model))) < 0.03


@each_form
def test_a_copy_shares_all_that_a_layer_holds(saved: dict[str, Path], form: str) -> None:
    model = load(saved["llama"], form)
    other = shared_copy(model)
    for mine, its in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert mine.data_ptr() == its.data_ptr()
    whole = copy.deepcopy(model)
    assert torch.equal(logits(whole), logits(other))


def test_a_checkpoint_that_is_quantised_already_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(saved["llama"])
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    for form in (None, "nf4"):
        with pytest.raises(
            UserError, match=r"already quantised \(quantization_config: gptq\).*allowed: the checkpoint"
        ):
            backbones.check_backbone(Backbone(language_model=str(tmp_path), quantization=form))  # type: ignore[arg-type]


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(UserError, match=r"quantization: nf4 needs bitsandbytes, .*pip install '.*\[quantization\]'"):
        backbones.check_backbone(Backbone(quantization="nf4"))


def test_products_run_without_values() -> None:
    """As ``harness plan`` traces them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = NF4Linear.empty(64, 128, None, torch.device("cpu"))
        x_BTI = torch.empty(2, 5, 64, requires_grad=True)
        layer(x_BTI).sum().backward()
    assert x_BTI.grad is not None
    assert x_BTI.grad.shape == (2, 5, 64)
