"""The audio modality: files of all common kinds, and pretrained encoders from folders, all written by the tests."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
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
from tasks.modalities import audio as audio_module
from tasks.modalities.audio import Audio
from tasks.modalities.encoders.recording import Recording
from tests.support.recordings import sine, write_wav


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
    soundfile.write(path, sine(440, 16_000), 16_000, subtype=subtype)
    recording = Audio().load(path)
    assert recording.samples.dtype == np.float32
    np.testing.assert_allclose(recording.samples, sine(440, 16_000), atol=tolerance)
    assert recording.seconds == 0.5
    assert Audio().remark(recording) is None


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_is_that_of_the_exact_sine(tmp_path: Path, rate: int) -> None:
    write_wav(tmp_path / "tone.wav", sine(1000, rate), rate, "DOUBLE")
    recording = Audio().load(tmp_path / "tone.wav")
    assert len(recording.samples) == 8000
    middle = slice(200, -200)  # before and after the recording the filter sees silence
    np.testing.assert_allclose(recording.samples[middle], sine(1000, 16_000)[middle], atol=2e-3)
    assert Audio().remark(recording) == f"{rate:,} Hz, resampled to 16,000 Hz"


def test_what_16_khz_cannot_hold_is_filtered_out_and_does_not_fold_back(tmp_path: Path) -> None:
    """Without the filter, 11 kHz would be heard as 5 kHz."""
    write_wav(tmp_path / "tone.wav", sine(11_000, 48_000), 48_000, "DOUBLE")
    assert np.abs(Audio().load(tmp_path / "tone.wav").samples[200:-200]).max() < 0.5 * 10 ** (-40 / 20)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = sine(300, 16_000), sine(500, 16_000)
    write_wav(tmp_path / "stereo.wav", np.stack([left, right], axis=1), subtype="DOUBLE")
    recording = Audio().load(tmp_path / "stereo.wav")
    np.testing.assert_allclose(recording.samples, (left + right) / 2, atol=1e-7)
    assert Audio().remark(recording) == "stereo, averaged to mono"
    write_wav(tmp_path / "surround.wav", np.stack([left] * 6, axis=1), rate=8_000)
    remark = Audio().remark(Audio().load(tmp_path / "surround.wav"))
    assert remark == "6 channels, averaged to mono; 8,000 Hz, resampled to 16,000 Hz"


def _truncated(path: Path) -> None:
    path.write_bytes(write_wav(path, sine(440, 16_000))[:10_000])


def _truncated_rf64(path: Path) -> None:
    soundfile.write(path, sine(440, 16_000), 16_000, format="RF64")
    path.write_bytes(path.read_bytes()[:10_000])


def _truncated_flac(path: Path) -> None:
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000, format="FLAC")
    path.write_bytes(path.read_bytes()[:10_000])


def _header(offset: int, form: str, value: int) -> object:
    def write(path: Path) -> None:
        data = write_wav(path, sine(440, 16_000))
        struct.pack_into(form, data, data.find(b"fmt ") + offset, value)
        path.write_bytes(data)

    return write


def _not_a_number(path: Path) -> None:
    write_wav(path, [0.0, float("nan"), 0.1], subtype="FLOAT")


def _infinite(path: Path) -> None:
    write_wav(path, [0.0, float("inf"), 0.1], subtype="FLOAT")


def _flac_that_claims_a_month(path: Path) -> None:
    soundfile.write(path, sine(440, 16_000), 16_000, format="FLAC")
    data = bytearray(path.read_bytes())
    data[22:26] = b"\xff\xff\xff\xff"  # the low 32 of 36 bits of the number of frames
    path.write_bytes(data)


def _flac_from_a_pipe(path: Path) -> None:
    soundfile.write(path, sine(440, 16_000), 16_000, format="FLAC")
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
        (lambda path: write_wav(path, np.zeros(0)), r"has no samples"),
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
    write_wav(tmp_path / "long.wav", np.zeros((8000, 2)))
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(audio_module, "MAX_SAMPLES", 10_000)
    with pytest.raises(UserError, match=r"long\.wav: 8,000 frames × 2 channels; allowed: 10,000 samples in all"):
        Audio().load(tmp_path / "long.wav")
    monkeypatch.setattr(audio_module, "MAX_SECONDS", 0.4)
    with pytest.raises(UserError, match=r"long\.wav: 0 s long; allowed: at most 0\.4 s"):
        Audio().load(tmp_path / "long.wav")


def test_a_wav_from_a_pipe_has_no_length_in_its_header_and_is_read(tmp_path: Path) -> None:
    data = write_wav(tmp_path / "tone.wav", sine(440, 16_000))
    for offset in (4, data.find(b"data") + 4):
        struct.pack_into("<I", data, offset, 0xFFFF_FFFF)
    (tmp_path / "piped.wav").write_bytes(data)
    assert np.array_equal(Audio().load(tmp_path / "piped.wav").samples, Audio().load(tmp_path / "tone.wav").samples)


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
    assert [(x_ND.shape, x_ND.device.type) for x_ND in empty.encode(items)] == [(x_ND.shape, "meta") for x_ND in both]
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
