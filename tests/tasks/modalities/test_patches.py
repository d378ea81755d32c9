"""The grid of a picture's tokens for every family of encoders, and the part of the picture that it covers."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image as PilImage

from tasks.modalities.encoders.pretrained_vision import PretrainedVision
from tasks.modalities.image import TINY, Image
from tasks.modalities.patches import Grid, grid_of
from tests.support.vision import FAMILIES, save

WHOLE = (0.0, 0.0, 1.0, 1.0)
# Of a picture twice as wide as high; the crops are the middle square, and 32/40 of it.
EXPECTED = {
    "vit": Grid(1, 4, 4, WHOLE),
    "swinv2": Grid(0, 4, 4, WHOLE),
    "dinov2": Grid(1, 4, 4, (0.3, 0.1, 0.7, 0.9)),
    "clip": Grid(1, 4, 4, (0.25, 0.0, 0.75, 1.0)),
    "clip_vision": Grid(1, 4, 4, (0.25, 0.0, 0.75, 1.0)),
    "siglip": Grid(0, 4, 4, WHOLE),
    "siglip_vision": Grid(0, 4, 4, WHOLE),
    "convnext": Grid(0, 2, 3, WHOLE),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_grid_is_where_the_processor_looked(name: str, tmp_path: Path) -> None:
    save(FAMILIES[name], tmp_path)
    encoder = Image().encoder(str(tmp_path))
    picture = PilImage.new("RGB", (320, 160), "grey")
    (features_ND,) = encoder.encode([picture])
    found = grid_of(encoder, picture, len(features_ND))
    assert found is not None
    assert found[:3] == EXPECTED[name][:3]
    assert found.box == pytest.approx(EXPECTED[name].box, abs=0.011)


def test_the_built_in_encoder_has_four_by_four_patches() -> None:
    encoder = Image().encoder(TINY)
    assert grid_of(encoder, PilImage.new("RGB", (90, 30)), 16) == Grid(0, 4, 4, WHOLE)


def test_what_is_no_grid_is_none(tmp_path: Path) -> None:
    encoder = Image().encoder(TINY)
    assert grid_of(encoder, PilImage.new("RGB", (48, 48)), 15) is None
    assert grid_of(encoder, "a recording", 16) is None
    save(FAMILIES["vit"], tmp_path)
    padding = Image().encoder(str(tmp_path))
    assert isinstance(padding, PretrainedVision)
    plain = padding.processor

    def padded(images: PilImage.Image, return_tensors: str) -> object:
        square = PilImage.new("RGB", (max(images.size),) * 2)
        square.paste(images)
        return plain(images=square, return_tensors=return_tensors)

    padding.processor = padded
    assert grid_of(padding, PilImage.new("RGB", (320, 160)), 17) is None
