"""One row for several targets of the same inputs: ``[BOS] inputs [target 1] … [target N]``.

The inputs, the prefix of the row, are computed once. Each target sees the prefix and itself, at the positions that it
would have alone, so its likelihood is that of its own row up to rounding. What a language model makes of such rows is
compared with rows of one target before it is used (``agrees``).

Shapes: B rows, T positions, P targets of all rows, N target tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.model.batch import IGNORED, Batch

_PREFIX, _PADDING = 0, -1  # in parts_BT; targets are numbered from 1 in each row
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative, of a target's likelihood; others: half precision
_HALF = 0.03


@dataclass(frozen=True)
class SharedBatch:
    """Rows with several targets each.

    Attributes:
        rows: the prefixes, and after them the tokens of the targets that others are predicted from.
        parts_BT: 0 for the prefix, the number of the target in its row from 1, -1 for padding.
        positions_BT: for the language model's position embedding.
        row_N: of each target token, the row.
        source_N: the position that predicts it.
        label_N: its id.
        target_N: its target, among those of all rows.
        targets: P.
    """

    rows: Batch
    parts_BT: Tensor
    positions_BT: Tensor
    row_N: Tensor
    source_N: Tensor
    label_N: Tensor
    target_N: Tensor
    targets: int

    @property
    def first_source(self) -> int:
        """The first position that predicts a target in any row."""
        return self.rows.first_label

    @property
    def length(self) -> int:
        """T."""
        return self.parts_BT.shape[1]

    def to(self, device: torch.device) -> SharedBatch:
        """The batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, rows=self.rows.to(device), **moved)

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Added to attention scores (B, 1, T, T): 0 where a position sees another one, else the lowest number."""
        query_BT1, key_B1T = self.parts_BT[:, :, None], self.parts_BT[:, None, :]
        earlier_TT = torch.ones(self.length, self.length, dtype=torch.bool, device=self.parts_BT.device).tril()
        seen_BTT = earlier_TT & ((key_B1T == _PREFIX) | (key_B1T == query_BT1))
        mask_BTT = torch.zeros(seen_BTT.shape, dtype=dtype, device=seen_BTT.device)
        return mask_BTT.masked_fill(~seen_BTT, torch.finfo(dtype).min)[:, None]

    def scores(self, logits_BTV: Tensor) -> tuple[Tensor, Tensor]:
        """Score the targets.

        Args:
            logits_BTV: of the positions from ``first_source`` on.

        Returns:
            Negative log likelihood in nats, summed over each target's tokens (P,), fp32, and their number (P,).
        """
        picked_NV = logits_BTV[self.row_N, self.source_N - self.first_source]
        nll_N = F.cross_entropy(picked_NV.float(), self.label_N, reduction="none")
        tokens_P = torch.bincount(self.target_N, minlength=self.targets)
        return nll_N.new_zeros(self.targets).index_add(0, self.target_N, nll_N), tokens_P


_TENSORS = ("parts_BT", "positions_BT", "row_N", "source_N", "label_N", "target_N")


def arranged(rows: Batch, prefixes: Sequence[int], targets: Sequence[Sequence[Sequence[int]]]) -> SharedBatch:
    """Arrange the targets of rows.

    Args:
        rows: each with its prefix, followed by the tokens of all its targets but the last one of each.
        prefixes: the number of positions of each row's prefix.
        targets: the token ids of each row's targets, which have one or more.
    """
    shape = tuple(rows.token_ids_BT.shape)
    parts, positions = np.full(shape, _PADDING), np.zeros(shape, dtype=np.int64)
    found: list[tuple[int, int, int, int]] = []  # row, source, label, target
    number = 0
    for row, (prefix, own) in enumerate(zip(prefixes, targets, strict=True)):
        parts[row, :prefix], positions[row, :prefix] = _PREFIX, np.arange(prefix)
        start = prefix
        for part, ids in enumerate(own, start=1):
            stop = start + len(ids) - 1
            parts[row, start:stop], positions[row, start:stop] = part, prefix + np.arange(stop - start)
            sources = [prefix - 1, *range(start, stop)]
            found += [(row, source, label, number) for source, label in zip(sources, ids, strict=True)]
            start, number = stop, number + 1
    row_N, source_N, label_N, target_N = torch.tensor(found, dtype=torch.int64).T
    unlabelled = replace(rows, labels_BT=torch.full_like(rows.labels_BT, IGNORED), first_label=min(prefixes) - 1)
    return SharedBatch(
        rows=unlabelled,
        parts_BT=torch.from_numpy(parts),
        positions_BT=torch.from_numpy(positions),
        row_N=row_N,
        source_N=source_N,
        label_N=label_N,
        target_N=target_N,
        targets=number,
    )


def fits(config: Any, length: int) -> bool:
    """Whether every position of a row may see all earlier ones, as far as the language model's config says it."""
    text = config.get_text_config()
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return all(not isinstance(window, int) or window <= 0 or length <= window for window in windows)


def agrees(shared_P: Tensor, alone_P: Tensor, dtype: torch.dtype) -> bool:
    """Whether the likelihoods of targets in shared rows are those in rows of their own, up to rounding.

    Args:
        shared_P: in shared rows.
        alone_P: in rows of their own.
        dtype: that the language model computes in.
    """
    if not torch.isfinite(alone_P).all():
        return False
    tolerance = _TOLERANCE.get(dtype, _HALF)
    return torch.allclose(shared_P, alone_P, rtol=tolerance, atol=tolerance)
