"""The image modality: files of all common kinds, written by the tests."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from PIL import TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from harness.core.errors import UserError
from tasks.containers.picture_metadata import without_metadata
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


@pytest.mark.parametrize(("bits", "photometric", "expected"), [(12, 1, [0, 128, 255]), (16, 0, [255, 127, 0])])
def test_grey_values_of_a_tiff_have_its_bits_and_its_white(
    tmp_path: Path, bits: int, photometric: int, expected: list[int]
) -> None:
    """Pillow gives 12 bits as they are, and inverts values whose zero is white up to 8 bits only."""
    most = 2**bits - 1
    values = (0, 2 ** (bits - 1), most, most)
    packed = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(bits // 2, "big")
    if bits == 16:
        packed = struct.pack("<4H", *values)
    entries = {256: 4, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    (tmp_path / "deep.tiff").write_bytes(
        b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(entries)) + directory + bytes(4)
    )
    picture = _load(tmp_path / "deep.tiff")
    assert [picture.getpixel((x, 0)) for x in range(3)] == [(value,) * 3 for value in expected]
    assert Image().remark(picture) == f"{bits}-bit grey-scale, read as 8-bit RGB"


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


def test_zeros_in_the_place_of_a_jpegs_rest_are_refused(tmp_path: Path) -> None:
    """A download into a file of the full size: libjpeg decodes the zeros, as grey."""
    path = tmp_path / "half.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    PilImage.fromarray(pixels).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"what a camera writes behind the picture")
    assert _load(path).size == (200, 200)
    path.write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))
    with pytest.raises(UserError, match=r"half\.jpg: truncated: it has no end of a JPEG picture"):
        Image().load(path)


JPEG_KINDS: list[dict[str, Any]] = [
    {}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_blocks": 4}, {"optimize": True, "quality": 30},
]  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEG_KINDS)
def test_an_end_marker_does_not_make_a_part_of_a_jpeg_whole(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    """libjpeg fills what is missing with grey, or leaves details out, and says nothing."""
    pixels = np.random.default_rng(0).integers(0, 255, (100, 130, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    whole, path = buffer.getvalue(), tmp_path / "part.jpg"
    path.write_bytes(whole)
    assert _load(path).size == (130, 100)
    for share in (0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(share * len(whole))] + b"\xff\xd9")
        with pytest.raises(UserError, match=r"part\.jpg: truncated: a part of its pixels is missing before the end"):
            Image().load(path)


@pytest.mark.parametrize("options", JPEG_KINDS)
@pytest.mark.parametrize("colour", [(128, 128, 128), (127, 130, 127), (0, 0, 0)])
def test_a_grey_jpeg_is_whole(tmp_path: Path, colour: tuple[int, int, int], options: dict[str, Any]) -> None:
    """Its pixels are those that libjpeg puts in the place of missing ones; also with bytes behind or before the end."""
    path = tmp_path / "grey.jpg"
    PilImage.new("RGB", (61, 47), colour).save(path, exif=_turned(), **options)
    whole = path.read_bytes()
    for data in (whole, whole + b"\xff\xd8 a preview \xff", whole[:-2] + b"\0\0" + whole[-2:]):
        path.write_bytes(data)
        np.testing.assert_allclose(np.asarray(_load(path))[-1, -1], colour, atol=2)


def test_a_jpeg_without_the_scan_of_a_colour_is_refused(tmp_path: Path) -> None:
    """Of a progressive picture whose scans for red and blue were lost, a grey-scale one would be left."""
    path = tmp_path / "colour.jpg"
    PilImage.effect_mandelbrot((64, 64), (-2, -2, 2, 2), 50).convert("RGB").save(path, progressive=True)
    data = path.read_bytes()
    first = data.index(b"\xff\xda")
    assert data[first + 4] == 3  # the first scan has all components: give it one, as encoders may
    alone = data[first + 5 : first + 7] + data[first + 11 : first + 14]
    second = data.index(b"\xff\xc4", first)
    path.write_bytes(data[:first] + b"\xff\xda\0\x08\1" + alone + data[first + 14 : second] + b"\xff\xd9")
    with pytest.raises(UserError, match=r"colour\.jpg: truncated: a part of its pixels is missing"):
        Image().load(path)


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


IGNORED = "damaged or oversized metadata, ignored"
TILE = PilImage.effect_noise((48, 32), 40).convert("RGB")


def _file(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    TILE.save(buffer, kind, **options)
    return buffer.getvalue()


def _png(name: bytes, content: bytes, crc: int | None = None, **options: Any) -> bytes:
    data = _file("PNG", **options)
    check = zlib.crc32(name + content) if crc is None else crc
    return data[:33] + struct.pack(">I", len(content)) + name + content + struct.pack(">I", check) + data[33:]


def _turned() -> bytes:
    exif = PilImage.Exif()
    exif[0x0112] = 6
    return bytes(exif.tobytes())


def _tiff_with_a_text_outside_the_file() -> bytes:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory[270] = "a description" * 50
    data = bytearray(_file("TIFF", tiffinfo=directory))
    (start,) = struct.unpack_from("<I", data, 4)
    for place in range(start + 2, start + 2 + 12 * data[start], 12):
        if struct.unpack_from("<H", data, place)[0] == 270:
            struct.pack_into("<I", data, place + 8, 2**31 - 5)
    return bytes(data)


LONG = zlib.compress(b"node " * 600_000)
DAMAGED = {
    "EXIF.png": _png(b"eXIf", b"garbage" * 9),
    "EXIF without a directory.png": _png(b"eXIf", b"\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"),
    "EXIF as text.png": _png(b"tEXt", b"Raw profile type exif\0\nexif\n       8\n" + b"b'Exif".hex().encode()),
    "EXIF of another checksum.png": _png(b"eXIf", b"MM\0*", crc=1),
    "profile cut short.png": _png(b"iCCP", b"name"),
    "profile of an unknown compression.png": _png(b"iCCP", b"name\0\x05abc"),
    "profile too long.png": _png(b"iCCP", b"name\0\0" + LONG),
    "text too long.png": _png(b"zTXt", b"workflow\0\0" + LONG),
    "international text too long.png": _png(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "text of another checksum.png": _png(b"tEXt", b"k\0v", crc=1),
    "resolution.png": _png(b"pHYs", b"\1"),
    "gamma.png": _png(b"gAMA", b"\1"),
    "transparency of no colour.png": _png(b"tRNS", b"\1"),
    "animation.png": _png(b"acTL", b"\1"),
    "text cut off behind the pixels.png": _file("PNG")[:-12] + b"\0\0\1\0tEXtabc",
    "EXIF.webp": _file("WEBP", lossless=True, exif=b"Exif\0\0 no directory"),
    "EXIF cut off.webp": _file("WEBP", lossless=True, exif=_turned())[:-6],
    "a tag that points out of the file.tif": _tiff_with_a_text_outside_the_file(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_metadata_does_not_make_pixels_unreadable(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    picture = _load(tmp_path / name)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(TILE))
    assert Image().remark(picture) == IGNORED


def test_orientation_is_applied_although_other_metadata_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "turned.png").write_bytes(_png(b"zTXt", b"workflow\0\0" + LONG, exif=_turned()))
    expected = TILE.transpose(PilImage.Transpose.ROTATE_270)
    picture = _load(tmp_path / "turned.png")
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    assert Image().remark(picture) == f"{IGNORED}; rotated by its EXIF orientation"


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {}), ("TIFF", {})])
def test_pixels_that_are_cut_off_stay_an_error(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    data = _file(kind, **options)
    for share in (0.3, 0.6, 0.9):
        (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
        with pytest.raises(UserError, match=r"cut: cannot be decoded as a picture"):
            Image().load(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize("oriented", [True, False])
def test_pixels_are_the_same_without_metadata(tmp_path: Path, kind: str, oriented: bool) -> None:
    data = _file(kind, exif=_turned(), quality=90)
    stripped = without_metadata(data, oriented)
    assert stripped is not None
    (tmp_path / "stripped").write_bytes(stripped)
    (tmp_path / "expected").write_bytes(data if oriented else _file(kind, quality=90))
    found, expected = _load(tmp_path / "stripped"), _load(tmp_path / "expected")
    assert found.size == ((32, 48) if oriented else (48, 32))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert without_metadata(b"GIF89a", oriented) is None


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
