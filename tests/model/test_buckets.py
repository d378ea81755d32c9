"""Batches of similar lengths: all rows once, few padding, about as many positions in each, the same for any workers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from harness.model import buckets
from harness.model.budget import Draw, Order
from harness.model.workers import Workers
from tasks.base import Example

pytestmark = pytest.mark.quick

SIZE = 16


@dataclass
class Made:
    """Made-up lengths."""

    of: list[list[int]]
    asked: set[tuple[int, int]] = field(default_factory=set)

    def count(self, _tick: object) -> None:
        raise AssertionError("batches ask for single lengths")

    def __call__(self, example: int, reference: int) -> int:
        self.asked.add((example, reference))
        return self.of[example][reference]


def made(count: int, references: int = 5) -> tuple[list[Example], Made]:
    lengths = np.random.default_rng(0).integers(20, 200, size=(count, references)).tolist()
    return [Example(f"{n:04d}", (), ("",) * references) for n in range(count)], Made(lengths)


def padded(lengths: Made, batch: list[Draw]) -> int:
    return len(batch) * max(lengths(draw.example, draw.reference) for draw in batch)


def fewest(lengths: list[int], count: int) -> int:
    """Positions of the largest of ``count`` batches of consecutive rows, by trying all ways."""
    ways = itertools.combinations(range(1, len(lengths)), count - 1)
    return min(
        max(lengths[start] * (stop - start) for start, stop in itertools.pairwise([0, *way, len(lengths)]))
        for way in ways
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_the_largest_batch_is_as_small_as_any_cuts_make_it(seed: int, count: int) -> None:
    drawn = np.random.default_rng(seed).integers(1, 60, size=9).tolist()
    lengths = sorted(drawn, reverse=True)
    found = buckets.cuts(lengths, count)
    assert len(found) == count
    assert [n for own in found for n in own] == list(range(9))
    assert max(buckets.positions(lengths, own) for own in found) == fewest(lengths, count)


def test_rows_of_one_length_make_batches_of_one_size() -> None:
    assert {len(own) for own in buckets.cuts([30] * 64, 4)} == {16}


@pytest.mark.parametrize("references", ["one", "all", "grouped"])
@pytest.mark.parametrize("count", [3, 16, 100, 257])
def test_an_epoch_has_the_same_items_in_as_many_batches(references: str, count: int) -> None:
    examples, lengths = made(count)
    plain = Order(examples, 3, references)  # type: ignore[arg-type]
    by_length = Order(examples, 3, references, length_of=lengths)  # type: ignore[arg-type]
    for epoch in (1, 2):
        expected, found = plain.batches(epoch, SIZE), by_length.batches(epoch, SIZE)
        assert [d for batch in expected for d in batch] == plain.epoch(epoch)
        assert len(found) == len(expected) == -(-plain.draws // SIZE)
        assert all(found)

        def key(draw: Draw) -> tuple[int, int, int]:
            return draw.example, draw.reference, draw.view

        assert sorted((d for b in found for d in b), key=key) == sorted((d for b in expected for d in b), key=key)
    assert by_length.batches(1, SIZE) == Order(examples, 3, references, length_of=lengths).batches(1, SIZE)  # type: ignore[arg-type]
    assert count < SIZE or by_length.batches(1, SIZE) != by_length.batches(2, SIZE)


def test_batches_have_about_as_many_positions_and_few_are_padding() -> None:
    examples, lengths = made(3000)
    plain = Order(examples, 0).batches(1, SIZE)
    found = Order(examples, 0, length_of=lengths).batches(1, SIZE)
    real = sum(lengths(d.example, d.reference) for batch in found for d in batch)
    sizes = np.array([padded(lengths, batch) for batch in found])
    assert real == sum(lengths(d.example, d.reference) for batch in plain for d in batch)
    assert sum(padded(lengths, batch) for batch in plain) > 1.6 * real
    assert sizes.sum() < 1.06 * real
    assert np.quantile(sizes, 0.05) > 0.85 * sizes.max()
    assert sizes[0] == sizes.max()
    rows = [len(batch) for batch in found]
    assert min(rows) < SIZE < max(rows)
    longest = np.array([max(lengths(d.example, d.reference) for d in batch) for batch in found])
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2  # long and short ones are mixed in time


def test_references_of_an_example_stay_together_but_where_a_batch_ends() -> None:
    examples, lengths = made(200)
    found = Order(examples, 0, "grouped", length_of=lengths).batches(1, 20)
    whole = sum(len(list(run)) == 5 for batch in found for _, run in itertools.groupby(batch, lambda d: d.example))
    assert whole >= 200 - 2 * len(found)


def test_workers_have_the_batches_of_one_between_them() -> None:
    examples, lengths = made(300)
    order = Order(examples, 0, length_of=lengths)
    for batch in order.batches(1, SIZE):
        shares = [order.share(batch, Workers(rank, 2)) for rank in (0, 1)]
        assert sorted(d.example for own in shares for d in own) == sorted(d.example for d in batch)


def test_the_fingerprint_is_that_of_the_batches() -> None:
    examples, lengths = made(300)
    prints = {
        "random": Order(examples, 0).fingerprint(2, SIZE),
        "by length": Order(examples, 0, length_of=lengths).fingerprint(2, SIZE),
        "larger": Order(examples, 0, length_of=lengths).fingerprint(2, 2 * SIZE),
        "other lengths": Order(examples, 0, length_of=made(300, 5)[1].__class__([[9] * 5] * 300)).fingerprint(2, SIZE),
    }
    assert len(set(prints.values())) == 4
    assert prints["by length"] == Order(examples, 0, length_of=made(300)[1]).fingerprint(2, SIZE)


def test_only_what_is_drawn_is_measured() -> None:
    examples, lengths = made(64)
    draws = [d for batch in Order(examples, 0, length_of=lengths).batches(1, SIZE) for d in batch]
    assert lengths.asked == {(d.example, d.reference) for d in draws}
