"""The built-in vision encoder: small enough for a CPU, good enough for the pictures of the task ``scenes``.

Shapes: B pictures, C channels, H × W pixels, N tokens (a 4 × 4 grid, row by row), D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tasks.modalities.encoders.tiny_encoder import TinyEncoder

if TYPE_CHECKING:
    from PIL.Image import Image


class TinyVision(TinyEncoder):
    """A convolutional stem to a grid of 4 × 4 tokens, then pre-norm transformer layers.

    The stem lets it learn in minutes; patches cut from the picture did not (see docs/backbones.md).
    """

    model_type = "tiny_vision"
    image_size = 48  # pixels, both sides
    tokens = 16

    def __init__(self, width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__(width, layers, heads)
        self.stem = nn.Sequential(
            *_convolution(3, 32, stride=2),  # 24 × 24
            *_convolution(32, 64, stride=2),  # 12 × 12
            *_convolution(64, width, stride=1),
            *_convolution(width, width, stride=3),  # 4 × 4
        )
        self.position_1ND = nn.Parameter(0.02 * torch.randn(1, self.tokens, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 3 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """Encode pictures of ``image_size`` with values in [-1, 1] into features_BND."""
        x_BND = self.stem(pixel_values_BCHW).flatten(2).transpose(1, 2) + self.position_1ND
        for layer in self.layers:
            x_BND = layer(x_BND)
        features_BND: Tensor = self.norm(x_BND)
        return features_BND

    @torch.no_grad()
    def encode(self, items: Sequence[Image]) -> list[Tensor]:
        """Features (16, width) of each picture."""
        return list(self(self.preprocess(items).to(self.position_1ND)))  # device and precision

    @classmethod
    def preprocess(cls, pictures: Sequence[Image]) -> Tensor:
        """Resize RGB pictures to ``image_size``, ignoring their proportions, and scale them to [-1, 1].

        Returns:
            pixel_values_BCHW, float32.
        """
        side = (cls.image_size, cls.image_size)
        pixels_BHWC = np.stack([np.asarray(picture.resize(side)) for picture in pictures])
        return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    # Group norm, not batch norm: a picture's features must not depend on its batch, so that they can be cached.
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.GELU()
