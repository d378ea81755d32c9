"""The image modality: real files of every kind people have, written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from harness.errors import UserError
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
        ("RGBA", (255, 0, 0, 0), "png", (255, 255, 255)),  # transparent: what lies behind is seen
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
    with pytest.raises(UserError, match=r"absent\.jpg: cannot be decoded.*No such file"):
        Image().load(tmp_path / "absent.jpg")


def test_decompression_bomb_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_PIXELS", 99)
    PilImage.new("L", (10, 10)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png: 10 × 10 pixels; allowed: 99"):
        Image().load(tmp_path / "bomb.png")


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    PilImage.new("F", (4, 4), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(UserError, match=r"float\.tiff: pixel mode F"):
        Image().load(tmp_path / "float.tiff")
