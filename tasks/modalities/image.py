"""Pictures: any file that Pillow reads, as upright 8-bit RGB; the vision encoders of ``transformers``, and a tiny one.

Shapes: B pictures, C channels, H × W pixels, N tokens, D features.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import ExifTags, ImageOps
from PIL import Image as PilImage

from harness.core import hub
from harness.core.errors import UserError
from tasks.base import Modality, Preview
from tasks.containers.jpeg_scans import scans_of, with_other_bytes
from tasks.containers.picture_metadata import without_metadata
from tasks.modalities.encoders.options import ALL_TOKENS, VisionOptions

if TYPE_CHECKING:
    from tasks.encoder import Encoder

TINY = "builtin/tiny-vision"
MAX_PIXELS = 89_478_485  # the limit at which Pillow only warns: 256 MiB of RGB
_PREVIEW_PIXELS = 240
_REMARK = "harness_remark"  # key in a picture's info: what was converted
_GREY = range(125, 132)  # of 8 bits: what libjpeg puts in the place of missing pixels, as rounded in the corner
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_MODES = {"1": "black and white", "L": "grey-scale", "P": "palette of colours"}  # names of Pillow's modes


def _tiny_vision(weights: bool) -> Encoder:
    from tasks.modalities.encoders.tiny_vision import TinyVision

    return TinyVision.load(Path(hub.resolve(TINY)), weights)


class Image(Modality):
    """A picture as 8-bit RGB, rotated by its EXIF orientation, with transparent parts on white."""

    default_encoder: ClassVar = TINY
    built_in: ClassVar = {TINY: _tiny_vision}
    EncoderConfig: ClassVar = VisionOptions

    def load(self, path: Path) -> PilImage.Image:
        """Decode the whole picture.

        Raises:
            UserError: the file is missing, truncated, too large (``MAX_PIXELS``), not a format that Pillow knows, or
                has pixels without a defined range (32-bit integers and floats).
        """
        try:
            return _decoded(path, path)
        except UserError:
            raise
        except Exception as error:  # each of Pillow's decoders has its own exceptions
            picture = _without_metadata(path)
            if picture is None:
                raise UserError(f"{path}: cannot be decoded as a picture: {error}") from error
            return picture

    def preview(self, item: PilImage.Image) -> Preview:
        """The picture, its longer side at most 240 pixels."""
        small = item.copy()
        small.info = {}
        small.thumbnail((_PREVIEW_PIXELS, _PREVIEW_PIXELS))
        buffer = io.BytesIO()
        small.save(buffer, "png", optimize=True)
        return Preview("png", buffer.getvalue())

    def remark(self, item: PilImage.Image) -> str | None:
        """What ``load`` converted: orientation, colours or bit depth."""
        remark: str | None = item.info.get(_REMARK)
        return remark

    def pretrained(
        self, name: str, weights: bool, trust_remote_code: bool, options: VisionOptions = ALL_TOKENS
    ) -> Encoder:
        """Swin V2, ViT, CLIP, SigLIP, DINOv2 and whatever else ``AutoModel`` and ``AutoImageProcessor`` load.

        Raises:
            UserError: it could not be loaded, is not a vision encoder, or has no such layer, class token or map.
        """
        from tasks.modalities.encoders import pretrained_vision

        return (pretrained_vision.load if weights else pretrained_vision.empty)(name, trust_remote_code, options)


def _decoded(path: Path, file: Path | io.BytesIO) -> PilImage.Image:
    with PilImage.open(file) as picture:
        pixels = picture.width * picture.height
        if pixels > MAX_PIXELS:
            raise UserError(f"{path}: {picture.width} × {picture.height} pixels; allowed: {MAX_PIXELS} in all")
        if picture.mode in ("I", "F"):
            raise UserError(f"{path}: pixel mode {picture.mode} (32 bits) has no fixed range; save it with 8 or 16")
        picture.load()
        if picture.format in ("JPEG", "MPO"):
            _check_whole(path, picture)
        return _rgb(picture)


def _check_whole(path: Path, picture: PilImage.Image) -> None:
    """Refuse a JPEG whose pixels end too early, which libjpeg decodes as grey or as a blurred picture.

    Args:
        path: of the file.
        picture: decoded.
    """
    data = path.read_bytes()
    scans = scans_of(data)
    if scans is None:
        raise UserError(f"{path}: truncated: it has no end of a JPEG picture (a download that was broken off?)")
    corner = picture.crop((picture.width - 1, picture.height - 1, picture.width, picture.height))
    grey = picture.mode not in ("L", "RGB") or corner.convert("L").getpixel((0, 0)) in _GREY
    whole = scans.complete
    if whole and scans.huffman and (grey or scans.count > 1):  # what is missing of a single scan is grey to the corner
        with PilImage.open(io.BytesIO(with_other_bytes(data, scans))) as other:
            whole = other.tobytes() == picture.tobytes()
    if not whole:
        raise UserError(f"{path}: truncated: a part of its pixels is missing before the end of the JPEG picture")


def _without_metadata(path: Path) -> PilImage.Image | None:
    """The picture without what Pillow cannot read of its metadata; None: its pixels are the reason."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    for oriented in (True, False):
        pixels = without_metadata(data, oriented)
        try:
            picture = _decoded(path, io.BytesIO(pixels)) if pixels is not None else None
        except UserError:
            raise
        except Exception:  # noqa: S112 - the first error is the one that is reported
            continue
        if picture is not None:
            said = picture.info.get(_REMARK)
            picture.info = {_REMARK: "; ".join(filter(None, ["damaged or oversized metadata, ignored", said]))}
            return picture
    return None


def _grey_of_tiff(picture: PilImage.Image) -> tuple[int, bool]:
    """Bits of a grey value, and whether zero is white, which Pillow applies up to 8 bits only."""
    tags = getattr(picture, "tag_v2", {})
    return int(tags.get(_BITS, (16,))[0]), tags.get(_PHOTOMETRIC, 1) == 0


def _rgb(picture: PilImage.Image) -> PilImage.Image:
    """The upright RGB picture; what had to be converted is noted in its ``info``."""
    upright = ImageOps.exif_transpose(picture)
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    remarks = ["rotated by its EXIF orientation"] if turned else []
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # MPO: a JPEG with previews of itself
        remarks.append("several frames, only the first is used")
    if upright.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255: nearly every 16-bit picture would turn white.
        bits, white_is_zero = _grey_of_tiff(picture)
        found = PilImage.fromarray((np.asarray(upright) >> (bits - 8)).astype(np.uint8))
        found = (ImageOps.invert(found) if white_is_zero else found).convert("RGB")
        remarks.append(f"{bits}-bit grey-scale, read as 8-bit RGB")
    elif upright.has_transparency_data:
        # The colour stored under a transparent pixel is arbitrary; people see what is behind it.
        layer = upright.convert("RGBA")
        white = PilImage.new("RGBA", layer.size, "white")
        found = PilImage.alpha_composite(white, layer).convert("RGB")
        remarks.append("transparent, put on white")
    else:
        found = upright.convert("RGB")
        if upright.mode != "RGB":
            remarks.append(f"{_MODES.get(upright.mode, upright.mode)}, read as RGB")
    found.info = {_REMARK: "; ".join(remarks)} if remarks else {}
    return found
