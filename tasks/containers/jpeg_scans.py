"""Whether a JPEG has all of its pixels: libjpeg only warns where they end too early, and Pillow keeps the warning.

A decoder that meets the end marker too early fills the rest with grey, or leaves out details of a progressive picture.
One that has all pixels skips what stands before the marker. So other bytes put in front of the marker change the
picture exactly where pixels were missing (ITU-T T.81, annexes F.2.2 and G.2: Huffman codes; an arithmetic decoder may
go on behind its data).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # within coded pixels: neither a stuffed byte nor a restart
_START_OF_SCAN, _END = 0xDA, 0xD9
_HUFFMAN_FRAMES, _FRAMES = frozenset({0xC0, 0xC1, 0xC2}), frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_OTHER = bytes(place * 89 % 255 for place in range(4096))  # any but 0xFF, which would begin a marker


@dataclass(frozen=True)
class Scans:
    """The coded pixels of a picture, the first one in its file.

    Attributes:
        end: place of the marker that ends them.
        count: of scans.
        complete: whether every component of the frame is in one of them.
        huffman: whether they are Huffman codes of a kind that libjpeg decodes.
    """

    end: int
    count: int
    complete: bool
    huffman: bool


def scans_of(data: bytes) -> Scans | None:
    """The scans of a JPEG; None: it has no end marker behind them.

    Args:
        data: the file.
    """
    place, count, frame = 2, 0, 0
    declared: set[int] = set()
    seen: set[int] = set()
    while True:
        while data[place : place + 1] not in (b"\xff", b""):  # libjpeg too skips what is no marker
            place += 1
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if place + 2 > len(data):
            return None
        marker = data[place + 1]
        if marker == _END:
            return Scans(place, count, declared <= seen, frame in _HUFFMAN_FRAMES)
        if marker in range(0xD0, 0xD9) or marker in (0x00, 0x01):  # no length follows
            place += 2
            continue
        segment = data[place + 4 : place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")]
        place += 4 + len(segment)
        if marker in _FRAMES:
            frame, declared = marker, set(segment[6::3])
        elif marker == _START_OF_SCAN and segment:
            count += 1
            seen |= set(segment[1 : 1 + 2 * segment[0] : 2])
            found = _MARKER.search(data, place)
            if found is None:
                return None
            place = found.start()


def with_other_bytes(data: bytes, scans: Scans) -> bytes:
    """The file with other bytes between its pixels and the marker behind them."""
    return data[: scans.end] + _OTHER + data[scans.end :]
