"""Language models and encoders of other families through the one path: saved with random weights, loaded, run.

Shapes: B pictures, C channels, H × W pixels, N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    Swinv2Config,
    Swinv2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from harness import backbones
from harness.errors import UserError
from harness.experiment import Backbone

WORDS = ["a", "red", "blue", "circle", "square", "is", "left", "of", "the"]
SIZES = [(37, 61), (64, 64), (200, 15)]  # width × height


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no retries


def pictures() -> list[Image.Image]:
    return [Image.effect_noise(size, 80).convert("RGB") for size in SIZES]


# ── Language models


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    )


def opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=16,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    )


def save_tokenizer(folder: Path, **special: str) -> None:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.usefixtures("_offline")
def test_a_saved_language_model_is_loaded_exactly(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.to(torch.bfloat16).save_pretrained(tmp_path)  # as many are published
    save_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    loaded = backbones.load_language_model(Backbone(language_model=str(tmp_path)))
    assert (loaded.bos_id, loaded.eos_id) == (1, 2)
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    ids_BT = loaded.tokenizer(["a red circle", "blue square left"], add_special_tokens=False, return_tensors="pt")
    assert ids_BT["input_ids"].tolist() == [[3, 4, 6], [5, 7, 9]]
    with torch.no_grad():
        found_BTV, expected_BTV = (m(ids_BT["input_ids"]).logits for m in (loaded.model, model.float()))
    torch.testing.assert_close(found_BTV, expected_BTV, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_offline")
def test_a_language_model_without_bos_opens_with_its_end_of_text(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    save_tokenizer(tmp_path, eos_token="</s>")
    assert backbones.load_language_model(Backbone(language_model=str(tmp_path))).bos_id == 2


def test_the_built_in_language_model_reads_any_text() -> None:
    language_model = backbones.load_language_model(Backbone())
    text = "two züge, 漢字 and a 🦊"
    ids = language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert language_model.tokenizer.decode(ids) == text
    assert language_model.bos_id != language_model.eos_id


# ── Encoders


def vit(folder: Path) -> tuple[int, int]:
    ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return 17, 32  # a class token and 4 × 4 patches


def swin(folder: Path) -> tuple[int, int]:
    Swinv2Model(
        Swinv2Config(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return 16, 32  # 8 × 8 patches merged once, width doubled


TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


def clip(folder: Path) -> tuple[int, int]:
    CLIPModel(CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return 17, 32


def siglip(folder: Path) -> tuple[int, int]:
    SiglipModel(SiglipConfig(vision_config=TOWER, text_config=TEXT)).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return 16, 32  # no class token


@pytest.mark.parametrize("save", [vit, swin, clip, siglip])
@pytest.mark.usefixtures("_offline")
@torch.no_grad()
def test_a_saved_encoder_sees_pictures_of_any_size(save: Callable[[Path], tuple[int, int]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens, width = save(tmp_path)
    encoder = backbones.load_encoder("image", Backbone(encoders={"image": str(tmp_path)}))
    assert encoder.width == width
    assert not any(module.training for module in encoder.modules())
    pixels_BCHW = encoder.preprocess(pictures())
    assert (pixels_BCHW.shape, pixels_BCHW.dtype) == ((3, 3, 32, 32), torch.float32)
    features_BND = encoder(pixels_BCHW)
    assert features_BND.shape == (3, tokens, width)
    assert features_BND.isfinite().all()
    assert (features_BND[0] - features_BND[1]).abs().max() > 1e-3
    alone_ND = encoder(encoder.preprocess(pictures()[2:]))[0]
    torch.testing.assert_close(encoder(encoder.preprocess(pictures()))[2].shape, alone_ND.shape)
    again = encoder(pixels_BCHW[2:])[0]
    torch.testing.assert_close(again, features_BND[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("save", "model_class"), [(clip, CLIPModel), (siglip, SiglipModel)])
@pytest.mark.usefixtures("_offline")
@torch.no_grad()
def test_of_two_towers_the_vision_tower_is_taken_with_its_weights(
    save: Callable[[Path], Any], model_class: Any, tmp_path: Path
) -> None:
    save(tmp_path)
    encoder = backbones.load_encoder("image", Backbone(encoders={"image": str(tmp_path)}))
    whole = model_class.from_pretrained(tmp_path).eval()
    pixels_BCHW = encoder.preprocess(pictures())
    expected_BND = whole.vision_model(pixel_values=pixels_BCHW).last_hidden_state
    torch.testing.assert_close(encoder(pixels_BCHW), expected_BND)
    assert sum(p.numel() for p in encoder.parameters()) < sum(p.numel() for p in whole.parameters())


@torch.no_grad()
def test_the_built_in_encoder_sees_pictures_of_any_size() -> None:
    encoder = backbones.load_encoder("image", Backbone())
    features_BND = encoder(encoder.preprocess(pictures()))
    assert features_BND.shape == (3, 16, encoder.width)
    assert (features_BND[0] - features_BND[1]).abs().max() > 1e-3


def test_features_stay_in_the_encoders_precision() -> None:
    encoder = backbones.load_encoder("image", Backbone()).to(torch.bfloat16)
    assert encoder(encoder.preprocess(pictures())).dtype == torch.bfloat16


# ── Without weights, without a network


@pytest.mark.parametrize(
    ("name", "parameters", "width"),
    [  # as the paper counts them
        ("microsoft/swinv2-tiny-patch4-window8-256", 27_578_154, 768),
        ("microsoft/swinv2-large-patch4-window12to16-192to256-22kto1k-ft", 195_202_932, 1536),
    ],
)
@pytest.mark.usefixtures("_offline")
def test_known_encoders_are_counted_offline(name: str, parameters: int, width: int) -> None:
    _, encoders = backbones.build_empty(Backbone(encoders={"image": name}))
    module, found = encoders["image"]
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert (sum(p.numel() for p in module.parameters()), found) == (parameters, width)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("facebook/opt-125m", 125_239_296), ("HuggingFaceTB/SmolLM2-135M", 134_515_008), ("builtin/tiny-llama", None)],
)
@pytest.mark.usefixtures("_offline")
def test_known_language_models_are_counted_offline(name: str, parameters: int | None) -> None:
    if parameters is None:
        live = backbones.load_language_model(Backbone(language_model=name)).model
        parameters = sum(p.numel() for p in live.parameters())
    model, _ = backbones.build_empty(Backbone(language_model=name))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("save", [vit, clip])
@pytest.mark.usefixtures("_offline")
def test_an_empty_encoder_has_the_shapes_of_the_loaded_one(save: Callable[[Path], Any], tmp_path: Path) -> None:
    save(tmp_path)
    backbone = Backbone(encoders={"image": str(tmp_path)})
    empty, width = backbones.build_empty(backbone)[1]["image"]
    loaded = backbones.load_encoder("image", backbone)
    assert width == loaded.width
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in loaded.model.named_parameters()}


@pytest.mark.usefixtures("_offline")
def test_an_unknown_hub_id_offline_is_an_error_that_says_so() -> None:
    name = "facebook/opt-125mm"
    with pytest.raises(
        UserError,
        match=r"'facebook/opt-125mm'.*neither as a folder nor from the hub.*offline mode.*builtin/tiny-llama",
    ):
        backbones.check_backbone(Backbone(language_model=name))
    with pytest.raises(UserError, match=r"'facebook/opt-125mm' cannot be had, neither as a folder nor from the hub"):
        backbones.load_language_model(Backbone(language_model=name))
    with pytest.raises(UserError, match=r"'facebook/opt-125mm' cannot be had, neither as a folder nor from the hub"):
        backbones.load_encoder("image", Backbone(encoders={"image": name}))


@pytest.mark.usefixtures("_offline")
def test_a_hub_id_that_is_known_but_not_in_the_cache_fails_before_any_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its configuration is known, so it can be counted; its weights cannot be had, so it cannot be run."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    backbones.load_config("facebook/opt-125m")
    with pytest.raises(UserError, match="'facebook/opt-125m' cannot be had"):
        backbones.check_backbone(Backbone(language_model="facebook/opt-125m"))


@pytest.mark.usefixtures("_offline")
def test_a_missing_folder_and_an_unknown_built_in_are_errors_that_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/nowhere': no such folder; .*builtin/tiny-llama"):
        backbones.check_backbone(Backbone(language_model=f"{tmp_path}/nowhere"))
    with pytest.raises(
        UserError, match=r"'builtin/tiny-lama' is not a built-in language model; .*did you mean 'builtin/tiny-llama'"
    ):
        backbones.check_backbone(Backbone(language_model="builtin/tiny-lama"))


@pytest.mark.usefixtures("_offline")
def test_a_folder_without_a_model_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"'{tmp_path}' cannot be had"):
        backbones.load_language_model(Backbone(language_model=str(tmp_path)))
    vit(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=rf"'{tmp_path}' cannot be had"):
        backbones.load_encoder("image", Backbone(encoders={"image": str(tmp_path)}))
