"""Selects the training examples of a trial and their order, which depend only on the seed.

Subsets are nested: a larger budget of the same seed contains all examples of a smaller one. For a given seed, all
methods see the same examples in the same order with the same references; fingerprints verify this. The tasks of a
mixture get their shares of the examples and of every epoch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from harness.core.errors import UserError
from harness.model import buckets
from harness.model.workers import Workers
from tasks.base import Example
from tasks.parsed import ParsedExamples

References = Literal["one", "all", "grouped"]
_BATCHES = 1 << 62  # of the seeds of the order of batches, apart from those of the items of an epoch
Leading = tuple[str, str, tuple[tuple[str, str], ...]]  # a member, a target context, and contexts with their inputs
Shares = Mapping[str, float]  # task (member) of a mixture → its share; they sum to 1


class Lengths(Protocol):
    """Tells how long rows are."""

    def count(self, tick: Callable[[], None]) -> None:
        """Look at all inputs; afterwards calls are quick."""

    def __call__(self, example: int, reference: int) -> int:
        """Positions of the row of an example and one of its references, by their indices."""


def _rank(seed: int, example_id: str) -> bytes:
    return hashlib.sha256(f"{seed}:{example_id}".encode()).digest()


def by_member(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Member → indices of its examples. A task that is not a mixture has one member, ""."""
    indices: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        indices.setdefault(example.member, []).append(index)
    return indices


def choose(
    examples: Sequence[Example], count: int | Literal["all"], seed: int, what: str, shares: Shares | None = None
) -> list[Example]:
    """Select the first ``count`` examples in an order that depends only on the seed and the ids.

    Args:
        examples: of a split, with unique ids.
        count: number of examples, or "all".
        seed: of the order.
        what: key and task for the message, such as ``budget.examples: task coco_captions``.
        shares: of the members; None: in proportion to their examples.

    Raises:
        UserError: ``count`` is larger than the split, or a member has fewer examples than its share.
    """
    order = _ranked(examples, seed)
    if count == "all":
        return [examples[i] for i in order]
    if count > len(examples):
        raise UserError(
            f"{what}: requests {count:,} examples, but there are {len(examples):,}; allowed: at most {len(examples):,}"
        )
    members = examples.members if isinstance(examples, ParsedExamples) else [example.member for example in examples]
    indices: dict[str, list[int]] = {}
    for place, index in enumerate(order):
        indices.setdefault(members[index], []).append(place)
    shares = shares or {member: len(own) / len(order) for member, own in indices.items()}
    wanted = apportion(count, shares)
    for member, number in wanted.items():
        if number > len(indices.get(member, ())):
            found = len(indices.get(member, ()))
            raise UserError(f"{what}: {number:,} of {count:,} examples would come from {member!r}, which has {found:,}")
    return [examples[order[i]] for i in sorted(i for member, own in wanted.items() for i in indices[member][:own])]


def _ranked(examples: Sequence[Example], seed: int) -> list[int]:
    """Indices in an order that depends only on the seed and the ids."""
    ids = examples.ids if isinstance(examples, ParsedExamples) else [example.id for example in examples]
    return sorted(range(len(ids)), key=lambda i: _rank(seed, ids[i]))


def leading_inputs(example: Example) -> Leading:
    """What items of several examples may have in common: the inputs up to the last file (a picture with questions).

    Without a file it is the example itself.
    """
    last = max((n for n, (_, value) in enumerate(example.inputs) if isinstance(value, Path)), default=-1)
    own = tuple((context, str(value)) for context, value in example.inputs[: last + 1])
    return (example.member, example.target or "", own or ((example.id, ""),))


def apportion(count: int, shares: Shares) -> dict[str, int]:
    """Divide ``count`` by shares (Webster's method), so that no member's number decreases when ``count`` grows."""
    claims = [
        ((number + 0.5) / share, member)
        for member, share in sorted(shares.items())
        if share > 0
        for number in range(math.ceil(count * share) + 1)
    ]
    given = [member for _, member in sorted(claims)[:count]]
    return {member: given.count(member) for member in shares}


@dataclass(frozen=True)
class Draw:
    """One training item: an example, and the reference that is its target."""

    example: int  # index into the examples of the budget
    reference: int  # index into the references of the example
    view: int  # seed of the augmentation


@dataclass(frozen=True)
class Order:
    """The order of training items, the same for all methods with the same seed.

    Args:
        examples: of the budget.
        seed: of the trial.
        references: "one": each example with a random one of its references in each epoch; "all": with each of them;
            "grouped": with each of them, those of the same inputs one after another and with one view of their files.
        shares: of the members in every epoch; None: each example once.
        length_of: of rows: batches are of similar lengths and about as many positions each, see buckets.py; None:
            batches of equal numbers of items, in order.
    """

    examples: Sequence[Example]
    seed: int
    references: References = "one"
    shares: Shares | None = None
    length_of: Lengths | None = None

    @property
    def draws(self) -> int:
        """Number of training items in an epoch."""
        return len(self._pool())

    def epoch(self, epoch: int) -> list[Draw]:
        """The items of an epoch (from 1), shuffled."""
        return [draw for unit in self._units(epoch) for draw in unit]

    def batches(self, epoch: int, size: int) -> list[list[Draw]]:
        """The batches of an epoch (from 1), in order; their number does not depend on lengths.

        Args:
            epoch: its number.
            size: items of a batch; where batches are of similar lengths, on average.
        """
        if self.length_of is None:
            draws = self.epoch(epoch)
            return [draws[start : start + size] for start in range(0, len(draws), size)]
        units = self._units(epoch)
        longest = [max(self.length_of(draw.example, draw.reference) for draw in unit) for unit in units]
        found: list[tuple[int, list[Draw]]] = []
        before = 0
        for stretch in buckets.stretches([len(unit) for unit in units], size):
            by_length = sorted(stretch, key=lambda number: -longest[number])
            draws = [draw for number in by_length for draw in units[number]]
            lengths = [longest[number] for number in by_length for _ in units[number]]
            count = -(-(before + len(draws)) // size) - -(-before // size)
            cut = buckets.cuts(lengths, count)
            found += [(buckets.positions(lengths, own), draws[own.start : own.stop]) for own in cut]
            before += len(draws)
        generator = np.random.Generator(np.random.Philox(key=[self.seed, _BATCHES + epoch]))
        order = [int(number) for number in generator.permutation(len(found))]
        # The largest one first, as in transformers: what does not fit into memory fails at once.
        first = max(range(len(order)), key=lambda place: found[order[place]][0])
        order[0], order[first] = order[first], order[0]
        return [found[number][1] for number in order]

    def _units(self, epoch: int) -> list[list[Draw]]:
        """The items of an epoch, shuffled: those that follow one another because of their inputs, or each alone."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        if self.references == "grouped":
            blocks = self._blocks(epoch)
            return [blocks[number] for number in generator.permutation(len(blocks))]
        items = self._shared(epoch)
        order, picks = generator.permutation(len(items)), generator.random(len(items))
        return [[self._draw(items[i], float(picks[i]), epoch)] for i in order]

    @property
    def repeats_inputs(self) -> bool:
        """Whether two items of an epoch may have the same inputs, at least at their beginning."""
        if self.references != "one" or self.shares is not None:
            return True
        return len({leading_inputs(example) for example in self.examples}) < len(self.examples)

    def share(self, draws: Sequence[Draw], workers: Workers) -> Sequence[Draw]:
        """A worker's items of a batch: those that follow one another because of their inputs stay together."""
        return workers.block(draws) if self.references == "grouped" else workers.share(draws)

    def _blocks(self, epoch: int) -> list[list[Draw]]:
        """The items of the same inputs, each member's repeated or subsampled to its share."""
        found: dict[str, dict[Leading, list[tuple[int, int]]]] = {}
        for index, example in enumerate(self.examples):
            block = found.setdefault(example.member, {}).setdefault(leading_inputs(example), [])
            block += [(index, n) for n in range(len(example.references))]
        own = {member: list(blocks.values()) for member, blocks in found.items()}
        chosen = []
        if self.shares is None:
            chosen = [block for blocks in own.values() for block in blocks]
        else:
            wanted = apportion(self.draws, self.shares)
            for number, (member, count) in enumerate(sorted(wanted.items())):
                whole, rest = divmod(count, sum(map(len, own[member])))
                chosen += own[member] * whole
                generator = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 16) + number + 1]))
                for picked in generator.permutation(len(own[member])):
                    if rest <= 0:
                        break
                    chosen.append(own[member][picked][:rest])
                    rest -= len(own[member][picked])
        return [self._block(block, epoch) for block in chosen]

    def _block(self, items: Sequence[tuple[int, int]], epoch: int) -> list[Draw]:
        view = self._view(f"{self.seed}:{epoch}:{self.examples[items[0][0]].id}")
        return [Draw(index, number, view) for index, number in items]

    def _pool(self) -> list[tuple[int, int | None]]:
        if self.references == "one":
            return [(i, None) for i in range(len(self.examples))]
        return [(i, n) for i, example in enumerate(self.examples) for n in range(len(example.references))]

    def _shared(self, epoch: int) -> list[tuple[int, int | None]]:
        """The pool, with each member repeated or subsampled to its share."""
        pool = self._pool()
        if self.shares is None:
            return pool
        own: dict[str, list[tuple[int, int | None]]] = {}
        for item in pool:
            own.setdefault(self.examples[item[0]].member, []).append(item)
        shared = []
        for number, (member, wanted) in enumerate(sorted(apportion(len(pool), self.shares).items())):
            whole, rest = divmod(wanted, len(own[member]))
            generator = np.random.Generator(np.random.Philox(key=[self.seed, (epoch << 16) + number + 1]))
            picked = generator.permutation(len(own[member]))[:rest]
            shared += own[member] * whole + [own[member][i] for i in sorted(picked)]
        return shared

    def _draw(self, item: tuple[int, int | None], pick: float, epoch: int) -> Draw:
        index, reference = item
        example = self.examples[index]
        number = int(pick * len(example.references)) if reference is None else reference
        return Draw(index, number, self._view(f"{self.seed}:{epoch}:{example.id}:{number}"))

    @staticmethod
    def _view(of: str) -> int:
        return int.from_bytes(hashlib.sha256(of.encode()).digest()[:8])

    def fingerprint(self, epochs: int, batch_size: int) -> str:
        """SHA-256 of the training order: batch size, then example id and reference of every item of every epoch.

        Batches of similar lengths have different numbers of items, so where each ends is part of it too.
        """
        digest = hashlib.sha256(f"batch {batch_size}\n".encode())
        for epoch in range(1, epochs + 1):
            for batch in self.batches(epoch, batch_size):
                for draw in batch:
                    digest.update(f"{epoch}:{self.examples[draw.example].id}:{draw.reference}\n".encode())
                if self.length_of is not None:
                    digest.update(b"end of batch\n")
        return digest.hexdigest()


def content_fingerprint(examples: Sequence[Example], digest_of: Callable[[Path], str]) -> str:
    """SHA-256 of the ids, inputs (for files, their digests) and references; independent of the examples' order.

    Args:
        examples: any set of examples with unique ids.
        digest_of: returns the digest of an input file's content.
    """
    digest = hashlib.sha256()
    for example in sorted(examples, key=lambda e: e.id):
        inputs = [f"{c}={digest_of(v) if isinstance(v, Path) else 'text ' + v}" for c, v in example.inputs]
        for part in (example.id, *inputs, *example.references):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(b"\n")
    return digest.hexdigest()
