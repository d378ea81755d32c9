"""The frames of an MP3 file, counted: what libsndfile (mpg123) takes for its length is an estimate.

A frame is a header of four bytes and data whose length follows from it (ISO/IEC 11172-3, 2.4.1; ISO/IEC 13818-3;
http://www.mp3-tech.org/programmer/frame_header.html). An encoder may write the number of frames into the first one
(Xing or Info with LAME's extension, http://gabriel.mp3-tech.org/mp3infotag.html). Without it mpg123 divides the size of
the file by that of its first frame, which is wrong for a variable bit rate; and the number of the first of several
joined files is wrong for all of them. Either way libsndfile reads no further than that.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_BIT_RATES = {  # kbit/s by (MPEG-1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG-1
_DECODER_DELAY = 529  # samples, of every decoder of layer III
_HALVED = {3: 1, 2: 2, 0: 4}  # bits of the version (MPEG-1, 2, 2.5) → divisor of the rates


Data = bytes | mmap.mmap


class Frame(NamedTuple):
    """One frame: its place and length in bytes, and what its header says."""

    place: int
    length: int
    rate: int  # Hz
    channels: int
    layer: int
    samples: int  # per channel

    @property
    def kind(self) -> tuple[int, int, int]:
        """What stays the same within one recording."""
        return self.rate, self.layer, self.samples


@dataclass
class Frames:
    """The frames of a file in order, and what its first one says about their number."""

    frames: list[Frame] = field(default_factory=list)  # without the one that holds the number
    tag: bytes = b""  # that one, if it holds a number
    count: int | None = None  # of the frames, as the tag says
    size: int | None = None  # of the stream in bytes, with the tag, as the tag says
    trimmed: int = 0  # samples of delay and padding, as the tag says
    broken_off: bool = False  # the file ends within a frame
    gaps: bool = False  # bytes between frames that belong to none

    @property
    def samples(self) -> int:
        """Of one channel, without delay and padding."""
        return sum(frame.samples for frame in self.frames) - self.trimmed

    @property
    def bytes(self) -> int:
        """Of all frames, with the tag."""
        return sum(frame.length for frame in self.frames) + len(self.tag)


def find_frames(data: Data, max_seconds: float) -> Frames:
    """Walk through the frames; tags (ID3, APE) and other bytes before, between and after them are passed over.

    Args:
        data: the file.
        max_seconds: stop when there are more.
    """
    found, samples = Frames(), 0
    for frame in _walk(data, found):
        if not found.frames and not found.tag and _read_tag(data[frame.place : frame.place + frame.length], found):
            continue
        found.frames.append(frame)
        samples += frame.samples
        if samples > 2 * max_seconds * frame.rate:
            break
    return found


def with_count(data: Data, found: Frames) -> tuple[bytes, int]:
    """The frames alone, behind a tag that says their true number; mpg123 then reads them all.

    Returns:
        The stream, and how many samples at its beginning are not in the file.
    """
    sound = b"".join(data[frame.place : frame.place + frame.length] for frame in found.frames)
    at = found.tag.find(b"Xing" if b"Xing" in found.tag else b"Info")
    if at > 0 and found.count is not None:
        tag = bytearray(found.tag)
        struct.pack_into(">I", tag, at + 8, len(found.frames))
        if found.size is not None:
            struct.pack_into(">I", tag, at + 12, found.bytes)
        return bytes(tag) + sound, 0
    # mpg123 drops the decoder's delay at the beginning of a stream with a tag: here that of a silent frame.
    silent = _silent(data, found.frames[0])
    tag, mono = bytearray(silent), silent[3] >> 6 == 3
    place = 4 + ((17 if mono else 32) if silent[1] >> 3 & 3 == 3 else (9 if mono else 17))
    tag[place : place + 12] = b"Info" + struct.pack(">II", 1, len(found.frames) + 1)
    return bytes(tag) + silent + sound, found.frames[0].samples - _DECODER_DELAY


def _header(data: Data, place: int) -> Frame | None:
    """The frame that begins here; None: there is none, or one of free format, whose length is not in its header."""
    head = data[place : place + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, bit_rate, rate = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz, padding = _RATES[rate] // _HALVED[version], head[2] >> 1 & 1
    bits = 1000 * _BIT_RATES[first, layer][bit_rate - 1]
    samples = {1: 384, 2: 1152, 3: 1152 if first else 576}[layer]
    length = (12 * bits // hertz + padding) * 4 if layer == 1 else samples // 8 * bits // hertz + padding
    return Frame(place, length, hertz, 1 if head[3] >> 6 == 3 else 2, layer, samples)


def _walk(data: Data, found: Frames) -> Iterator[Frame]:
    place, before, end = 0, None, len(data)
    while place < end:
        frame = _header(data, place)
        if frame is not None:
            follows = before is not None and before.place + before.length == place and before.kind == frame.kind
            after = _header(data, place + frame.length)
            # Four bytes may look like a header by chance: one more frame must be where this one ends.
            if follows or place + frame.length == end or (after is not None and after.kind == frame.kind):
                if place + frame.length > end:
                    found.broken_off = True
                    return
                found.gaps |= before is not None and before.place + before.length != place
                yield frame
                place, before = place + frame.length, frame
                continue
        place = _next(data, place)


def _next(data: Data, place: int) -> int:
    """Where a frame may begin after bytes that are none; an ID3 tag, which may hold a picture, is passed over whole."""
    head = data[place : place + 10]
    if head[:3] == b"ID3" and len(head) == 10 and max(head[6:]) < 0x80:
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return place + 10 + size
    if head[:3] == b"TAG" and len(data) - place >= 128:
        return place + 128
    found = [at for mark in (b"\xff", b"ID3") if (at := data.find(mark, place + 1)) >= 0]
    return min(found, default=len(data))


def _read_tag(frame: bytes, found: Frames) -> bool:
    """Read the first frame as a tag; False: it holds sound."""
    version_1, mono = frame[1] >> 3 & 3 == 3, frame[3] >> 6 == 3
    at = 4 + ((17 if mono else 32) if version_1 else (9 if mono else 17))
    at += 0 if frame[at : at + 4] in (b"Xing", b"Info") else 2  # behind a checksum
    if frame[at : at + 4] in (b"Xing", b"Info"):
        flags, place = frame[at + 7], at + 8
        if flags & 1:
            found.count = int.from_bytes(frame[place : place + 4], "big")
            place += 4
        if flags & 2 and flags & 1:
            found.size = int.from_bytes(frame[place : place + 4], "big")
        place += 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
        lame = frame[place : place + 36]
        if len(lame) >= 24 and lame[0]:
            found.trimmed = (lame[21] << 4 | lame[22] >> 4) + ((lame[22] & 15) << 8 | lame[23])
    elif frame[36:40] == b"VBRI":
        found.count = int.from_bytes(frame[50:54], "big")
    else:
        return False
    found.tag = frame
    return True


def _silent(data: Data, like: Frame) -> bytes:
    """A frame without sound, of the same kind."""
    head = bytearray(data[like.place : like.place + 4])
    head[1] |= 1  # no checksum
    head[2] = head[2] & 0x0D | 0x80  # the eighth bit rate: long enough for a tag at every sampling rate
    frame = _header(bytes(head), 0)
    assert frame is not None  # noqa: S101 - a header with another bit rate
    return bytes(head).ljust(frame.length, b"\0")
