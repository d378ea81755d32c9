"""Random changes of pictures, each against plain arithmetic on its pixels."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from tasks.modalities.augmentation import Augmentation, crop_box

WIDTH, HEIGHT = 160, 120


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(float)


def ramp() -> Image.Image:
    """Red encodes the column, green the row (both 0–255), so that the position of a crop can be read from it."""
    red, green = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], -1).round().astype(np.uint8))


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def draws(picture: Image.Image, count: int = 300, **options: Any) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Augmentation(**options).apply(picture, rng) for _ in range(count)]


ALL = {"horizontal_flip": 0.5, "crop_scale": (0.3, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}


def test_the_generator_alone_decides_and_the_picture_stays() -> None:
    picture = noise()
    before = picture.tobytes()
    one, again, other = (Augmentation(**ALL).apply(picture, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert picture.tobytes() == before
    assert (one.size, one.mode) == (picture.size, "RGB")


def test_by_default_nothing_is_changed() -> None:
    assert not Augmentation().active
    assert Augmentation().apply(noise(), np.random.default_rng(0)).tobytes() == noise().tobytes()
    for option, value in ALL.items():
        assert Augmentation(**{option: value}).active


def test_a_flip_mirrors_left_and_right_as_often_as_asked() -> None:
    flipped = [np.array_equal(pixels(p), pixels(noise())[:, ::-1]) for p in draws(noise(), horizontal_flip=0.3)]
    kept = [np.array_equal(pixels(p), pixels(noise())) for p in draws(noise(), horizontal_flip=0.3)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 0.2 < np.mean(flipped) < 0.4  # 300 draws: ± 4 standard errors
    assert all(np.array_equal(pixels(p), pixels(noise())[:, ::-1]) for p in draws(noise(), 5, horizontal_flip=1.0))


def test_crops_have_the_area_and_proportions_asked_for_and_show_that_part() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box((WIDTH, HEIGHT), (0.2, 0.6), (3 / 4, 4 / 3), rng) for _ in range(2000)])
    widths, heights = (boxes[:, 2:] - boxes[:, :2]).T
    area = widths * heights / (WIDTH * HEIGHT)
    assert boxes.min() >= 0
    assert (boxes[:, 2] <= WIDTH).all()
    assert (boxes[:, 3] <= HEIGHT).all()
    assert 0.19 < area.min() < 0.22  # sides are whole pixels
    assert 0.58 < area.max() < 0.61
    assert abs(area.mean() - 0.4) < 0.02
    assert 0.72 < (widths / heights).min() < 0.8
    assert 1.26 < (widths / heights).max() < 1.37
    assert abs(np.log(widths / heights).mean()) < 0.03
    centre = (boxes[:, :2] + boxes[:, 2:]).mean(0) / 2 / (WIDTH, HEIGHT)
    assert np.abs(centre - 0.5).max() < 0.03

    option = Augmentation(crop_scale=(0.2, 0.6))
    for seed in range(20):
        left, top, right, bottom = crop_box((WIDTH, HEIGHT), (0.2, 0.6), (3 / 4, 4 / 3), np.random.default_rng(seed))
        shown = pixels(option.apply(ramp(), np.random.default_rng(seed)))
        expected_x = np.interp(np.linspace(left, right, WIDTH + 1)[:-1], np.arange(WIDTH), np.linspace(0, 255, WIDTH))
        expected_y = np.interp(
            np.linspace(top, bottom, HEIGHT + 1)[:-1], np.arange(HEIGHT), np.linspace(0, 255, HEIGHT)
        )
        assert np.abs(shown[:, :, 0] - expected_x[None]).max() < 3  # half a pixel and rounding
        assert np.abs(shown[:, :, 1] - expected_y[:, None]).max() < 3


def test_a_crop_that_never_fits_is_the_middle() -> None:
    rng = np.random.default_rng(0)
    assert crop_box((400, 10), (1.0, 1.0), (3 / 4, 4 / 3), rng) == (193, 0, 206, 10)
    assert crop_box((10, 400), (1.0, 1.0), (3 / 4, 4 / 3), rng) == (0, 193, 10, 206)
    assert crop_box((1, 1), (0.1, 0.1), (3 / 4, 4 / 3), rng) == (0, 0, 1, 1)


def _blend(kind: str, picture_HWC: np.ndarray, factor: float) -> np.ndarray:
    """ColorJitter's definitions: towards black, towards the mean grey, towards the picture's own greys."""
    grey_HW1 = (picture_HWC @ np.array([0.299, 0.587, 0.114]))[..., None]
    origin = {"brightness": 0.0, "contrast": np.round(grey_HW1.mean()), "saturation": grey_HW1}[kind]
    return np.clip(origin + factor * (picture_HWC - origin), 0, 255)


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_colours_are_blended_by_a_factor_within_the_range(kind: str) -> None:
    picture = noise().point(lambda value: 60 + value * 100 // 255)  # 60–160: nothing is clipped below a factor of 1.5
    factors = []
    for changed in draws(picture, 60, **{kind: 0.4}):
        half, found = _blend(kind, pixels(picture), 1.5) - pixels(picture), pixels(changed) - pixels(picture)
        factor = 1 + 0.5 * float((half * found).sum() / (half * half).sum())  # least squares
        factors.append(factor)
        assert np.abs(_blend(kind, pixels(picture), factor) - pixels(changed)).max() < 2.5
    assert 0.58 < min(factors) < 0.7
    assert 1.3 < max(factors) < 1.42


def test_strong_jitter_never_inverts() -> None:
    assert min(pixels(p).mean() for p in draws(noise(), 50, brightness=3.0)) >= 0
    grey = Image.new("RGB", (4, 4), (90, 90, 90))
    assert all(np.array_equal(pixels(p), pixels(grey)) for p in draws(grey, 20, saturation=2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal_flip": 1.5}, "less than or equal to 1"),
        ({"crop_scale": [0, 1]}, r"crop_scale: 0 < least <= greatest <= 1; found \[0.0, 1.0\]"),
        ({"crop_scale": [0.9, 0.2]}, "crop_scale: 0 < least"),
        ({"crop_ratio": [2, 1]}, "crop_ratio: 0 < least"),
        ({"brightness": -0.1}, "greater than or equal to 0"),
        ({"colour": 0.1}, "Extra inputs are not permitted"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Augmentation.model_validate_json(json.dumps(options))
