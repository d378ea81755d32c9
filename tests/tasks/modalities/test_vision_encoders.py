"""Vision encoders of every family through the one path: saved with random weights, loaded, run, and broken.

Shapes: B pictures, C channels, H × W pixels, N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image as PilImage
from safetensors.torch import load_file, save_file

from harness.core.errors import UserError
from tasks.modalities.image import TINY, Image
from tests.support.vision import CLIP_TOWER, FAMILIES, Family, save

SIZES = [(37, 61), (64, 64), (200, 15)]  # width × height


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no retries


def pictures() -> list[PilImage.Image]:
    rng = np.random.default_rng(0)
    return [PilImage.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_a_saved_encoder_sees_each_picture_as_the_model_alone_does(family: Family, tmp_path: Path) -> None:
    model = save(family, tmp_path)
    encoder = Image().encoder(str(tmp_path))
    assert encoder.width == family.width
    assert not any(module.training for module in encoder.modules())
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    together = encoder.encode(pictures())
    assert [tuple(features_ND.shape) for features_ND in together] == [(family.tokens, family.width)] * 3
    assert (together[0] - together[1]).abs().max() > 1e-3
    for picture, features_ND in zip(pictures(), together, strict=True):
        pixels_BCHW = family.processor()(images=[picture], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(features_ND, family.see(model, pixels_BCHW)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features_ND, encoder.encode([picture])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_empty_encoder_has_the_shapes_of_the_loaded_one(family: Family, tmp_path: Path) -> None:
    model = save(family, tmp_path)
    empty, loaded = Image().empty_encoder(str(tmp_path)), Image().encoder(str(tmp_path))
    assert empty.width == loaded.width
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert sum(p.numel() for p in empty.parameters()) <= sum(p.numel() for p in model.parameters())
    assert Image().empty_encoder(str(tmp_path)).check(pictures()[0]) is None
    seen = empty.encode(pictures())  # which a forecast asks for
    assert [(x_ND.shape, x_ND.device.type) for x_ND in seen] == [
        (x_ND.shape, "meta") for x_ND in loaded.encode(pictures())
    ]


def test_pictures_are_prepared_as_the_processor_of_the_folder_says(tmp_path: Path) -> None:
    family = FAMILIES["clip_vision"]
    save(family, tmp_path)
    wide = PilImage.effect_noise((96, 48), 60).convert("RGB")
    encoder = Image().encoder(str(tmp_path))
    found_CHW = encoder.processor(images=[wide], return_tensors="pt")["pixel_values"][0]
    middle = wide.resize((64, 32), PilImage.Resampling.BICUBIC).crop((16, 0, 48, 32))
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected_HWC = (np.asarray(middle) / 255 - mean) / std
    assert np.abs(found_CHW.numpy() - expected_HWC.transpose(2, 0, 1)).max() < 1e-5


def test_features_stay_in_the_encoders_precision(tmp_path: Path) -> None:
    save(FAMILIES["vit"], tmp_path)
    encoder = Image().encoder(str(tmp_path)).to(torch.bfloat16)
    assert encoder.encode(pictures())[0].dtype == torch.bfloat16


def test_the_built_in_encoder_sees_pictures_of_any_size() -> None:
    encoder = Image().encoder(TINY)
    together = encoder.encode(pictures())
    assert [tuple(features_ND.shape) for features_ND in together] == [(16, encoder.width)] * 3
    torch.testing.assert_close(encoder.encode(pictures()[2:])[0], together[2], rtol=1e-4, atol=1e-5)
    empty = Image().empty_encoder(TINY)
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in encoder.named_parameters()}


@pytest.mark.parametrize(
    ("name", "parameters", "width"),
    [  # as the paper counts them
        ("microsoft/swinv2-tiny-patch4-window8-256", 27_578_154, 768),
        ("microsoft/swinv2-large-patch4-window12to16-192to256-22kto1k-ft", 195_202_932, 1536),
    ],
)
def test_known_encoders_are_counted_offline(name: str, parameters: int, width: int) -> None:
    encoder = Image().empty_encoder(name)
    assert {p.device.type for p in encoder.parameters()} == {"meta"}
    assert (sum(p.numel() for p in encoder.parameters()), encoder.width) == (parameters, width)


# ── What is not a vision encoder, or a broken one


def language_model() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.LlamaModel(hf.LlamaConfig(vocab_size=16, **sizes))


def audio_model() -> Any:
    return hf.ASTModel(
        hf.ASTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, max_length=32)
    )


def masking_model() -> Any:
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return hf.ViTMAEModel(hf.ViTMAEConfig(**CLIP_TOWER, **sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (language_model, r"\(llama\) is not a vision encoder: it takes input_ids, not pixel_values"),
        (audio_model, r"\(audio-spectrogram-transformer\) is not a vision encoder: it takes input_values"),
        (masking_model, r"\(vit_mae\) masks random parts of every picture"),
    ],
)
def test_other_models_are_refused_before_their_weights_are_loaded(
    make: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    make().config.save_pretrained(tmp_path)  # no weights
    for method in (Image().encoder, Image().empty_encoder):
        with pytest.raises(UserError, match=rf"backbone\.encoders: '{tmp_path}' {message}"):
            method(str(tmp_path))


def test_missing_weights_are_named_instead_of_drawn_at_random(tmp_path: Path) -> None:
    save(FAMILIES["clip"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "vision_model.encoder.layers.1.mlp" not in name}
    assert len(kept) == len(weights) - 4
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"weights are missing: vision_model\.encoder\.layers\.1\.mlp\.fc1\.bias.* 1 more"
    ):
        Image().encoder(str(tmp_path))
    only_vision = {name: tensor for name, tensor in weights.items() if name.startswith("vision_model.")}
    save_file(only_vision, tmp_path / "model.safetensors", {"format": "pt"})
    Image().encoder(str(tmp_path))  # the text tower is not used


def test_a_pooler_is_neither_needed_nor_counted(tmp_path: Path) -> None:
    save(FAMILIES["vit"], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "pooler" not in n}, tmp_path / "model.safetensors", {"format": "pt"})
    assert not [name for name, _ in Image().encoder(str(tmp_path)).named_parameters() if "pooler" in name]


def test_broken_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/nowhere': no such folder"):
        Image().encoder(f"{tmp_path}/nowhere")
    with pytest.raises(UserError, match=rf"'{tmp_path}' could not be loaded"):
        Image().encoder(str(tmp_path))
    save(FAMILIES["vit"], tmp_path)
    processor = (tmp_path / "preprocessor_config.json").read_text()
    (tmp_path / "preprocessor_config.json").write_text(processor.replace("32", "48"))
    with pytest.raises(UserError, match=r"model and image processor do not work together: .*48"):
        Image().encoder(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=rf"'{tmp_path}' could not be loaded"):
        Image().encoder(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(processor)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"'{tmp_path}' could not be loaded"):
        Image().encoder(str(tmp_path))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    for method in (Image().encoder, Image().empty_encoder):
        with pytest.raises(UserError, match=r"'builtin/tiny-visio' is not an encoder of Image; .*'builtin/tiny-vi"):
            method("builtin/tiny-visio")
        with pytest.raises(
            UserError, match=r"'google/vit-of-nobody' could not be loaded from a folder or from the hub"
        ):
            method("google/vit-of-nobody")
