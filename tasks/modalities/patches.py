"""Which tokens of a picture are patches of a grid, and which part of the picture the grid covers.

Shapes: C channels, H × W pixels that the encoder sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tasks.encoder import Encoder
from tasks.modalities.encoders.pretrained_vision import PretrainedVision, grid_shape
from tasks.modalities.encoders.tiny_vision import TinyVision

Floats = NDArray[np.float64]


class Grid(NamedTuple):
    """Tokens read row by row, after ``leading`` ones that are not patches (class token, registers)."""

    leading: int
    rows: int
    columns: int
    box: tuple[float, float, float, float]  # left, top, right, bottom of what is seen, as shares of width and height


def grid_of(encoder: Encoder, item: Any, tokens: int) -> Grid | None:
    """The grid formed by an encoder's tokens; None: not a picture, padded, or not one token per patch.

    Args:
        encoder: with its processor.
        item: decoded, upright.
        tokens: number of tokens that the encoder makes of it.
    """
    if not isinstance(item, Image.Image) or not isinstance(encoder, TinyVision | PretrainedVision):
        return None
    seen = _seen(encoder, item.size)
    if seen is None:
        return None
    height, width, box = seen
    if isinstance(encoder, PretrainedVision) and (pooled := encoder.options.grid) is not None:
        return Grid(tokens - pooled[0] * pooled[1], *pooled, box)
    registers = getattr(encoder.model.config, "num_register_tokens", 0) if isinstance(encoder, PretrainedVision) else 0
    for leading in sorted({0, 1, 2, 1 + registers}):  # none, a class token, two (DeiT distilled), registers (DINOv2)
        if shape := grid_shape(tokens - leading, height, width):
            return Grid(leading, *shape, box)
    return None


def _seen(
    encoder: TinyVision | PretrainedVision, size: tuple[int, int]
) -> tuple[int, int, tuple[float, float, float, float]] | None:
    """H, W and the box, measured with a colour ramp, because processors crop and resize by their own options."""
    width, height = size
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    ramp[..., 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    pictures = (Image.fromarray(ramp), Image.new("RGB", size, "black"), Image.new("RGB", size, "white"))
    ramp_CHW, black_CHW, white_CHW = (_pixels(encoder, picture) for picture in pictures)
    if ramp_CHW.ndim != 3 or len(ramp_CHW) != 3 or not np.all(white_CHW > black_CHW):
        return None  # several crops, no colours, or padding: the same whatever the picture
    place_CHW = (ramp_CHW - black_CHW) / (white_CHW - black_CHW)
    left, right = _ends(place_CHW[0].mean(axis=0))
    top, bottom = _ends(place_CHW[1].mean(axis=1))
    return ramp_CHW.shape[1], ramp_CHW.shape[2], (left, top, right, bottom)


def _ends(places_X: Floats) -> tuple[float, float]:
    """Where the first pixel begins and the last one ends, from the places of their middles."""
    middles_X = (np.arange(len(places_X)) + 0.5) / len(places_X)
    slope, start = np.polyfit(middles_X, places_X, 1)
    first, last = np.clip(np.round([start, start + slope], 2), 0, 1)
    return float(first), float(last)


def _pixels(encoder: TinyVision | PretrainedVision, picture: Image.Image) -> Floats:
    if isinstance(encoder, TinyVision):
        pixels: Any = encoder.preprocess([picture])
    else:
        pixels = encoder.processor(images=picture, return_tensors="pt")["pixel_values"]
    found_CHW: Floats = pixels[0].double().numpy()
    return found_CHW
