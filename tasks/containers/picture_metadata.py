"""Picture files without their metadata: whether a picture can be read is decided by its pixels.

Pillow refuses a whole PNG, WebP or TIFF for a text that is too long, or for EXIF, a colour profile or any other note
that is damaged. Here the parts that hold pixels are copied unchanged, the others left out.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_PNG_TRANSPARENT = {0: 2, 2: 6}  # colour type → bytes of tRNS; of a palette (3) up to its length
_PNG_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_ORIENTED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may say how a picture is turned
_WEBP_NOTES = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # chunk → its bit in VP8X
_JPEG_NOTES = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})  # APP1 to APP13, APP15, comments; APP14 (Adobe) says colours
_JPEG_ORIENTED = (b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0")
_TIFF_ORIENTED = frozenset({274, 700})  # orientation, XMP
_TIFF_PIXELS = frozenset(
    {254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332}
    | {336, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532}
)


def without_metadata(data: bytes, oriented: bool) -> bytes | None:
    """The same pixels without metadata; None: not PNG, WebP, JPEG or TIFF.

    Args:
        data: the file.
        oriented: keep what may say how the picture is turned (EXIF, XMP).
    """
    if data.startswith(_PNG):
        return _png(data, oriented)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data, oriented)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data, oriented)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(data, oriented)
    return None


def _png(data: bytes, oriented: bool) -> bytes:
    kept, place = [_PNG], len(_PNG)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunk = data[place : place + 12 + length]
        place += 12 + length
        name, content = chunk[4:8], chunk[8:-4]
        may_turn = name == b"eXIf" or (name in _PNG_TEXTS and content.startswith(_PNG_ORIENTED))
        transparent = name == b"tRNS" and _is_transparency(content, kept)
        if name in _PNG_PIXELS or transparent or (oriented and may_turn):
            kept.append(chunk)
        if name == b"IEND":
            break
    else:  # cut off within what follows the pixels: whether they are whole is seen when they are decoded
        kept.append(struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND")))
    return b"".join(kept)


def _is_transparency(content: bytes, before: list[bytes]) -> bool:
    header = before[1] if len(before) > 1 else b""
    colours = header[17] if len(header) > 17 else -1
    if colours == 3:
        return 0 < len(content) <= 256
    return len(content) == _PNG_TRANSPARENT.get(colours)


def _webp(data: bytes, oriented: bool) -> bytes:
    kept, place, dropped = [], 12, 0
    while place < len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        chunk = data[place : place + 8 + size + size % 2]
        place += 8 + size + size % 2
        name = chunk[:4]
        if name in _WEBP_NOTES and not (oriented and name != b"ICCP"):
            dropped |= _WEBP_NOTES[name]
        else:
            kept.append(chunk)
    if kept and kept[0][:4] == b"VP8X":
        kept[0] = kept[0][:8] + bytes([kept[0][8] & ~dropped]) + kept[0][9:]
    content = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def _jpeg(data: bytes, oriented: bool) -> bytes:
    kept, place = [data[:2]], 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xDA, 0xD9, 0xFF) or length < 2:  # the pixels begin
            break
        segment = data[place : place + 2 + length]
        if marker not in _JPEG_NOTES or (oriented and segment[4:].startswith(_JPEG_ORIENTED)):
            kept.append(segment)
        place += 2 + length
    return b"".join(kept) + data[place:]


def _tiff(data: bytes, oriented: bool) -> bytes | None:
    """The first picture; entries of other tags are left out of its directory."""
    order = "<" if data[:2] == b"II" else ">"
    wanted = _TIFF_PIXELS | (_TIFF_ORIENTED if oriented else frozenset())
    start = struct.unpack_from(f"{order}I", data, 4)[0] if len(data) >= 8 else len(data)
    kept = [entry for entry in _entries(data, start, order) if struct.unpack_from(f"{order}H", entry)[0] in wanted]
    if not kept:
        return None
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]


def _entries(data: bytes, start: int, order: str) -> Iterator[bytes]:
    count = struct.unpack_from(f"{order}H", data, start)[0] if start + 2 <= len(data) else 0
    for number in range(count):
        entry = data[start + 2 + 12 * number : start + 14 + 12 * number]
        if len(entry) == 12:
            yield entry
