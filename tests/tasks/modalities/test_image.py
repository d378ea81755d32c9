"""The image modality: files of all common kinds, written by the tests."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage
from PIL.PngImagePlugin import PngInfo

from harness.core.errors import UserError
from tasks.modalities import image as image_module
from tasks.modalities.image import Image

RED = (255, 0, 0)


def _load(path: Path) -> PilImage.Image:
    picture = Image().load(path)
    assert picture.mode == "RGB"
    return picture


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", RED, "png", RED),
        ("L", 100, "png", (100, 100, 100)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "tiff", RED),
        ("RGBA", (255, 0, 0, 255), "png", RED),
        ("RGBA", (255, 0, 0, 0), "png", (255, 255, 255)),  # transparent: the background is visible
        ("LA", (0, 0), "png", (255, 255, 255)),
    ],
)
def test_modes_become_the_rgb_people_see(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], suffix: str, expected: tuple[int, int, int]
) -> None:
    path = tmp_path / f"picture.{suffix}"
    PilImage.new(mode, (5, 3), colour).save(path)
    assert _load(path).size == (5, 3)
    assert _load(path).getpixel((2, 1)) == expected


def test_palette_picture(tmp_path: Path) -> None:
    picture = PilImage.new("RGB", (2, 1), RED)
    picture.putpixel((1, 0), (0, 0, 255))
    picture.quantize(4).save(tmp_path / "palette.png")
    assert [_load(tmp_path / "palette.png").getpixel((x, 0)) for x in (0, 1)] == [RED, (0, 0, 255)]


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    PilImage.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16)).save(path)
    assert [_load(path).getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = PilImage.new("RGB", (40, 20), "white")
    picture.paste((0, 0, 0), (0, 0, 20, 20))  # black on the left as stored
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = _load(tmp_path / "turned.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] < 30
    assert upright.getpixel((10, 35))[0] > 225


def test_truncated_picture_is_refused_by_name(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    PilImage.effect_noise((64, 64), 50).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:600])
    with pytest.raises(UserError, match=r"cut\.jpg: cannot be decoded as a picture: .*truncated"):
        Image().load(cut)


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("not a picture")
    with pytest.raises(UserError, match=r"notes\.jpg: cannot be decoded"):
        Image().load(tmp_path / "notes.jpg")
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(UserError, match=r"empty\.jpg: cannot be decoded.*cannot identify"):
        Image().load(tmp_path / "empty.jpg")
    with pytest.raises(UserError, match=r": cannot be decoded.*Is a directory"):
        Image().load(tmp_path)
    with pytest.raises(UserError, match=r"absent\.jpg: cannot be decoded.*No such file"):
        Image().load(tmp_path / "absent.jpg")


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "remark"),
    [
        ("RGB", RED, "png", None),
        ("RGB", RED, "jpg", None),
        ("L", 100, "jpg", "grey-scale, read as RGB"),
        ("1", 1, "png", "black and white, read as RGB"),
        ("P", 3, "png", "palette of colours, read as RGB"),
        ("CMYK", (0, 255, 255, 0), "jpg", "CMYK, read as RGB"),
        ("YCbCr", (10, 20, 30), "tiff", "YCbCr, read as RGB"),
        ("LAB", (10, 20, 30), "tiff", "LAB, read as RGB"),
        ("RGBA", (255, 0, 0, 9), "png", "transparent, put on white"),
        ("I;16", 4000, "png", "16-bit grey-scale, read as 8-bit RGB"),
        ("I;16B", 4000, "tiff", "16-bit grey-scale, read as 8-bit RGB"),
    ],
)
def test_what_was_converted_is_remarked(
    tmp_path: Path, mode: str, colour: int | tuple[int, ...], suffix: str, remark: str | None
) -> None:
    path = tmp_path / f"picture.{suffix}"
    PilImage.new(mode, (5, 3), colour).save(path)
    assert Image().remark(_load(path)) == remark


def test_frames_and_orientation_are_remarked_together(tmp_path: Path) -> None:
    first, second = PilImage.new("RGB", (40, 20), "red"), PilImage.new("RGB", (40, 20), "blue")
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    picture = _load(tmp_path / "moving.gif")
    assert picture.getpixel((3, 3)) == RED
    assert Image().remark(picture) == "several frames, only the first is used; palette of colours, read as RGB"
    exif = first.getexif()
    exif[0x0112] = 3  # upside down: the size stays
    first.convert("L").save(tmp_path / "turned.jpg", exif=exif)
    assert Image().remark(_load(tmp_path / "turned.jpg")) == (
        "rotated by its EXIF orientation; grey-scale, read as RGB"
    )


def test_a_file_cannot_set_its_remark(tmp_path: Path) -> None:
    said = PngInfo()
    said.add_text("harness_remark", "all is well")
    PilImage.new("RGB", (4, 4)).save(tmp_path / "said.png", pnginfo=said)
    assert Image().remark(_load(tmp_path / "said.png")) is None


def test_a_photograph_with_broken_exif_is_read(tmp_path: Path) -> None:
    PilImage.new("RGB", (20, 10), RED).save(tmp_path / "odd.jpg", exif=b"Exif\0\0garbage and no more")
    assert _load(tmp_path / "odd.jpg").size == (20, 10)


def test_a_png_header_that_claims_ten_billion_pixels_is_refused(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (100_000, 10_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        path = tmp_path / f"{side}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"100000\.png: cannot be decoded .*10000000000 pixels"):
        Image().load(tmp_path / "100000.png")
    with (
        pytest.warns(PilImage.DecompressionBombWarning),
        pytest.raises(UserError, match=r"10000\.png: 10000 × 10000 pixels; allowed: 89478485"),
    ):
        Image().load(tmp_path / "10000.png")


def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_PIXELS", 99)
    PilImage.new("L", (10, 10)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png: 10 × 10 pixels; allowed: 99"):
        Image().load(tmp_path / "bomb.png")


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    PilImage.new("F", (4, 4), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float\.tiff: pixel mode F"):
        Image().load(tmp_path / "float.tiff")
