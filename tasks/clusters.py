"""Which examples share an input, and so are not independent evidence: a split is resampled by these clusters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

from tasks.base import Example


def clusters_of(examples: Sequence[Example]) -> list[str]:
    """The cluster of each example, named by the id of its first one.

    Examples are in one cluster if their ``Example.cluster`` is the same, if a file is an input of both, or if others
    connect them. A file of every example of a task says nothing where the task names clusters itself: it is part of the
    question, like a prompt.

    Args:
        examples: of one split, with unique ids.
    """
    parent = list(range(len(examples)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[Hashable, int] = {}  # a shared thing → the first example that has it
    everywhere = _of_every_example(examples)
    for index, example in enumerate(examples):
        for thing in _shared_things(example):
            if thing not in everywhere:
                one, other = sorted((root(first.setdefault(thing, index)), root(index)))
                parent[other] = one  # the earliest example stays the root
    return [examples[root(index)].id for index in range(len(examples))]


def _shared_things(example: Example) -> Iterator[Hashable]:
    if example.cluster is not None:
        yield "cluster", example.cluster
    for _, path in example.files:
        yield "file", path


def _of_every_example(examples: Sequence[Example]) -> set[Hashable]:
    """The files that are in every example of a task whose examples all name their cluster."""
    total = Counter(example.member for example in examples)
    named = Counter(example.member for example in examples if example.cluster is not None)
    counts = Counter((example.member, path) for example in examples for path in {path for _, path in example.files})
    return {
        ("file", path)
        for (member, path), count in counts.items()
        if count == total[member] == named[member] and count > 1
    }
