"""The language model of a vision-language model in 4 and 8 bits: it alone is quantised, and computes as its weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.core.errors import UserError
from harness.experiment.sections import Backbone
from harness.model.backbones import build_empty, load_language_model
from harness.model.own_encoder import make
from harness.model.packed import count, packed_layers
from tests.support import audio_language
from tests.support.quantised import far
from tests.support.vision_language import KINDS, each_kind, save

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")

FAST = ("llava",)
each_form = pytest.mark.parametrize("form", ["nf4", "int8"])


def logits(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    width = model.get_input_embeddings().weight.shape[1]
    x_BTD = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        found_BTV: Tensor = model(inputs_embeds=x_BTD, use_cache=False).logits
    return found_BTV


def unpacked(model: Any) -> Any:
    """A copy with plain layers of the weights that packed ones stand for, in float64."""
    plain = copy.deepcopy(model)
    for layer in packed_layers(model):
        path = next(name for name, module in model.named_modules() if module is layer)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        with torch.no_grad():
            linear.weight.copy_(layer.unpacked(torch.float32))
            if layer.bias is not None:
                linear.bias.copy_(layer.bias)
        plain.set_submodule(path, linear)
    return plain.double()


def paths_of(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if module in packed_layers(model)]


def check(kind: str, form: str, folder: Path) -> None:
    place = str((save if kind in KINDS else audio_language.save)(kind, folder))
    plain = Backbone.model_validate({"model": place})
    packed = plain.model_copy(update={"quantization": form})
    model, whole, empty = load_language_model(packed).model, load_language_model(plain).model, build_empty(packed)
    layers = [name for name, m in whole.named_modules() if type(m) is nn.Linear and name.startswith("model.")]
    assert paths_of(model) == paths_of(empty) == layers
    assert count(model) == count(empty) == count(whole)
    assert [p.shape for p in model.parameters()] == [p.shape for p in empty.parameters()]
    assert type(model.get_output_embeddings()) is nn.Linear
    found_BTV, expected_BTV = logits(model), logits(whole)
    assert far(found_BTV, logits(unpacked(model), torch.float64)) < 1e-5
    assert 0 < far(found_BTV, expected_BTV) < {"nf4": 0.5, "int8": 0.1}[form]


@each_form
@each_kind(FAST)
def test_the_decoder_alone_is_quantised(kind: str, form: str, tmp_path: Path) -> None:
    check(kind, form, tmp_path)


@pytest.mark.slow
@each_kind([name for name in KINDS if name not in FAST])
def test_the_decoder_of_each_class_alone_is_quantised(kind: str, tmp_path: Path) -> None:
    check(kind, "nf4", tmp_path)


@pytest.mark.slow
@audio_language.each_kind(audio_language.KINDS)
def test_the_decoder_of_each_class_that_hears_alone_is_quantised(kind: str, tmp_path: Path) -> None:
    check(kind, "nf4", tmp_path)


def test_the_tower_and_the_connector_are_those_of_the_plain_model(tmp_path: Path) -> None:
    plain = Backbone.model_validate({"model": str(save("llava", tmp_path))})
    found, expected = (
        make(one, "image", weights=True) for one in (plain.model_copy(update={"quantization": "nf4"}), plain)
    )
    assert not packed_layers(found)
    for mine, its in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
        assert mine[0] == its[0]
        assert torch.equal(mine[1], its[1])


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Backbone.model_validate({"model": str(save("llava", tmp_path)), "quantization": "nf4"})
    monkeypatch.setattr("harness.model.quantisation.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"backbone\.quantization: nf4 needs accelerate and bitsandbytes, which"):
        load_language_model(packed)
