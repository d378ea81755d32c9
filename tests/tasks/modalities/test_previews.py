"""What people see or hear of items: opened again, and compared with the item."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from tasks.base import Modality, Preview
from tasks.modalities.audio import Audio
from tasks.modalities.encoders.recording import SAMPLING_RATE, Recording
from tasks.modalities.image import Image
from tasks.modalities.series import Series

PNG = b"\x89PNG\r\n\x1a\n"


def opened(preview: Preview) -> PilImage.Image:
    assert preview.kind == "png"
    with PilImage.open(io.BytesIO(preview.content), formats=["PNG"]) as picture:
        picture.load()
        return picture


def test_a_preview_is_one_of_three_kinds_and_small() -> None:
    assert Preview.text("drei Wörter hier").content.decode("utf-8") == "drei Wörter hier"
    for kind, content in (("png", b"GIF89a"), ("wav", PNG), ("jpeg", PNG), ("text", b"\xff")):
        with pytest.raises(ValueError, match=r"of kind|can't decode"):
            Preview(kind, content)  # type: ignore[arg-type]
    for content in (b"", b"x" * (2**20 + 1)):
        with pytest.raises(ValueError, match=r"a preview of [\d,]+ bytes; allowed: 1 to 1,048,576"):
            Preview("text", content)


def test_by_default_there_is_none() -> None:
    assert Modality.preview(Series(), np.zeros(3)) is None


def test_a_picture_is_made_smaller_and_a_small_one_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = PilImage.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert opened(Image().preview(small)).tobytes() == small.tobytes()
    large = PilImage.new("RGB", (1200, 600), "red")
    shown = opened(Image().preview(large))
    assert (shown.size, shown.getpixel((9, 9))) == ((240, 120), (255, 0, 0))
    assert large.size == (1200, 600)
    noise = PilImage.fromarray(rng.integers(0, 256, (900, 900, 3), dtype=np.uint8))
    assert len(Image().preview(noise).content) < 2**20


def test_a_recording_is_heard_as_the_encoder_gets_it() -> None:
    samples_S = np.sin(np.arange(12 * SAMPLING_RATE) / 7).astype(np.float32)
    samples_S[5] = 1.7  # clipped
    with wave.open(io.BytesIO(Audio().preview(Recording(samples_S)).content)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (1, 16_000, 2)
        heard_S = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    assert len(heard_S) == 10 * SAMPLING_RATE
    assert np.abs(heard_S - np.clip(samples_S[: len(heard_S)], -1, 1)).max() < 1e-4


def heights(values: list[float] | np.ndarray) -> np.ndarray:
    """By column of the preview the middle of the curve, 0 at the bottom; NaN where there is none."""
    opacity = np.asarray(opened(Series().preview(np.asarray(values, dtype=float))))[..., 3].astype(float)
    rows = np.arange(len(opacity))[::-1, None]
    with np.errstate(invalid="ignore"):
        found: np.ndarray = (opacity * rows).sum(axis=0) / opacity.sum(axis=0)
    return found


def test_a_series_is_drawn_from_left_to_right() -> None:
    drawn = heights(np.linspace(-3, 5, 50))
    inside = drawn[np.isfinite(drawn)]
    assert len(inside) > 225
    assert (np.diff(inside) > -1).all()
    assert inside[0] < 10
    assert inside[-1] > 90
    wave_ = heights(np.sin(np.linspace(0, 2 * np.pi, 100_000)))  # many values on one pixel
    assert np.nanargmax(wave_) == pytest.approx(60, abs=3)
    assert np.nanargmin(wave_) == pytest.approx(180, abs=3)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [-1.7e308, 1.7e308, 0.0]])
def test_flat_single_and_huge_values_are_drawn(values: list[float]) -> None:
    drawn = heights(values)
    assert np.isfinite(drawn).any()
    assert np.nanmin(drawn) >= 0


def test_previews_are_the_same_every_time() -> None:
    values = np.random.default_rng(1).normal(size=500)
    assert Series().preview(values) == Series().preview(values.copy())
