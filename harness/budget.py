"""Data budgets: which training examples a trial sees, and in which order, by seed alone.

Subsets are nested: the examples of a smaller budget are all in a larger one of the same seed. The same seed gives every
method the same examples in the same order with the same reference text, and the fingerprints prove it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from harness.errors import UserError
from tasks.base import Example


def _rank(seed: int, example_id: str) -> bytes:
    return hashlib.sha256(f"{seed}:{example_id}".encode()).digest()


def choose(examples: Sequence[Example], count: int | Literal["all"], seed: int, what: str) -> list[Example]:
    """The first ``count`` examples in an order that depends on the seed and the ids alone.

    Args:
        examples: all there are, ids unique.
        count: how many, or "all".
        seed: of the subset.
        what: key path and file for the message, such as ``budget.examples of task coco_captions``.

    Raises:
        UserError: more are asked for than there are.
    """
    if count == "all":
        count = len(examples)
    if count > len(examples):
        raise UserError(
            f"{what}: asks for {count:,} examples, there are {len(examples):,}; ask for at most {len(examples):,}"
        )
    return sorted(examples, key=lambda example: _rank(seed, example.id))[:count]


@dataclass(frozen=True)
class Draw:
    """One training item: an example and which of its references is the target."""

    example: int  # index into the budget's examples
    reference: int


def epoch_order(examples: Sequence[Example], seed: int, epoch: int) -> list[Draw]:
    """The order of one epoch (from 1): every example once, each with one of its references."""
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    order = generator.permutation(len(examples))
    picks = generator.random(len(examples))
    return [Draw(int(i), int(picks[i] * len(examples[i].references))) for i in order]


def content_fingerprint(examples: Sequence[Example], digest_of: Callable[[Path], str]) -> str:
    """SHA-256 over ids, the inputs' digests, and references, whatever the examples' order.

    Args:
        examples: of a split, or a budget.
        digest_of: input file → digest of its content.
    """
    digest = hashlib.sha256()
    for example in sorted(examples, key=lambda e: e.id):
        files = [f"{context}={digest_of(path)}" for context, path in sorted(example.inputs.items())]
        for part in (example.id, *files, *example.references):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
        digest.update(b"\n")
    return digest.hexdigest()


def order_fingerprint(examples: Sequence[Example], seed: int, epochs: int, batch_size: int) -> str:
    """SHA-256 over what every optimizer step sees: batch size, then example id and reference number, epoch by epoch."""
    digest = hashlib.sha256(f"batch {batch_size}\n".encode())
    for epoch in range(1, epochs + 1):
        for draw in epoch_order(examples, seed, epoch):
            digest.update(f"{epoch}:{examples[draw.example].id}:{draw.reference}\n".encode())
    return digest.hexdigest()
