"""Time series: one-dimensional numbers from a CSV or ``.npy`` file; an encoder that has no weights.

12.5
12.75
13.1
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from harness.core.errors import UserError
from tasks.base import Modality, Preview

if TYPE_CHECKING:
    from tasks.encoder import Encoder

PATCHES = "builtin/series"
_WIDTH, _HEIGHT, _MARGIN = 240, 100, 4  # of a preview, pixels
_SCALE = 3  # drawn larger, for smooth lines
_BLUE = (51, 119, 204, 255)


def _patches(_weights: bool) -> Encoder:  # it has none
    from tasks.modalities.encoders.series_patches import SeriesPatches

    return SeriesPatches()


class Series(Modality):
    """Numbers in the order of time, equally spaced.

    A CSV file holds one number per line, or all of them in one line; no header. An ``.npy`` file holds one dimension of
    integers or floats.
    """

    default_encoder: ClassVar = PATCHES
    built_in: ClassVar = {PATCHES: _patches}

    def load(self, path: Path) -> NDArray[np.float64]:
        """Read the whole series, float64 of shape (T,).

        Raises:
            UserError: the file is missing or empty, has another shape, or holds something that is not a finite number.
        """
        try:
            values = _read_npy(path) if path.suffix == ".npy" else _read_csv(path)
        except UserError:
            raise
        except (OSError, ValueError, EOFError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read as a series: {error}") from error
        if not len(values):
            raise UserError(f"{path}: no numbers; a series needs at least one")
        broken = np.flatnonzero(~np.isfinite(values))
        if len(broken):
            raise UserError(f"{path}: value {broken[0] + 1} is {values[broken[0]]}; allowed: finite numbers")
        return values

    def preview(self, item: NDArray[np.float64]) -> Preview:
        """The curve; where several values fall on a pixel, from the lowest to the highest of them."""
        return Preview("png", _curve(item))


def _curve(values_T: NDArray[np.float64]) -> bytes:
    from PIL import Image, ImageDraw

    parts = np.array_split(values_T, min(len(values_T), _WIDTH))
    ends = np.array([(part.min(), part.max()) for part in parts])
    low, high = float(ends.min()), float(ends.max())
    # Halved first, because the difference of two floats may be infinite.
    share = (ends / 2 - low / 2) / (high / 2 - low / 2) if high > low else np.full_like(ends, 0.5)
    across = np.linspace(_MARGIN, _WIDTH - _MARGIN, len(parts)) if len(parts) > 1 else np.array([_WIDTH / 2])
    points = []
    for number, (x, pair) in enumerate(zip(across, share, strict=True)):
        ordered = pair if number % 2 else pair[::-1]  # up and down in turn: the line crosses the range of each part
        points += [(_SCALE * x, _SCALE * (_HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * y)) for y in ordered]
    picture = Image.new("RGBA", (_SCALE * _WIDTH, _SCALE * _HEIGHT), (255, 255, 255, 0))  # on light and dark pages
    draw = ImageDraw.Draw(picture)
    draw.line(points, fill=_BLUE, width=2 * _SCALE, joint="curve")
    if len(values_T) == 1:
        (x, y), size = points[0], 3 * _SCALE
        draw.ellipse((x - size, y - size, x + size, y + size), fill=_BLUE)
    buffer = io.BytesIO()
    picture.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _read_npy(path: Path) -> NDArray[np.float64]:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):  # an archive of several, whatever its name says
        raise UserError(f"{path}: holds several arrays; allowed: one, of one dimension")
    if array.ndim != 1 or array.dtype.kind not in "iuf":
        raise UserError(f"{path}: an array of shape {array.shape} and type {array.dtype}; allowed: one dimension, real")
    return array.astype(np.float64)


def _read_csv(path: Path) -> NDArray[np.float64]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    if len(rows) > 1 and (wide := next(((number, row) for number, row in rows if len(row) > 1), None)):
        raise UserError(f"{path}: line {wide[0]} has {len(wide[1])} columns; allowed: one column, or one line")
    values = []
    for number, row in rows:
        for cell in row:
            try:
                values.append(float(cell))
            except ValueError:
                raise UserError(f"{path}: line {number}: found {cell[:80]!r}; allowed: numbers, no header") from None
            if not math.isfinite(values[-1]):
                raise UserError(f"{path}: line {number}: found {cell[:80]!r}; allowed: finite numbers")
    return np.array(values, dtype=np.float64)
