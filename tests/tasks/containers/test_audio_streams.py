"""Audio files of all formats, joined, cut and wrong: read to their end or refused, never read in part."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from harness.core.errors import UserError
from tasks.containers.audio_streams import streams
from tasks.containers.mpeg_frames import find_frames
from tasks.modalities import audio as audio_module
from tasks.modalities.audio import Audio
from tests.support.recordings import sine, write_wav


def test_an_mp3_that_ends_early_is_noticed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "tone.mp3", sine(440, 16_000, 2), 16_000)
    data = (tmp_path / "tone.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.mp3: truncated: its header promises 32,000 frames, [\d,]+ can be"):
        Audio().load(tmp_path / "cut.mp3")


def _mp3(samples: npt.NDArray[np.float64], rate: int = 16_000, mode: str = "VARIABLE", level: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, samples, rate, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode=mode, compression_level=level
    )
    return buffer.getvalue()


def _id3(size: int) -> bytes:
    """A tag with a picture, whose bytes may look like MPEG frames."""
    return b"ID3\x04\0\0" + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0)) + b"\xff\xfb\x90\xc4" * (size // 4)


def _loud_then_quiet(rate: int, channels: int = 1) -> npt.NDArray[np.float64]:
    samples = np.random.default_rng(1).normal(0, 0.1, (2 * rate, channels))
    samples[rate:] = 1e-3 * sine(300, rate, 1)[:, None]
    return samples


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 44_100])
def test_an_mp3_without_a_header_is_read_to_its_end(tmp_path: Path, rate: int, channels: int, mode: str) -> None:
    """Its first frame, which holds the length, is missing; the sound is that of the whole file, sample for sample."""
    data = _mp3(_loud_then_quiet(rate, channels), rate, mode)
    tag = find_frames(data, 10).tag
    assert b"Xing" in tag or b"Info" in tag
    (tmp_path / "whole.mp3").write_bytes(data)
    (tmp_path / "bare.mp3").write_bytes(data[len(tag) :])
    expected = soundfile.read(tmp_path / "whole.mp3", dtype="float32", always_2d=True)[0]
    found = find_frames(data[len(tag) :], 10)
    (stream,) = streams(tmp_path / "bare.mp3", "MP3", 0, 10) or ()
    samples = soundfile.read(io.BytesIO(stream.data), dtype="float32", always_2d=True)[0][stream.skip :]
    assert len(samples) == found.samples == len(found.frames) * found.frames[0].samples
    delay = 576 + 529  # of LAME and of the decoder, which the tag would have had removed
    np.testing.assert_allclose(samples[delay : delay + len(expected)], expected, atol=1e-6)
    recording = Audio().load(tmp_path / "bare.mp3")
    assert recording.seconds == pytest.approx(found.samples / rate, abs=1e-3)
    assert recording.channels == channels


def test_what_is_joined_or_tagged_within_is_read_to_its_end(tmp_path: Path) -> None:
    one, two = _mp3(_loud_then_quiet(16_000)), _mp3(sine(440, 16_000, 1.5), mode="CONSTANT")
    bare = [data[len(find_frames(data, 10).tag) :] for data in (one, two)]
    wrong = bytearray(one)
    wrong[one.find(b"Xing") + 11] += 9  # the header counts nine frames more than the file, of the right size, has
    cases = {
        "joined": (one + two, 3.5),
        "three": (two + one + two, 5),
        "joined without headers": (bare[0] + bare[1], 3.5),
        "quiet first": (bare[1] + bare[0], 3.5),
        "a tag before": (_id3(4000) + one, 2),
        "a tag before, no header": (_id3(4000) + bare[0], 2),
        "tags between": (one + b"TAG".ljust(128, b"x") + _id3(9000) + two, 3.5),
        "bytes between": (one + bytes(5000) + two, 3.5),
        "a tag after": (one + b"TAG".ljust(128, b"x"), 2),
        "a tag after, no header": (bare[0] + b"TAG".ljust(128, b"x"), 2),
        "a wrong count": (bytes(wrong), 2),
    }
    for name, (data, seconds) in cases.items():
        (tmp_path / f"{name}.mp3").write_bytes(data)
        assert Audio().load(tmp_path / f"{name}.mp3").seconds == pytest.approx(seconds, abs=0.4), name
        frames = find_frames(data, 100)
        assert Audio().load(tmp_path / f"{name}.mp3").seconds == pytest.approx(frames.samples / 16_000, abs=1e-3), name


def test_mp3s_that_cannot_be_read_whole_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = _mp3(_loud_then_quiet(16_000)), _mp3(sine(440, 44_100, 1), 44_100)
    bare = one[len(find_frames(one, 10).tag) :]
    cases = {
        r"truncated: ends within an MPEG frame, after [\d,]+ whole ones": bare[: len(bare) * 2 // 3],
        r"joined from recordings of different sampling rates: 16,000 Hz, 44,100 Hz": one + other,
        r"joined from recordings of different numbers of channels: 1, 2": one + _mp3(_loud_then_quiet(16_000, 2)),
        r"truncated: ends within an MPEG frame, after": one + one[:-50],
    }
    for message, data in cases.items():
        (tmp_path / "a.mp3").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.mp3: " + message):
            Audio().load(tmp_path / "a.mp3")
    monkeypatch.setattr(audio_module, "MAX_SECONDS", 3)
    (tmp_path / "a.mp3").write_bytes(one * 2)
    with pytest.raises(UserError, match=r"a\.mp3: more than 3 s long; allowed: at most 3 s"):
        Audio().load(tmp_path / "a.mp3")


@pytest.mark.parametrize(("form", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16")])
def test_joined_streams_are_all_read_and_cut_ones_refused(tmp_path: Path, form: str, subtype: str) -> None:
    data = []
    for number, samples in enumerate((sine(440, 16_000, 1), sine(700, 16_000, 0.5))):
        soundfile.write(tmp_path / f"{number}", samples, 16_000, format=form, subtype=subtype)
        data.append((tmp_path / f"{number}").read_bytes())
    (tmp_path / "joined").write_bytes(data[0] + data[1])
    expected = np.concatenate([Audio().load(tmp_path / f"{number}").samples for number in range(2)])
    assert len(expected) == 24_000
    np.testing.assert_array_equal(Audio().load(tmp_path / "joined").samples, expected)
    for end in (-10, len(data[0]) * 2 // 3):
        (tmp_path / "cut").write_bytes(data[0][:end])
        with pytest.raises(UserError, match=r"cut: (truncated: |cannot be decoded as audio: .*(lost sync|malformed))"):
            Audio().load(tmp_path / "cut")
    soundfile.write(tmp_path / "stereo", np.zeros((800, 2)), 16_000, format=form, subtype=subtype)
    (tmp_path / "joined").write_bytes(data[0] + (tmp_path / "stereo").read_bytes())
    with pytest.raises(UserError, match=r"joined: joined from different recordings: .*Hz with 1 .* and .* with 2"):
        Audio().load(tmp_path / "joined")


@pytest.mark.parametrize("form", ["WAV", "WAVEX", "AIFF", "W64", "RF64", "NIST", "FLAC", "OGG", "MP3"])
def test_a_file_cut_anywhere_is_never_read_as_a_shorter_one(tmp_path: Path, form: str) -> None:
    soundfile.write(tmp_path / "whole", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000, format=form)
    data = (tmp_path / "whole").read_bytes()
    assert len(Audio().load(tmp_path / "whole").samples) == 16_000
    for end in range(len(data) // 3, len(data) - 40, len(data) // 9):
        (tmp_path / "cut").write_bytes(data[:end])
        with pytest.raises(UserError, match=r"cut: (truncated|cannot be decoded|its header)"):
            Audio().load(tmp_path / "cut")


@pytest.mark.parametrize("form", ["AIFF", "RF64", "W64", "WAV", "WAVEX", "NIST"])
def test_joined_files_of_other_formats_are_refused_not_cut(tmp_path: Path, form: str) -> None:
    soundfile.write(tmp_path / "one", sine(440, 16_000), 16_000, format=form, subtype="PCM_16")
    data = (tmp_path / "one").read_bytes()
    assert len(Audio().load(tmp_path / "one").samples) == 8_000
    (tmp_path / "two").write_bytes(data + data)
    with pytest.raises(
        UserError, match=r"two: (its header promises [\d,]+ (bytes|frames).*|cannot be decoded as audio: .*marker)"
    ):
        Audio().load(tmp_path / "two")


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("AU", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("VOC", "PCM_16"), ("SVX", "PCM_16"), ("IRCAM", "PCM_16"),
     ("PVF", "PCM_16"), ("MAT4", "PCM_16"), ("MAT5", "PCM_16"), ("PAF", "PCM_16"), ("AVR", "PCM_16"), ("HTK", "PCM_16"),
     ("MPC2K", "PCM_16"), ("SDS", "PCM_16"), ("WVE", "ALAW"), ("XI", "DPCM_16")],
)  # fmt: skip
def test_formats_whose_length_cannot_be_checked_are_refused_by_name(tmp_path: Path, form: str, subtype: str) -> None:
    """Joined or cut, libsndfile reads less of several of them without a word."""
    rate = 8_000 if form == "WVE" else 44_100 if form == "XI" else 16_000
    soundfile.write(tmp_path / "a", sine(440, 16_000), rate, format=form, subtype=subtype)
    with pytest.raises(UserError, match=r"a: its format is .+; allowed: WAV, RF64, .*FLAC, Ogg .*, MP3; convert it"):
        Audio().load(tmp_path / "a")


def test_an_mp3_in_a_wav_is_refused(tmp_path: Path) -> None:
    sound = _mp3(sine(440, 48_000, 1), 48_000, "CONSTANT")
    form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 48_000, 8_000, 1, 0, 12, 1, 2, 192, 1, 1393)
    chunks = b"".join(name + struct.pack("<I", len(data)) + data for name, data in ((b"fmt ", form), (b"data", sound)))
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks)
    with pytest.raises(UserError, match=r"a\.wav: its format is WAV .* of MPEG Layer III; allowed: WAV"):
        Audio().load(tmp_path / "a.wav")


def _ogg_pages(data: bytes) -> list[bytes]:
    starts = [place for place in range(len(data)) if data[place : place + 4] == b"OggS"]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_without_some_of_its_pages_is_refused(tmp_path: Path, subtype: str) -> None:
    """Also where the cut is between two pages, so that no page is broken."""
    noise = np.random.default_rng(0).normal(0, 0.1, 160_000)
    soundfile.write(tmp_path / "a", noise, 16_000, format="OGG", subtype=subtype)
    pages = _ogg_pages((tmp_path / "a").read_bytes())
    assert len(pages) > 5
    assert len(Audio().load(tmp_path / "a").samples) == 160_000
    for kept, message in (
        (pages[:-1], r"a: truncated: page \d+ is its last and not marked as such"),
        (pages[:4], r"a: truncated: page 3 is its last and not marked as such"),
        (pages[:-1] + pages, r"a: truncated: page \d+ is its last and not marked as such"),
        (pages[:3] + pages[4:], r"a: page 4 follows page 2; pages between them are missing"),
    ):
        (tmp_path / "a").write_bytes(b"".join(kept))
        with pytest.raises(UserError, match=message):
            Audio().load(tmp_path / "a")


def test_an_mp3_of_free_format_is_refused(tmp_path: Path) -> None:
    data = bytearray(_mp3(sine(440, 48_000, 1), 48_000, "CONSTANT"))
    frames = find_frames(bytes(data), 10)
    assert len({frame.length for frame in frames.frames}) == 1, "as free format needs"
    for frame in frames.frames:
        data[frame.place + 2] &= 0x0F
    (tmp_path / "a.mp3").write_bytes(data[len(frames.tag) :])
    with pytest.raises(UserError, match=r"a\.mp3: (no MPEG frames of a known bit rate|cannot be decoded)"):
        Audio().load(tmp_path / "a.mp3")


def _silent_frames(layer: int, bit_rates: list[int]) -> bytes:
    """MPEG-1 frames at 48 kHz without sound, by the index of their bit rates."""
    bits = {1: (32, 64, 96, 128, 160), 2: (32, 48, 56, 64, 80)}[layer]
    content = b""
    for index in bit_rates:
        length = 12_000 * bits[index - 1] // 48_000 * 4 if layer == 1 else 144_000 * bits[index - 1] // 48_000
        content += bytes([0xFF, 0xF9 | (4 - layer) << 1, index << 4 | 4, 0xC0]).ljust(length, b"\0")
    return content


@pytest.mark.parametrize("layer", [1, 2])
def test_mpeg_layers_1_and_2_are_read_whole_or_refused(tmp_path: Path, layer: int) -> None:
    """libsndfile estimates their length from the first frame, which is wrong where the bit rate varies."""
    samples = 384 if layer == 1 else 1152
    (tmp_path / "a.mp3").write_bytes(_silent_frames(layer, [2] * 100))
    assert Audio().load(tmp_path / "a.mp3").seconds == pytest.approx(100 * samples / 48_000, abs=1e-3)
    for rates in ([5] * 20 + [1] * 80, [1] * 80 + [5] * 20):
        (tmp_path / "a.mp3").write_bytes(_silent_frames(layer, rates))
        with pytest.raises(UserError, match=r"a\.mp3: its MPEG frames last [\d,]+ samples, .* can be decoded; convert"):
            Audio().load(tmp_path / "a.mp3")


@pytest.mark.parametrize("size", [0, 100, 7_000])
def test_a_wav_whose_data_chunk_is_longer_than_its_header_says_is_refused(tmp_path: Path, size: int) -> None:
    data = write_wav(tmp_path / "a.wav", sine(440, 16_000))
    struct.pack_into("<I", data, data.find(b"data") + 4, size)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(
        UserError, match=rf"a\.wav: its header promises {size:,} bytes of samples, {16_000 - size:,} more"
    ):
        Audio().load(tmp_path / "a.wav")


@pytest.mark.parametrize(
    "tail", [b"id3 \x04\0\0\0abcd", b"LIST\x03\0\0\0abc\0", b"TAG".ljust(128, b"x"), bytes(9000), b"x" * 99]
)
def test_a_wav_with_something_behind_its_samples_is_read(tmp_path: Path, tail: bytes) -> None:
    data = write_wav(tmp_path / "a.wav", sine(440, 16_000))
    (tmp_path / "b.wav").write_bytes(bytes(data) + tail)
    assert np.array_equal(Audio().load(tmp_path / "a.wav").samples, Audio().load(tmp_path / "b.wav").samples)
