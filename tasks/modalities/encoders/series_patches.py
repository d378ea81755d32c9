"""The built-in encoder of series: patches of normalised values, and the scale that normalising removed.

Shapes: T values of a series, N = ceil(T / 8) patches of P = 8 values, D = 12 features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.encoder import Encoder

PATCH = 8  # P, values
# A deviation below this share of the largest value is rounding: the series is constant.
_FLAT = 1e-9


class SeriesPatches(Encoder):
    """Cut a series into patches, as PatchTST does (arXiv 2211.14730), without weights.

    Features of a patch: its 8 values, the series normalised to mean 0 and standard deviation 1 (a constant one to 0;
    the last patch padded with 0); asinh of the mean and of the standard deviation of the series, which is near
    linear for small numbers, logarithmic for large ones, and keeps the sign; where the patch begins, from 0 at the
    start to 1 at the end; and which share of it are values.
    """

    width = PATCH + 4

    @torch.no_grad()
    def encode(self, items: Sequence[NDArray[np.float64]]) -> list[Tensor]:
        """Features (N, 12) of each series (T,), float32, on the CPU."""
        return [torch.from_numpy(_features(series_T)) for series_T in items]


def _features(series_T: NDArray[np.float64]) -> NDArray[np.float32]:
    largest = np.abs(series_T).max() or 1.0
    unit_T = series_T / largest  # squares of what float64 can hold would overflow
    mean, deviation = unit_T.mean(), unit_T.std()
    normalised_T = np.zeros_like(unit_T) if deviation < _FLAT else (unit_T - mean) / deviation
    patches = -(-len(series_T) // PATCH)
    features_ND = np.zeros((patches, SeriesPatches.width), dtype=np.float32)
    starts_N = PATCH * np.arange(patches)
    features_ND[:, :PATCH] = np.pad(normalised_T, (0, patches * PATCH - len(series_T))).reshape(patches, PATCH)
    features_ND[:, PATCH] = np.arcsinh(mean * largest)
    features_ND[:, PATCH + 1] = 0.0 if deviation < _FLAT else np.arcsinh(deviation * largest)
    features_ND[:, PATCH + 2] = starts_N / len(series_T)
    features_ND[:, PATCH + 3] = np.minimum(len(series_T) - starts_N, PATCH) / PATCH
    return features_ND
