"""The layer, the class token, the pooling and the dtype of pretrained encoders, against their classes' own tensors.

Shapes: B pictures, C channels, H × W cells, N tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from PIL import Image as PilImage
from torch import Tensor

from harness.core.errors import UserError
from tasks.encoder import Encoder
from tasks.modalities.audio import Audio
from tasks.modalities.encoders.options import VisionOptions
from tasks.modalities.encoders.pretrained_vision import PretrainedVision
from tasks.modalities.encoders.recording import Recording
from tasks.modalities.image import Image
from tasks.modalities.patches import grid_of
from tests.support.recordings import sine
from tests.support.vision import FAMILIES, TOWER, Family, save, squeezed

REGISTERS = Family(
    lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=4, **TOWER)),
    *(squeezed, 21, 32),
)
DISTILLED = Family(lambda: hf.DeiTModel(hf.DeiTConfig(intermediate_size=48, **TOWER)), squeezed, 18, 32)
RESNET = Family(
    lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1])),
    lambda: hf.ViTImageProcessorPil(size={"height": 64, "width": 96}),
    *(6, 24),
)
HIERA = Family(
    lambda: hf.HieraModel(
        hf.HieraConfig(image_size=[64, 64], embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2])
    ),
    lambda: hf.ViTImageProcessorPil(size={"height": 64, "width": 64}),
    *(4, 64),
)
ALL = FAMILIES | {"registers": REGISTERS, "distilled": DISTILLED, "resnet": RESNET}
LEADING = {"vit": 1, "dinov2": 1, "clip": 1, "clip_vision": 1, "registers": 5, "distilled": 2}


def picture() -> PilImage.Image:
    torch.manual_seed(0)
    pixels_HWC = torch.randint(0, 256, (37, 61, 3), dtype=torch.uint8)
    return PilImage.fromarray(pixels_HWC.numpy())


def pixels(family: Family) -> Tensor:
    found_BCHW: Tensor = family.processor()(images=[picture()], return_tensors="pt")["pixel_values"]
    return found_BCHW


@torch.no_grad()
def hidden_states(model: Any, family: Family) -> tuple[Tensor, ...]:
    tower = getattr(model, "vision_model", model)
    found: tuple[Tensor, ...] = tower(pixel_values=pixels(family), output_hidden_states=True).hidden_states
    return found


def see(model: Any, family: Family, **options: Any) -> Tensor:
    """The features (N, D) of the picture."""
    tower = getattr(model, "vision_model", model)
    (features_ND,) = PretrainedVision(tower, family.processor, VisionOptions(**options)).encode([picture()])
    return features_ND


def made(family: Family) -> Any:
    torch.manual_seed(0)
    return family.model().eval()


def of_map(x: Tensor) -> Tensor:
    """A map's cells row by row, a sequence as it is."""
    return x[0].flatten(1).mT if x.dim() == 4 else x[0]


@pytest.mark.parametrize("name", ALL)
def test_a_layer_is_the_classes_own_hidden_state(name: str) -> None:
    family, model = ALL[name], made(ALL[name])
    own = hidden_states(model, family)
    found = [see(model, family, layer=layer) for layer in range(-len(own), len(own))]
    for one, state in zip(found, own * 2, strict=True):
        torch.testing.assert_close(one, of_map(state), rtol=1e-5, atol=1e-6)
    assert len({tuple(one.flatten().tolist()) for one in found}) == len(own)
    for layer in (len(own), -len(own) - 1):
        with pytest.raises(UserError, match=rf"^layer: found {layer}; allowed: -{len(own)} to {len(own) - 1}, one of"):
            see(model, family, layer=layer)


@pytest.mark.parametrize("name", ALL)
def test_the_class_token_and_registers_are_left_out(name: str) -> None:
    family, model = ALL[name], made(ALL[name])
    if name not in LEADING:
        with pytest.raises(UserError, match=r"^select_strategy: found 'default', but there is no class token; allowed"):
            see(model, family, select_strategy="default")
        return
    whole_ND = see(model, family)
    assert len(whole_ND) == LEADING[name] + 16
    assert torch.equal(see(model, family, select_strategy="default"), whole_ND[LEADING[name] :])


@pytest.mark.parametrize("name", ALL)
def test_a_map_is_averaged_to_the_tokens_asked_for(name: str) -> None:
    family, model = ALL[name], made(ALL[name])
    whole_ND, leading = see(model, family), LEADING.get(name, 0)
    rows, columns = (2, 3) if len(whole_ND) == 6 else (4, 4)
    map_HWD = whole_ND[leading:].unflatten(0, (rows, columns)).double()
    # By hand: halves of the rows, all columns.
    expected_ND = torch.stack([map_HWD[: rows // 2].mean((0, 1)), map_HWD[rows // 2 :].mean((0, 1))])
    found_ND = see(model, family, pooling="2x1")
    assert torch.equal(found_ND[:leading], whole_ND[:leading]), "class tokens stay before it"
    torch.testing.assert_close(found_ND[leading:].double(), expected_ND, rtol=1e-5, atol=1e-6)
    assert torch.allclose(see(model, family, pooling=f"{rows}x{columns}"), whole_ND, atol=1e-6)
    if leading:
        found_ND = see(model, family, pooling="2x1", select_strategy="default")
        torch.testing.assert_close(found_ND.double(), expected_ND, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=rf"^pooling: found '9x1', but there is a map of {rows}x{columns} to average"):
        see(model, family, pooling="9x1")


@pytest.mark.parametrize("name", ["swinv2", "convnext"])
def test_a_stage_of_a_pyramid_is_averaged(name: str) -> None:
    """Swin's inner stages are sequences, those of a convolutional network maps, each of another width."""
    family, model = ALL[name], made(ALL[name])
    own = hidden_states(model, family)[0]
    own_BDHW = own if own.dim() == 4 else own.mT.unflatten(2, (8, 8))
    expected_ND = of_map(F.adaptive_avg_pool2d(own_BDHW.double(), (3, 2)))
    found_ND = see(model, family, layer=0, pooling="3x2")
    torch.testing.assert_close(found_ND.double(), expected_ND, rtol=1e-5, atol=1e-6)


def test_tokens_that_keep_an_order_of_their_own_are_put_back_into_the_picture() -> None:
    """Hiera's inner tokens are ordered by the units that it pools later."""
    model = made(HIERA)
    with torch.no_grad():
        own = model(pixel_values=pixels(HIERA), output_hidden_states=True)
    map_ND = own.reshaped_hidden_states[0][0].flatten(0, 1)  # rows, columns, width
    assert not torch.allclose(own.hidden_states[0][0], map_ND)
    torch.testing.assert_close(see(model, HIERA, layer=0), map_ND, rtol=1e-5, atol=1e-6)


def test_patches_of_a_picture_that_is_not_square() -> None:
    family = ALL["dinov2"]
    model = made(family)
    wide = lambda: hf.ViTImageProcessorPil(size={"height": 16, "width": 32})  # noqa: E731
    found = see(model, family._replace(processor=wide), pooling="2x2")
    whole = see(model, family._replace(processor=wide))[1:].unflatten(0, (2, 4))
    torch.testing.assert_close(found[1:], whole.unflatten(1, (2, 2)).mean(2).flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_the_cells_of_an_averaged_map_are_placed_on_the_picture() -> None:
    encoder = PretrainedVision(made(ALL["vit"]), squeezed, VisionOptions(pooling="2x4"))
    (features_ND,) = encoder.encode([picture()])
    found = grid_of(encoder, picture(), len(features_ND))
    assert found is not None
    assert found[:3] == (1, 2, 4)


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("clip", {"layer": -2, "select_strategy": "default"}, (16, 32)),
        ("swinv2", {"layer": 0, "pooling": "2x2"}, (4, 16)),
        ("convnext", {"layer": 2, "pooling": "3x3", "dtype": "bf16"}, (9, 8)),
    ],
)
def test_an_encoder_without_weights_has_the_shapes_and_the_dtype(
    name: str, options: dict[str, Any], shape: tuple[int, int], tmp_path: Path
) -> None:
    save(ALL[name], tmp_path)
    encoder, empty = (make(str(tmp_path), options=options) for make in (Image().encoder, Image().empty_encoder))
    (features_ND,), (shape_ND,) = encoder.encode([picture()]), empty.encode([picture()])
    assert features_ND.shape == shape_ND.shape == shape
    assert (encoder.width, empty.width) == (shape[1], shape[1])
    assert (shape_ND.device.type, shape_ND.dtype) == ("meta", features_ND.dtype)
    for make in (Image().encoder, Image().empty_encoder):
        with pytest.raises(UserError, match=r"^layer: found 30; allowed: -"):
            make(str(tmp_path), options={"layer": 30})


@pytest.mark.parametrize("name", ["vit", "swinv2", "convnext"])
def test_in_bf16_an_encoder_takes_half_the_memory_and_its_features_too(name: str, tmp_path: Path) -> None:
    save(ALL[name], tmp_path)
    full, half = (Image().encoder(str(tmp_path), options={"dtype": dtype}) for dtype in ("fp32", "bf16"))
    (exact_ND,), (found_ND,) = full.encode([picture()]), half.encode([picture()])
    assert (bytes_of(half), found_ND.nbytes) == (bytes_of(full) / 2, exact_ND.nbytes / 2)
    off = (found_ND.float() - exact_ND).norm() / exact_ND.norm()
    assert 0 < off < 0.03  # a number in bf16 is off by at most 0.004; errors of layers add up


def bytes_of(encoder: Encoder) -> int:
    return sum(p.nbytes for p in encoder.parameters())


@pytest.mark.parametrize(("saved", "found"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_auto_is_the_dtype_of_the_checkpoint(saved: torch.dtype, found: torch.dtype, tmp_path: Path) -> None:
    save(ALL["vit"], tmp_path).to(saved).save_pretrained(tmp_path)
    for options, dtype in (({"dtype": "auto"}, found), ({}, torch.float32)):
        assert Image().encoder(str(tmp_path), options=options).encode([picture()])[0].dtype == dtype


@pytest.fixture
def whisper(tmp_path: Path) -> Path:
    sizes = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "vocab_size": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    config = hf.WhisperConfig(max_source_positions=100, **sizes, **decoder, **tokens)
    hf.WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    hf.WhisperFeatureExtractor(chunk_length=2).save_pretrained(tmp_path)
    return tmp_path


def test_a_recordings_layer_and_dtype(whisper: Path) -> None:
    item = Recording(sine(440, 16_000).astype("float32"))
    model = hf.WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    mel_BMF = hf.WhisperFeatureExtractor.from_pretrained(whisper)(
        item.samples, sampling_rate=16_000, return_tensors="pt"
    )["input_features"]
    with torch.no_grad():
        own = model.get_encoder()(mel_BMF, output_hidden_states=True).hidden_states
    for layer in (0, -2):
        (found_ND,) = Audio().encoder(str(whisper), options={"layer": layer}).encode([item])
        torch.testing.assert_close(found_ND, own[layer][0, :25], rtol=1e-5, atol=1e-6)
    full, half = (Audio().encoder(str(whisper), options={"dtype": dtype}) for dtype in ("fp32", "bf16"))
    (exact_ND,), (half_ND,) = full.encode([item]), half.encode([item])
    assert (half_ND.dtype, bytes_of(half)) == (torch.bfloat16, bytes_of(full) / 2)
    assert 0 < (half_ND.float() - exact_ND).norm() / exact_ND.norm() < 0.02
    for make in (Audio().encoder, Audio().empty_encoder):
        with pytest.raises(UserError, match=r"^layer: found 3; allowed: -3 to 2, one of its hidden states"):
            make(str(whisper), options={"layer": 3})


def test_a_class_without_inner_layers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., Any] = hf.ViTModel.forward

    def forward(self: Any, pixel_values: Tensor, **_: Any) -> Any:
        return plain(self, pixel_values=pixel_values)

    monkeypatch.setattr(hf.ViTModel, "forward", forward)
    with pytest.raises(UserError, match=r"^layer: found -2; allowed: none, its class tells none"):
        see(made(ALL["vit"]), ALL["vit"], layer=-2)
