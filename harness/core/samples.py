"""Which test examples are shown: the same few for every trial, drawn blind to the scores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

SHOWN = 8
PREVIEWS = "previews"  # folder of a run: what is shown of its drawn examples' files, beside the column of this name


def draw_ids(ids: Sequence[str], members: Sequence[str], most: int = SHOWN) -> list[str]:
    """The ids with the smallest hash: pseudo-random, reproducible and blind to scores.

    A mixture gets equal shares of its members, at least one example each.

    Args:
        ids: of all examples.
        members: tasks of a mixture, which prefix its ids.
        most: how many are drawn.
    """
    shuffled = sorted(ids, key=lambda example_id: hashlib.sha256(example_id.encode()).digest())
    strata = [[example_id for example_id in shuffled if of_member(member, example_id)] for member in members]
    strata = [stratum for stratum in strata if stratum] or [shuffled]
    taken = [0] * len(strata)
    while sum(taken) < max(most, len(strata)) and sum(taken) < sum(map(len, strata)):
        left = [number for number, stratum in enumerate(strata) if taken[number] < len(stratum)]
        taken[min(left, key=lambda number: taken[number])] += 1
    return [example_id for stratum, count in zip(strata, taken, strict=True) for example_id in stratum[:count]]


def of_member(member: str, example_id: str) -> bool:
    """Whether an example of a mixture is of this task."""
    return example_id.startswith(f"{member}/")
