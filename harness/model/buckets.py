"""Batches of rows of similar lengths: few positions are padding, and every batch has about as many positions.

As in transformers' ``group_by_length``, shuffled items are sorted by length within stretches of some batches. A batch
then takes as many of them as make the same number of positions, so that short rows come in larger batches; there are as
many batches as if all had the same number of rows, so steps and schedules stay.
"""

from __future__ import annotations

from collections.abc import Sequence

_MOST_BATCHES = 50  # of a stretch, and at least four stretches, as in transformers' get_length_grouped_indices
_LEAST_STRETCHES = 4


def stretches(counts: Sequence[int], size: int) -> list[range]:
    """Divide shuffled units into stretches, within which they are sorted.

    Args:
        counts: training items of each unit, which stays together as far as batches allow it.
        size: mean number of items of a batch.

    Returns:
        Ranges of units; each has at least ``size`` items, if there are as many.
    """
    wanted = size * max(1, min(sum(counts) // (size * _LEAST_STRETCHES), _MOST_BATCHES))
    found, start, items = list[range](), 0, 0
    for number, count in enumerate(counts):
        items += count
        if items >= wanted:
            found.append(range(start, number + 1))
            start, items = number + 1, 0
    if start < len(counts):
        if found and items < size:
            start = found.pop().start
        found.append(range(start, len(counts)))
    return found


def cuts(lengths: Sequence[int], count: int) -> list[range]:
    """Cut rows into batches such that the largest has as few positions as possible.

    Args:
        lengths: positions of each row, from the longest to the shortest.
        count: of the batches, at most that of the rows.

    Returns:
        Consecutive ranges of rows.
    """
    least, most = lengths[0], lengths[0] * len(lengths)
    while least < most:
        middle = (least + most) // 2
        if len(_filled(lengths, middle)) <= count:
            most = middle
        else:
            least = middle + 1
    found = _filled(lengths, most)
    while len(found) < count:
        number = max((n for n, own in enumerate(found) if len(own) > 1), key=lambda n: positions(lengths, found[n]))
        own = found[number]
        half = own.start + (len(own) + 1) // 2
        found[number : number + 1] = [range(own.start, half), range(half, own.stop)]
    return found


def positions(lengths: Sequence[int], batch: range) -> int:
    """Positions of a batch with its padding."""
    return lengths[batch.start] * len(batch)


def _filled(lengths: Sequence[int], most: int) -> list[range]:
    """Batches of as many rows as ``most`` positions hold, and at least one."""
    found, start = list[range](), 0
    while start < len(lengths):
        stop = min(len(lengths), start + max(1, most // lengths[start]))
        found.append(range(start, stop))
        start = stop
    return found
