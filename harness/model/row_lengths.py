"""How many positions the row of each training item takes, before any batch is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.model.batches import BatchMaker
from tasks.base import Example

_AT_ONCE = 64  # examples whose files are looked at together


class RowLengths:
    """The lengths of rows: their frame, encoded files and texts, and a target with EOS.

    They are the same on all machines and for any number of workers. A file that is augmented counts as it is without
    augmentation; its features and those that are not kept are computed once more for their number.

    Args:
        batches: makes the batches.
        examples: of the budget.
    """

    def __init__(self, batches: BatchMaker, examples: Sequence[Example]) -> None:
        self._batches, self._examples = batches, examples
        self._inputs: list[int] | None = None  # positions before each example's target

    def count(self, tick: Callable[[], None] = lambda: None) -> None:
        """Look at the inputs of all examples, once.

        Args:
            tick: called after every few of them.
        """
        if self._inputs is not None:
            return
        found: list[int] = []
        for start in range(0, len(self._examples), _AT_ONCE):
            found += self._batches.input_lengths(self._examples[start : start + _AT_ONCE])
            tick()
        self._inputs = found

    def __call__(self, example: int, reference: int) -> int:
        """Positions of the row of an example and one of its references, by their indices."""
        self.count()
        assert self._inputs is not None  # noqa: S101 - counted
        return self._inputs[example] + self._batches.target_positions(self._examples[example].references[reference])
