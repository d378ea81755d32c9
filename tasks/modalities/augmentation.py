"""Random changes of training pictures, named as torchvision's transforms, done with Pillow.

https://docs.pytorch.org/vision/stable/transforms.html: RandomResizedCrop, RandomHorizontalFlip, ColorJitter.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field, model_validator

from tasks.base import Config

_ATTEMPTS = 10  # torchvision's: a crop of the drawn size and proportions may not fit


class Augmentation(Config):
    """What is changed for each training draw; nothing by default."""

    horizontal_flip: float = Field(default=0.0, ge=0, le=1)  # probability; makes "on the left" wrong
    crop_scale: tuple[float, float] | None = None  # least and greatest share of the area that a crop keeps
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # least and greatest width / height of a crop
    brightness: float = Field(default=0.0, ge=0)  # b: multiplied by a factor within [max(0, 1 - b), 1 + b]
    contrast: float = Field(default=0.0, ge=0)
    saturation: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check_ranges(self) -> Augmentation:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale: 0 < least <= greatest <= 1; found {list(self.crop_scale)}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio: 0 < least <= greatest; found {list(self.crop_ratio)}")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        jitter = self.brightness or self.contrast or self.saturation
        return bool(self.horizontal_flip or self.crop_scale or jitter)

    def apply(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Change an RGB picture; its size is kept, the original is not modified, and ``rng`` is the only randomness."""
        if self.crop_scale is not None:
            box = crop_box(picture.size, self.crop_scale, self.crop_ratio, rng)
            picture = picture.resize(picture.size, Image.Resampling.BILINEAR, box=box)
        if rng.random() < self.horizontal_flip:
            picture = ImageOps.mirror(picture)
        jitter = (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        )
        for number in rng.permutation(len(jitter)):
            enhancer, strength = jitter[number]
            if strength:
                picture = enhancer(picture).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
        return picture


def crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop as RandomResizedCrop does: its area uniformly, its proportions uniformly in their logarithm.

    Args:
        size: (width, height) of the picture, pixels.
        scale: least and greatest share of the area.
        ratio: least and greatest width / height.
        rng: draws.

    Returns:
        (left, top, right, bottom). If none of ten draws fits into the picture: its centre, with the nearest
        allowed proportions.
    """
    width, height = size
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        proportion = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
