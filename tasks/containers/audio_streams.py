"""What the structure of an audio file says about its length, where libsndfile reads less of it silently.

MP3: see mpeg_frames. Ogg and FLAC: of several joined streams libsndfile reads the first only, and it leaves out a last
page that is cut off (RFC 3533, section 6; RFC 9639, section 8). WAV: it does not read samples behind the end of a data
chunk that is too short. NIST SPHERE (TIMIT, WSJ): it does not compare the header's number of samples with the file.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from harness.core.errors import UserError
from tasks.containers.mpeg_frames import Data, find_frames, with_count

_FLAC = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")  # the mark, and the header of STREAMINFO
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
_NIST_COUNT = re.compile(rb"\nsample_count -i (\d+)\s")
_LAYER_3 = 3


class Stream(NamedTuple):
    """A stream that libsndfile reads whole; ``skip`` samples at its beginning are not in the file."""

    data: bytes
    skip: int = 0
    frames: int = 0  # that it must give, as far as this is known


def streams(path: Path, form: str, promised: int, max_seconds: float) -> list[Stream] | None:
    """The streams of a file of which libsndfile alone would not read all.

    Args:
        path: the file.
        form: the format as libsndfile calls it.
        promised: the frames that libsndfile finds.
        max_seconds: a longer recording is an error.

    Returns:
        None: libsndfile reads the file to its end.

    Raises:
        UserError: the file is cut off, joined from recordings of different kinds, too long, or its header is wrong.
    """
    check = {"MP3": _mp3, "OGG": _ogg, "FLAC": _flac, "WAV": _wav, "WAVEX": _wav, "NIST": _nist}.get(form)
    if check is None:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return check(path, data, promised, max_seconds)


def _mp3(path: Path, data: Data, promised: int, max_seconds: float) -> list[Stream] | None:
    found = find_frames(data, max_seconds)
    if not found.frames:  # the length of a frame of free format is not in its header
        raise UserError(f"{path}: no MPEG frames of a known bit rate found (free format?); convert it")
    first, count = found.frames[0], len(found.frames)
    if found.count is None:
        whole = promised == found.samples
    else:
        # More in the header than in the file: cut off, unless the size in the header is that of the file.
        whole = found.count == count or (found.count > count and found.size != found.bytes)
    if found.broken_off and (found.count is None or found.count < count):
        length = _seconds(found.samples, first.rate)
        raise UserError(f"{path}: truncated: ends within an MPEG frame, after {count:,} whole ones ({length})")
    if whole and not found.gaps:
        return None
    for what, values in (
        ("sampling rates", {f"{frame.rate:,} Hz" for frame in found.frames}),
        ("numbers of channels", {str(frame.channels) for frame in found.frames}),
    ):
        if len(values) > 1:
            raise UserError(
                f"{path}: joined from recordings of different {what}: {', '.join(sorted(values))}; convert it"
            )
    if found.samples > max_seconds * first.rate:
        raise UserError(f"{path}: more than {max_seconds} s long; allowed: at most {max_seconds} s")
    if first.layer != _LAYER_3:
        raise UserError(
            f"{path}: its MPEG frames last {_seconds(found.samples, first.rate)}, "
            f"{_seconds(promised, first.rate)} can be decoded; convert it"
        )
    stream, skip = with_count(data, found)
    return [Stream(stream, skip, found.samples)]


def _ogg(path: Path, data: Data, _promised: int, _max_seconds: float) -> list[Stream] | None:
    starts: list[int] = []
    place, was_first, end = 0, False, len(data)
    numbers: dict[bytes, int] = {}  # of the last page of each logical stream that has not ended
    while (place := data.find(b"OggS", place)) >= 0:
        head = data[place : place + 27]
        length = 27 + head[26] + sum(data[place + 27 : place + 27 + head[26]]) if len(head) == 27 else 28
        if place + length > end:
            raise UserError(f"{path}: truncated: its last page has {length:,} bytes or more, there are {end - place:,}")
        is_first, stream, number = bool(head[5] & 2), head[14:18], int.from_bytes(head[18:22], "little")
        if is_first and not was_first:
            _check_ended(path, numbers)
            starts.append(place)
        if not is_first and number != numbers.get(stream, number - 1) + 1:
            raise UserError(f"{path}: page {number} follows page {numbers[stream]}; pages between them are missing")
        numbers[stream] = number
        if head[5] & 4:
            del numbers[stream]
        place, was_first = place + length, is_first
    _check_ended(path, numbers)
    return _split(data, starts)


def _check_ended(path: Path, numbers: Mapping[bytes, int]) -> None:
    if numbers:
        number = next(iter(numbers.values()))
        raise UserError(f"{path}: truncated: page {number} is its last and not marked as such; convert it again")


def _flac(_path: Path, data: Data, _promised: int, _max_seconds: float) -> list[Stream] | None:
    starts = [place for mark in _FLAC for place in _all(data, mark)]
    return _split(data, sorted(starts))


def _wav(path: Path, data: Data, _promised: int, _max_seconds: float) -> list[Stream] | None:
    place, end = 12, len(data)
    while data[place : place + 4] != b"data":
        if place + 8 > end:
            return None
        place += 8 + _size(data, place)
        place += place % 2
    size = _size(data, place)
    after = place + 8 + size
    if data[:4] != b"RIFF" or after >= end:
        return None
    rest = min(_unexplained(data, after), _unexplained(data, after + after % 2), key=len)
    known = not rest.strip(b"\0") or rest.lstrip(b"\0").startswith(_TAGS)
    if not known and len(rest) > max(256, min(4096, size // 10)):
        raise UserError(
            f"{path}: its header promises {size:,} bytes of samples, {len(rest):,} more follow that would not be read; "
            "convert it again"
        )
    return None


def _nist(path: Path, data: Data, promised: int, _max_seconds: float) -> list[Stream] | None:
    count = _NIST_COUNT.search(data[:4096])
    if count is not None and int(count[1]) != promised:
        cut = "truncated: " if int(count[1]) > promised else ""
        raise UserError(f"{path}: {cut}its header promises {int(count[1]):,} frames, there are {promised:,}")
    return None


def _unexplained(data: Data, place: int) -> bytes:
    """What follows the last chunk."""
    end = len(data)
    while place + 8 <= end:
        name, size = data[place : place + 4], _size(data, place)
        if not (name.isascii() and name.decode("ascii").isprintable()) or place + 8 + size > end:
            break
        place += 8 + size + size % 2
    return data[place:]


def _size(data: Data, place: int) -> int:
    return int.from_bytes(data[place + 4 : place + 8], "little")


def _all(data: Data, mark: bytes) -> list[int]:
    found, place = [], data.find(mark)
    while place >= 0:
        found.append(place)
        place = data.find(mark, place + 1)
    return found


def _split(data: Data, starts: list[int]) -> list[Stream] | None:
    if len(starts) < 2:
        return None
    ends = [*starts[1:], len(data)]
    return [Stream(data[start:end]) for start, end in zip(starts, ends, strict=True)]


def _seconds(samples: int, rate: int) -> str:
    return f"{samples:,} samples, {samples / rate:.2f} s"
