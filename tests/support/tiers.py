"""Which of many similar cases are fast tests, and which only run with the slow ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations, product
from typing import Any

import pytest


def some_fast(argument: str, cases: Mapping[str, Any], slow: Collection[str]) -> pytest.MarkDecorator:
    """Every case; those named ``slow`` behave as another one that is fast."""
    assert set(slow) < set(cases)
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in cases}
    return pytest.mark.parametrize(
        argument, [pytest.param(value, id=name, marks=marks[name]) for name, value in cases.items()]
    )


def pairwise(**axes: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Every combination of the axes' values; any two values of two axes meet in a fast one, the others are slow."""
    everything = [tuple(combination) for combination in product(*axes.values())]
    fast = set(_covering(everything))
    return pytest.mark.parametrize(
        tuple(axes),
        [
            pytest.param(
                *(values[name] for values, name in zip(axes.values(), names, strict=True)),
                id="-".join(names),
                marks=[] if names in fast else [pytest.mark.slow],
            )
            for names in everything
        ],
    )


def _covering(everything: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Combinations that hold every pair of values, each time the one with the most new pairs."""
    pairs = {names: set(combinations(enumerate(names), 2)) for names in everything}
    left = set().union(*pairs.values())
    while left:
        best = max(everything, key=lambda names: len(pairs[names] & left))
        left -= pairs[best]
        yield best
