"""The audio modality: files of all common kinds, and pretrained encoders from folders, all written by the tests."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    LlamaConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from harness.core.errors import UserError
from tasks.containers.audio_streams import streams
from tasks.containers.mpeg_frames import find_frames
from tasks.modalities import audio as audio_module
from tasks.modalities.audio import Audio
from tasks.modalities.encoders.recording import Recording


def _sine(hertz: float, rate: int, seconds: float = 0.5) -> npt.NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def _wav(path: Path, samples: npt.ArrayLike, rate: int = 16_000, subtype: str = "PCM_16") -> bytearray:
    soundfile.write(path, np.asarray(samples), rate, subtype=subtype, format="WAV")
    return bytearray(path.read_bytes())


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 1 / 100),
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-7),
        ("wav", "FLOAT", 1e-7),
        ("wav", "DOUBLE", 1e-7),
        ("flac", "PCM_16", 1e-4),
        ("ogg", "VORBIS", 0.05),
        ("mp3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_formats_give_the_same_samples(tmp_path: Path, suffix: str, subtype: str, tolerance: float) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, _sine(440, 16_000), 16_000, subtype=subtype)
    recording = Audio().load(path)
    assert recording.samples.dtype == np.float32
    np.testing.assert_allclose(recording.samples, _sine(440, 16_000), atol=tolerance)
    assert recording.seconds == 0.5
    assert Audio().remark(recording) is None


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_is_that_of_the_exact_sine(tmp_path: Path, rate: int) -> None:
    _wav(tmp_path / "tone.wav", _sine(1000, rate), rate, "DOUBLE")
    recording = Audio().load(tmp_path / "tone.wav")
    assert len(recording.samples) == 8000
    middle = slice(200, -200)  # before and after the recording the filter sees silence
    np.testing.assert_allclose(recording.samples[middle], _sine(1000, 16_000)[middle], atol=2e-3)
    assert Audio().remark(recording) == f"{rate:,} Hz, resampled to 16,000 Hz"


def test_what_16_khz_cannot_hold_is_filtered_out_and_does_not_fold_back(tmp_path: Path) -> None:
    """Without the filter, 11 kHz would be heard as 5 kHz."""
    _wav(tmp_path / "tone.wav", _sine(11_000, 48_000), 48_000, "DOUBLE")
    assert np.abs(Audio().load(tmp_path / "tone.wav").samples[200:-200]).max() < 0.5 * 10 ** (-40 / 20)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = _sine(300, 16_000), _sine(500, 16_000)
    _wav(tmp_path / "stereo.wav", np.stack([left, right], axis=1), subtype="DOUBLE")
    recording = Audio().load(tmp_path / "stereo.wav")
    np.testing.assert_allclose(recording.samples, (left + right) / 2, atol=1e-7)
    assert Audio().remark(recording) == "stereo, averaged to mono"
    _wav(tmp_path / "surround.wav", np.stack([left] * 6, axis=1), rate=8_000)
    remark = Audio().remark(Audio().load(tmp_path / "surround.wav"))
    assert remark == "6 channels, averaged to mono; 8,000 Hz, resampled to 16,000 Hz"


def _truncated(path: Path) -> None:
    path.write_bytes(_wav(path, _sine(440, 16_000))[:10_000])


def _truncated_rf64(path: Path) -> None:
    soundfile.write(path, _sine(440, 16_000), 16_000, format="RF64")
    path.write_bytes(path.read_bytes()[:10_000])


def _truncated_flac(path: Path) -> None:
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000, format="FLAC")
    path.write_bytes(path.read_bytes()[:10_000])


def _header(offset: int, form: str, value: int) -> object:
    def write(path: Path) -> None:
        data = _wav(path, _sine(440, 16_000))
        struct.pack_into(form, data, data.find(b"fmt ") + offset, value)
        path.write_bytes(data)

    return write


def _not_a_number(path: Path) -> None:
    _wav(path, [0.0, float("nan"), 0.1], subtype="FLOAT")


def _infinite(path: Path) -> None:
    _wav(path, [0.0, float("inf"), 0.1], subtype="FLOAT")


def _flac_that_claims_a_month(path: Path) -> None:
    soundfile.write(path, _sine(440, 16_000), 16_000, format="FLAC")
    data = bytearray(path.read_bytes())
    data[22:26] = b"\xff\xff\xff\xff"  # the low 32 of 36 bits of the number of frames
    path.write_bytes(data)


def _flac_from_a_pipe(path: Path) -> None:
    soundfile.write(path, _sine(440, 16_000), 16_000, format="FLAC")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_truncated, r"truncated: its header promises 16,000 bytes of samples, there are 9,956"),
        (_truncated_rf64, r"truncated: its header promises 8,000 frames, there are 4,948"),
        (_truncated_flac, r"cannot be decoded as audio: .*lost sync|truncated"),
        (lambda path: path.write_text("hello"), r"cannot be decoded as audio: .*Format not recognised"),
        (lambda path: path.write_bytes(b""), r"cannot be decoded as audio"),
        (lambda path: path.mkdir(), r"a folder, not a recording"),
        (lambda path: None, r"no such file"),
        (lambda path: _wav(path, np.zeros(0)), r"has no samples"),
        (_not_a_number, r"has samples that are NaN or infinite"),
        (_infinite, r"has samples that are NaN or infinite"),
        (_header(12, "<I", 0), r"cannot be decoded as audio"),
        (_header(12, "<I", 10), r"sampling rate 10 Hz; allowed: 1,000 to 384,000 Hz"),
        (_header(12, "<I", 2_000_000_000), r"sampling rate 2,000,000,000 Hz; allowed"),
        (_header(10, "<H", 60_000), r"cannot be decoded as audio"),
        (_flac_from_a_pipe, r"its header does not give its length"),
        (_flac_that_claims_a_month, r"268,435 s long; allowed: at most 600 s"),
    ],
)
def test_files_that_are_no_recording_are_refused_by_name(tmp_path: Path, write: object, message: str) -> None:
    path = tmp_path / "broken.wav"
    write(path)  # type: ignore[operator]
    with pytest.raises(UserError, match=r"broken\.wav: (" + message + ")"):
        Audio().load(path)


def test_limits_go_by_the_header_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wav(tmp_path / "long.wav", np.zeros((8000, 2)))
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(audio_module, "MAX_SAMPLES", 10_000)
    with pytest.raises(UserError, match=r"long\.wav: 8,000 frames × 2 channels; allowed: 10,000 samples in all"):
        Audio().load(tmp_path / "long.wav")
    monkeypatch.setattr(audio_module, "MAX_SECONDS", 0.4)
    with pytest.raises(UserError, match=r"long\.wav: 0 s long; allowed: at most 0\.4 s"):
        Audio().load(tmp_path / "long.wav")


def test_a_wav_from_a_pipe_has_no_length_in_its_header_and_is_read(tmp_path: Path) -> None:
    data = _wav(tmp_path / "tone.wav", _sine(440, 16_000))
    for offset in (4, data.find(b"data") + 4):
        struct.pack_into("<I", data, offset, 0xFFFF_FFFF)
    (tmp_path / "piped.wav").write_bytes(data)
    assert np.array_equal(Audio().load(tmp_path / "piped.wav").samples, Audio().load(tmp_path / "tone.wav").samples)


def test_an_mp3_that_ends_early_is_noticed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "tone.mp3", _sine(440, 16_000, 2), 16_000)
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
    samples[rate:] = 1e-3 * _sine(300, rate, 1)[:, None]
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
    one, two = _mp3(_loud_then_quiet(16_000)), _mp3(_sine(440, 16_000, 1.5), mode="CONSTANT")
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
    one, other = _mp3(_loud_then_quiet(16_000)), _mp3(_sine(440, 44_100, 1), 44_100)
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
    for number, samples in enumerate((_sine(440, 16_000, 1), _sine(700, 16_000, 0.5))):
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
    soundfile.write(tmp_path / "one", _sine(440, 16_000), 16_000, format=form, subtype="PCM_16")
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
    soundfile.write(tmp_path / "a", _sine(440, 16_000), rate, format=form, subtype=subtype)
    with pytest.raises(UserError, match=r"a: its format is .+; allowed: WAV, RF64, .*FLAC, Ogg .*, MP3; convert it"):
        Audio().load(tmp_path / "a")


def test_an_mp3_in_a_wav_is_refused(tmp_path: Path) -> None:
    sound = _mp3(_sine(440, 48_000, 1), 48_000, "CONSTANT")
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
    data = bytearray(_mp3(_sine(440, 48_000, 1), 48_000, "CONSTANT"))
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
    data = _wav(tmp_path / "a.wav", _sine(440, 16_000))
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
    data = _wav(tmp_path / "a.wav", _sine(440, 16_000))
    (tmp_path / "b.wav").write_bytes(bytes(data) + tail)
    assert np.array_equal(Audio().load(tmp_path / "a.wav").samples, Audio().load(tmp_path / "b.wav").samples)


def _noise(seconds: float) -> Recording:
    samples = np.random.default_rng(int(seconds * 1000)).normal(0, 0.1, round(seconds * 16_000))
    return Recording(samples.astype(np.float32))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Whisper with a window of 2 s instead of 30."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50, max_source_positions=100, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AST with a window of 1.295 s (128 frames) instead of 10.26."""
    folder = tmp_path_factory.mktemp("ast")
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_length=128,
        num_mel_bins=32,
    )
    ASTModel(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=128, num_mel_bins=32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "tokens", "longest"),
    [("whisper", (50, 26), 2.0), ("ast", (26, 26), 1.295)],  # (1 + (32 - 16) // 10) × (1 + (128 - 16) // 10) + 2
)
def test_pretrained_encoders(
    kind: str, tokens: tuple[int, int], longest: float, request: pytest.FixtureRequest
) -> None:
    name = str(request.getfixturevalue(kind))
    encoder, empty = Audio().encoder(name), Audio().empty_encoder(name)
    items = [_noise(1.0), _noise(0.505)]
    both = encoder.encode(items)
    assert [tuple(features.shape) for features in both] == [(count, 32) for count in tokens]
    for item, features in zip(items, both, strict=True):
        torch.testing.assert_close(encoder.encode([item])[0], features, atol=1e-5, rtol=1e-5)
    assert encoder.width == empty.width == 32
    assert not encoder.training
    assert {name: tuple(weight.shape) for name, weight in empty.state_dict().items()} == {
        name: tuple(weight.shape) for name, weight in encoder.state_dict().items()
    }
    assert {weight.device.type for weight in empty.parameters()} == {"meta"}
    assert empty.check(_noise(longest)) is None
    assert "takes at most" in str(empty.check(_noise(longest + 0.01)))


def test_ast_needs_one_frame(ast: Path) -> None:
    encoder = Audio().encoder(str(ast))
    assert encoder.check(_noise(0.02)) == "20.0 ms long; audio-spectrogram-transformer takes at least 25 ms"
    assert encoder.check(_noise(0.025)) is None
    assert encoder.encode([_noise(0.025)])[0].isfinite().all()


def test_whisper_is_the_encoder_alone_on_its_own_features(whisper: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    features = WhisperFeatureExtractor.from_pretrained(whisper)(
        _noise(1.0).samples, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    with torch.no_grad():
        expected = model.model.encoder(features).last_hidden_state[0, :50]
    encoder = Audio().encoder(str(whisper))
    torch.testing.assert_close(encoder.encode([_noise(1.0)])[0], expected)
    assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_a_published_whisper_takes_half_a_minute(tmp_path: Path) -> None:
    config = WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    config.decoder_attention_heads = 2
    config.save_pretrained(tmp_path)
    encoder = Audio().empty_encoder(str(tmp_path))
    assert encoder.check(_noise(30)) is None
    assert encoder.check(_noise(30.5)) == "30.5 s long; whisper takes at most 30 s"


@pytest.mark.parametrize("method", ["encoder", "empty_encoder"])
def test_encoders_that_cannot_be_had_are_refused(tmp_path: Path, method: str) -> None:
    make = getattr(Audio(), method)
    with pytest.raises(UserError, match=r"'builtin/tiny-vision' is not an encoder of Audio; .*tiny-audio"):
        make("builtin/tiny-vision")
    with pytest.raises(UserError, match=r"nowhere"):
        make(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty' could not be loaded"):
        make(str(tmp_path / "empty"))
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=r"llama' is a llama model, not an audio encoder; allowed: .*, whisper"):
        make(str(tmp_path / "llama"))


def test_a_configuration_without_weights_is_refused(tmp_path: Path) -> None:
    ASTConfig(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"could not be loaded"):
        Audio().encoder(str(tmp_path))
