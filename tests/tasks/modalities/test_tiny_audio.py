"""The built-in audio encoder: its front end, its independence of the batch, its files, what the weights do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.core.errors import UserError
from harness.core.hub import PRETRAINED
from tasks.modalities.audio import Audio
from tasks.modalities.encoders.recording import Recording
from tasks.modalities.encoders.tiny_audio import TinyAudio

SHIPPED = PRETRAINED / "tiny-audio"


def _noise(seconds: float, level: float = 0.1) -> Recording:
    samples = np.random.default_rng(int(seconds * 1000)).normal(0, level, round(seconds * 16_000))
    return Recording(samples.astype(np.float32))


def _mel(hertz: float) -> float:
    """Slaney's scale: 3 / 200 mel a hertz up to 1 kHz, then 27 mels for every factor of 6.4."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)


def _reference_log_mel(samples: np.ndarray) -> np.ndarray:
    """In double precision, by the definitions: Hann window, DFT as a matrix, triangles of equal area."""
    samples = samples.astype(np.float64) / np.abs(samples).max()
    edges_mel = np.linspace(0, _mel(8000), 66)
    grid = np.linspace(0, 8000, 800_001)
    edges = np.interp(edges_mel, [_mel(hertz) for hertz in grid], grid)
    bins = np.arange(257) * 16_000 / 512
    triangles = [
        np.interp(bins, [low, middle, high], [0, 2 / (high - low), 0], left=0, right=0)
        for low, middle, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
    ]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = -(-len(samples) // 160)
    rows = []
    for frame in range(frames):
        places = frame * 160 + 80 - 200 + np.arange(400)
        inside = (places >= 0) & (places < len(samples))
        windowed = np.where(inside, samples[places.clip(0, len(samples) - 1)], 0) * window
        dft = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512) @ windowed
        rows.append(np.log10(np.maximum(np.array(triangles) @ np.abs(dft) ** 2, 1e-10)))
    mel = np.array(rows)
    relative: np.ndarray = np.maximum(mel - mel.max(), -6) / 3 + 1
    return relative


def test_log_mel_is_that_of_the_definition_in_double_precision() -> None:
    time_s = np.arange(3_333) / 16_000
    samples = 0.2 * np.sin(2 * np.pi * 1300 * time_s**1.5) + np.random.default_rng(0).normal(0, 0.01, len(time_s))
    found = TinyAudio.log_mel(torch.from_numpy(samples.astype(np.float32)))
    assert found.shape == (21, 64)
    np.testing.assert_allclose(found.numpy(), _reference_log_mel(samples.astype(np.float32)), atol=2e-3)


def test_the_level_of_a_recording_does_not_matter_and_silence_is_no_sound() -> None:
    samples = torch.from_numpy(_noise(0.3).samples)
    torch.testing.assert_close(TinyAudio.log_mel(samples * 1e-4), TinyAudio.log_mel(samples), atol=1e-3, rtol=0)
    assert torch.equal(TinyAudio.log_mel(torch.zeros(4_000)), torch.full((25, 64), -1.0))
    assert TinyAudio.log_mel(samples).max() == 1


@pytest.mark.parametrize("seconds", [1 / 16_000, 0.01, 0.0801, 0.3, 2.0])
def test_a_token_for_every_80_ms_begun(seconds: float) -> None:
    encoder = TinyAudio.load(SHIPPED)
    item = _noise(seconds)
    (features_ND,) = encoder.encode([item])
    assert features_ND.shape == (-(-len(item.samples) // 1280), encoder.width)
    assert features_ND.isfinite().all()


def test_features_do_not_depend_on_the_batch() -> None:
    encoder = TinyAudio.load(SHIPPED)
    items = [_noise(seconds) for seconds in (0.05, 1.7, 0.33, 0.08)] + [Recording(np.zeros(5000, np.float32))]
    for item, features_ND in zip(items, encoder.encode(items), strict=True):
        torch.testing.assert_close(encoder.encode([item])[0], features_ND, atol=2e-5, rtol=1e-5)


def test_a_long_recording_is_a_row_of_short_ones() -> None:
    """A token sees 16 others to either side (8 a layer), and a few frames through the stem, but nothing beyond."""
    encoder = TinyAudio.load(SHIPPED)
    mel_BFM = TinyAudio.log_mel(torch.from_numpy(_noise(8.0).samples))[None]
    changed_BFM = mel_BFM.clone()
    changed_BFM[:, 400:] -= 0.5
    frames_B = torch.tensor([800])
    with torch.no_grad():
        before, after = encoder(mel_BFM, frames_B)[0], encoder(changed_BFM, frames_B)[0]
    torch.testing.assert_close(before[: 50 - 18], after[: 50 - 18])
    assert (before[50 - 14] - after[50 - 14]).abs().max() > 1e-4


def test_recordings_that_are_too_long_are_refused_before_anything_is_computed() -> None:
    encoder = Audio().empty_encoder("builtin/tiny-audio")
    assert {weight.device.type for weight in encoder.parameters()} == {"meta"}
    assert encoder.check(_noise(30.0)) is None
    assert encoder.check(_noise(30.2)) == "30.2 s long; builtin/tiny-audio takes at most 30 s"


def test_encoder_saves_and_loads_exactly(tmp_path: Path) -> None:
    encoder = TinyAudio(width=32, layers=1).eval()
    encoder.save(tmp_path)
    assert torch.equal(TinyAudio.load(tmp_path).encode([_noise(0.5)])[0], encoder.encode([_noise(0.5)])[0])


def test_encoder_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: not a TinyAudio encoder.*No such file"):
        TinyAudio.load(tmp_path / "nowhere")
    TinyAudio(width=32, layers=1).save(tmp_path)
    config = tmp_path / "config.json"
    written = config.read_text()
    config.write_text(written.replace('"layers": 1', '"layers": 2'))
    with pytest.raises(UserError, match=r"not a TinyAudio encoder.*Missing key"):
        TinyAudio.load(tmp_path)
    config.write_text(written.replace("tiny_audio", "whisper"))
    with pytest.raises(UserError, match=r"config\.json: model_type is 'whisper'; allowed: tiny_audio"):
        TinyAudio.load(tmp_path)


def test_shipped_weights_are_those_of_their_log() -> None:
    encoder = Audio().encoder(Audio.default_encoder)
    assert isinstance(encoder, TinyAudio)
    assert not encoder.training
    recorded = json.loads((SHIPPED / "training.json").read_text())
    assert sum(weight.numel() for weight in encoder.parameters()) == recorded["parameters"]
    assert (SHIPPED / "model.safetensors").stat().st_size < 2_000_000


def _accuracy(rows: np.ndarray, digits: np.ndarray, speakers: np.ndarray, speaker: str) -> float:
    """Of a ridge regression trained on the other speakers."""
    known = speakers != speaker
    rows = np.c_[(rows - rows[known].mean(0)) / (rows[known].std(0) + 1e-6), np.ones(len(rows))]
    gram = rows[known].T @ rows[known] + 30 * np.eye(rows.shape[1])
    weights = np.linalg.solve(gram, rows[known].T @ np.eye(10)[digits[known]])
    right: np.ndarray = (rows[~known] @ weights).argmax(1) == digits[~known]
    return float(right.mean())


@pytest.mark.real_data
def test_mean_features_tell_digits_of_unseen_speakers_better_than_log_mels() -> None:
    if "FSDD_ROOT" not in os.environ:
        pytest.skip("FSDD_ROOT is not set")
    paths = sorted((Path(os.environ["FSDD_ROOT"]) / "recordings").glob("*_[0-7].wav"))
    items = [Audio().load(path) for path in paths]
    assert {Audio().remark(item) for item in items} == {"8,000 Hz, resampled to 16,000 Hz"}
    digits = np.array([int(path.name[0]) for path in paths])
    speakers = np.array([path.name.split("_")[1] for path in paths])

    def unseen(features: list[Tensor]) -> float:
        rows = np.stack([one.mean(0).numpy() for one in features])
        return float(np.mean([_accuracy(rows, digits, speakers, speaker) for speaker in sorted(set(speakers))]))

    encoded = unseen(TinyAudio.load(SHIPPED).encode(items))
    plain = unseen([TinyAudio.log_mel(torch.from_numpy(item.samples)) for item in items])
    assert encoded > 0.6
    assert encoded > plain + 0.15
