"""One row for several targets of the same inputs: ``[BOS] inputs [target 1] … [target N]``.

The inputs, the prefix of the row, are computed once; where inputs only begin alike (questions about one picture), the
rest of them belongs to the branch of the target. A branch sees the prefix and itself, at the positions that it would
have alone, so a target's likelihood is that of its own row up to rounding. What a language model makes of such rows is
compared with rows of one target before it is used (``agrees``).

Shapes: B rows, T positions, R targets of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.model.batch import Batch, Parts, Targets

MOST_TARGETS = 8  # in one row: attention's mask grows with the square of its length
_PREFIX, _PADDING = 0, -1  # in parts_BT; branches are numbered from 1 in each row
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative, of a target's likelihood; others: half precision
_HALF = 0.03


def attention_mask(parts: Parts, dtype: torch.dtype) -> Tensor:
    """Added to attention scores (B, 1, T, T): 0 where a position sees another one, else the lowest number."""
    parts_BT = parts.parts_BT
    query_BT1, key_B1T, length = parts_BT[:, :, None], parts_BT[:, None, :], parts_BT.shape[1]
    earlier_TT = torch.ones(length, length, dtype=torch.bool, device=parts_BT.device).tril()
    seen_BTT = earlier_TT & ((key_B1T == _PREFIX) | (key_B1T == query_BT1))
    mask_BTT = torch.zeros(seen_BTT.shape, dtype=dtype, device=seen_BTT.device)
    return mask_BTT.masked_fill(~seen_BTT, torch.finfo(dtype).min)[:, None]


def arranged(rows: Batch, layouts: Sequence[tuple[int, Sequence[tuple[int, Sequence[int]]]]]) -> Batch:
    """Arrange the targets of rows.

    Args:
        rows: each with its prefix, and then what follows it in each branch, without the last token of the target.
        layouts: of each row the number of positions of its prefix, and for each branch the number of positions between
            the prefix and the target, and the ids of the target, which has one or more.
    """
    shape = tuple(rows.token_ids_BT.shape)
    parts, positions = np.full(shape, _PADDING), np.zeros(shape, dtype=np.int64)
    found: list[list[tuple[int, int, int]]] = []  # row, source and label of each token of each target
    for row, (prefix, branches) in enumerate(layouts):
        parts[row, :prefix], positions[row, :prefix] = _PREFIX, np.arange(prefix)
        start = prefix
        for part, (between, ids) in enumerate(branches, start=1):
            stop = start + between + len(ids) - 1
            parts[row, start:stop], positions[row, start:stop] = part, prefix + np.arange(stop - start)
            first = start + between - 1 if between else prefix - 1
            sources = [first, *range(start + between, stop)]
            found.append([(row, source, label) for source, label in zip(sources, ids, strict=True)])
            start = stop
    arrangement = Parts(torch.from_numpy(parts), torch.from_numpy(positions))
    return replace(rows, targets=Targets.of(found), parts=arrangement)


def fits(config: Any, length: int) -> bool:
    """Whether every position of a row may see all earlier ones, as far as the language model's config says it."""
    text = config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return all(not isinstance(window, int) or window <= 0 or length <= window for window in windows)


def agrees(shared_R: Tensor, alone_R: Tensor, dtype: torch.dtype) -> bool:
    """Whether the likelihoods of targets in shared rows are those in rows of their own, up to rounding.

    Args:
        shared_R: in shared rows.
        alone_R: in rows of their own.
        dtype: that the language model computes in.
    """
    if not torch.isfinite(alone_R).all():
        return False
    tolerance = _TOLERANCE.get(dtype, _HALF)
    return torch.allclose(shared_R, alone_R, rtol=tolerance, atol=tolerance)
