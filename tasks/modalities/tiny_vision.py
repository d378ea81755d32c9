"""The built-in vision encoder: small enough for a CPU, enough for the pictures of the task ``scenes``.

Shapes: B pictures, C channels, H × W pixels, N tokens (a 4 × 4 grid, row by row), D features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.errors import UserError
from tasks.encoder import Encoder

if TYPE_CHECKING:
    from PIL.Image import Image

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


class TinyVision(Encoder):
    """A convolutional stem to a grid of 4 × 4 tokens, then pre-norm transformer layers.

    The stem is what makes it learn in minutes: cutting the picture into patches did not (see docs/backbones.md).
    """

    image_size = 48  # pixels, both sides
    tokens = 16

    def __init__(self, width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.width = width
        self.config = {"model_type": "tiny_vision", "width": width, "layers": layers, "heads": heads}
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
        """Resize RGB pictures to ``image_size``, whatever their proportions, and scale them to [-1, 1].

        Returns:
            pixel_values_BCHW, float32.
        """
        side = (cls.image_size, cls.image_size)
        pixels_BHWC = np.stack([np.asarray(picture.resize(side)) for picture in pictures])
        return torch.from_numpy(pixels_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps(self.config, indent=1) + "\n", encoding="utf-8")
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / _WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> TinyVision:
        """Load what ``save`` wrote, in evaluation mode.

        Raises:
            UserError: a file is missing, is of another model, or its weights do not fit its configuration.
        """
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            kind = config.pop("model_type")
            if kind != "tiny_vision":
                raise UserError(f"{folder / _CONFIG}: model_type is {kind!r}; allowed: tiny_vision")
            encoder = cls(**config)
            encoder.load_state_dict(load_file(folder / _WEIGHTS), strict=True)
        except UserError:
            raise
        except Exception as error:  # each library below fails with exceptions of its own on a broken file
            reason = " ".join(str(error).split())
            raise UserError(
                f"{folder}: not a TinyVision encoder as `harness backbones build` makes it: {reason}"
            ) from error
        return encoder.eval()


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    # Group norm, not batch norm: a picture's features do not depend on the batch it is in, so they can be cached.
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.GELU()
