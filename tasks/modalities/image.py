"""Pictures: any file Pillow reads, as upright 8-bit RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps

from harness.errors import UserError
from tasks.base import Modality

MAX_PIXELS = 89_478_485  # Pillow's own limit, where it only warns: 256 MiB of RGB


class Image(Modality):
    """A picture, turned as its EXIF orientation says, transparency laid on white, colours as 8-bit RGB."""

    def load(self, path: Path) -> PilImage.Image:
        """Decode the whole picture.

        Raises:
            UserError: the file is missing, truncated, too large (``MAX_PIXELS``), not a picture Pillow knows, or has
                pixels whose range nothing tells (32-bit integers and floats).
        """
        try:
            with PilImage.open(path) as picture:
                pixels = picture.width * picture.height
                if pixels > MAX_PIXELS:
                    raise UserError(f"{path}: {picture.width} × {picture.height} pixels; allowed: {MAX_PIXELS} in all")
                if picture.mode in ("I", "F"):
                    raise UserError(
                        f"{path}: pixel mode {picture.mode} (32 bits) has no fixed range; save it with 8 or 16"
                    )
                picture.load()
                return _rgb(ImageOps.exif_transpose(picture))
        except UserError:
            raise
        except Exception as error:  # each of Pillow's decoders fails with exceptions of its own
            raise UserError(f"{path}: cannot be decoded as a picture: {error}") from error


def _rgb(picture: PilImage.Image) -> PilImage.Image:
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255: nearly every 16-bit picture would turn white.
        return PilImage.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        # The colour stored under a transparent pixel is arbitrary; what people see is what lies behind it.
        layer = picture.convert("RGBA")
        white = PilImage.new("RGBA", layer.size, "white")
        return PilImage.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")
