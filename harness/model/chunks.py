"""The stretches of a row: texts, and what stands at the place of an encoded file; and rows that begin alike.

Shapes: N positions of a stretch, D features of an encoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from harness.core.contexts import Segment
from harness.model.grid_positions import Grid, positions_of
from harness.model.own_encoder import Written
from harness.model.shared_prefix import MOST_TARGETS
from harness.model.tower import Tensors
from tasks.base import Example


@dataclass(frozen=True)
class Chunk:
    """Consecutive positions of one row: a text, or the tokens of one encoded file."""

    context: str
    length: int
    token_ids: Sequence[int] = ()
    features_ND: Tensor | None = None
    is_target: bool = False
    grid: Grid | None = None  # of features, where positions tell it
    tensors: Tensors | None = None  # what the features are, where a tower in the step reads them: of the whole picture
    goes_on: bool = False  # with the features of the chunk before of its context: marks stand within the picture


Item = tuple[Example, list[Chunk], list[int]]  # an example, the chunks of its inputs with BOS, its target with EOS


def chunks_of_picture(context: str, rows_ND: Tensor) -> list[Chunk]:
    """What stands at the place of a vision-language model's picture."""
    written, found = Written.of(rows_ND), list[Chunk]()
    for ids, own_FD in written.runs():
        goes_on = written.tensors is not None and any(chunk.features_ND is not None for chunk in found)
        more = (None, None, False) if own_FD is None else (written.grid, written.tensors, goes_on)
        found.append(Chunk(context, len(ids), ids, own_FD, False, *more))
    return found


def positions_in(chunks: Sequence[Chunk], start: int = 0) -> tuple[np.ndarray, int]:
    """The positions (3, N) of chunks, and the one that follows."""
    return positions_of(((chunk.length, chunk.grid) for chunk in chunks), start)


def common_chunks(row: Sequence[Item]) -> int:
    """How many chunks all inputs of a row begin with."""
    first, *others = (inputs for _, inputs, _ in row)
    common = min(map(len, (first, *others)))
    for other in others:
        common = next((n for n in range(common) if not _same(first[n], other[n])), common)
    return common


def _same(one: Chunk, other: Chunk) -> bool:
    """Whether two chunks have the same content; the features of a file are one tensor in a batch."""
    alike = one.context == other.context and one.features_ND is other.features_ND
    return alike and list(one.token_ids) == list(other.token_ids)


def length_of_row(row: Sequence[Item]) -> int:
    """Positions of a shared row."""
    common = common_chunks(row)
    branches = (sum(chunk.length for chunk in inputs[common:]) + len(target) - 1 for _, inputs, target in row)
    return sum(chunk.length for chunk in row[0][1][:common]) + sum(branches)


def in_rows(group: Sequence[Item]) -> list[list[Item]]:
    """Items with the same leading inputs in rows of about as many targets, up to the most that a row may have."""
    count = -(-len(group) // MOST_TARGETS)
    bounds = [len(group) * n // count for n in range(count + 1)]
    return [list(group[start:stop]) for start, stop in itertools.pairwise(bounds)]


def joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The texts at the end of a row as one chunk, if they have one context: rows then differ in its length alone."""
    last = len(chunks)
    while last and chunks[last - 1].features_ND is None and chunks[last - 1].context == chunks[-1].context:
        last -= 1
    ids = [token for chunk in chunks[last:] for token in chunk.token_ids]
    return [*chunks[:last], Chunk(chunks[-1].context, len(ids), ids, is_target=True)]


def common_segments(rows: Sequence[Sequence[Chunk]], length: int) -> tuple[Segment, ...] | None:
    """The segments that all rows share; None if they differ. Lengths of targets may differ: only padding follows."""
    layouts = {tuple((s.context, None if s.is_target else s.length) for s in row) for row in rows}
    if len(layouts) > 1:
        return None
    segments: list[Segment] = []
    for context, given in layouts.pop():
        start = segments[-1].stop if segments else 0
        segments.append(Segment(start, length if given is None else start + given, context))
    return tuple(segments)
