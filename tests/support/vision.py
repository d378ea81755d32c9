"""Vision encoders of every family, saved with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
CLIP_TOWER, SQUARE = TOWER | {"intermediate_size": 48}, {"height": 32, "width": 32}


class Family(NamedTuple):
    """A model with random weights, its processor, tokens and width, and how to see one picture with it alone."""

    model: Callable[[], Any]
    processor: Callable[[], Any]
    tokens: int
    width: int
    see: Callable[[Any, Tensor], Tensor] = lambda model, pixels_BCHW: model(pixel_values=pixels_BCHW).last_hidden_state


def squeezed() -> Any:  # resized to the square whatever the proportions
    return hf.ViTImageProcessorPil(size=SQUARE)


def cropped() -> Any:  # the shorter side resized, the middle cut out
    return hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)


def tower(model: Any, pixels_BCHW: Tensor) -> Tensor:
    features: Tensor = model.vision_model(pixel_values=pixels_BCHW).last_hidden_state
    return features


def grid(model: Any, pixels_BCHW: Tensor) -> Tensor:
    features_BDHW: Tensor = model(pixel_values=pixels_BCHW).last_hidden_state
    return features_BDHW.reshape(*features_BDHW.shape[:2], -1).mT


FAMILIES = {
    "vit": Family(lambda: hf.ViTModel(hf.ViTConfig(intermediate_size=48, **TOWER)), squeezed, 17, 32),
    "swinv2": Family(
        lambda: hf.Swinv2Model(
            hf.Swinv2Config(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        *(squeezed, 16, 32),  # 8 × 8 patches merged once, width doubled
    ),
    "dinov2": Family(
        lambda: hf.Dinov2Model(hf.Dinov2Config(mlp_ratio=2, **TOWER)),
        lambda: hf.BitImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE),
        *(17, 32),
    ),
    "clip": Family(
        lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=CLIP_TOWER, text_config=TEXT)), cropped, 17, 32, tower
    ),
    "clip_vision": Family(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**CLIP_TOWER)), cropped, 17, 32),
    "siglip": Family(
        lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=CLIP_TOWER, text_config=TEXT)),
        lambda: hf.SiglipImageProcessorPil(size=SQUARE),
        *(16, 32, tower),  # no class token
    ),
    "siglip_vision": Family(
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**CLIP_TOWER)),
        lambda: hf.SiglipImageProcessorPil(size=SQUARE),
        *(16, 32),
    ),
    "convnext": Family(
        lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1], image_size=64)),
        lambda: hf.ViTImageProcessorPil(size={"height": 64, "width": 96}),
        *(6, 24, grid),  # a grid of 2 × 3, read row by row
    ),
}


def save(family: Family, folder: Path) -> Any:
    torch.manual_seed(0)
    model = family.model().eval()
    model.save_pretrained(folder)
    family.processor().save_pretrained(folder)
    return model
