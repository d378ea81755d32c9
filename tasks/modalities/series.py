"""Time series: one-dimensional numbers from a CSV or ``.npy`` file; an encoder that has no weights.

12.5
12.75
13.1
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from harness.core.errors import UserError
from tasks.base import Modality

if TYPE_CHECKING:
    from tasks.encoder import Encoder

PATCHES = "builtin/series"


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
