"""Positions of models that tell where a feature is in its picture: multimodal rotary positions, as Qwen-VL has them.

A text's tokens have one number each, in all three dimensions (time, height, width); the features of a picture have that
of its beginning and their row and column; what follows goes on after the larger of the picture's sides.

Shapes: N positions of a row's part.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int]  # rows and columns of a picture's features


def positions_of(parts: Iterable[tuple[int, Grid | None]], start: int = 0) -> tuple[NDArray[np.int64], int]:
    """The positions (3, N) of consecutive parts of a row, and the position that follows.

    Args:
        parts: of each the number of tokens, or of a picture's features, with their grid.
        start: the first position.
    """
    found = [np.empty((3, 0), dtype=np.int64)]
    for length, grid in parts:
        if grid is None:
            found.append(np.tile(np.arange(start, start + length), (3, 1)))
            start += length
        else:
            rows, columns = np.divmod(np.arange(length), grid[1])
            found.append(start + np.stack([np.zeros_like(rows), rows, columns]))
            start += max(grid)
    return np.concatenate(found, axis=1), start
