"""The prompts of examples, read once by a model whose weights stay: for generation, scoring and wrong inputs.

Prompts that begin with the same files (questions about one picture, turns of one conversation) go on from the same
beginning, which is read once too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch

from harness.model.batches import BatchMaker
from harness.model.budget import leading_inputs
from harness.model.context_model import ContextModel
from harness.model.past import Past, Prefix
from tasks.base import Example

KEPT_BYTES = 1 << 28  # of keys and values that stay from one pass over the examples for the next


class Prefixes:
    """Reads prompts, and keeps them until there are ``KEPT_BYTES`` of them.

    Args:
        model: in evaluation mode; its weights do not change as long as this lives.
        batches: makes its batches.
        device: of the model.
        size: rows of a batch.
    """

    def __init__(self, model: ContextModel, batches: BatchMaker, device: torch.device, size: int) -> None:
        self._model, self._batches, self._device, self._size = model, batches, device, size
        self._kept: dict[Hashable, Prefix] = {}
        self._bytes = self._largest = 0

    @property
    def at_once(self) -> int:
        """How many prompts there may be at a time: those of a batch, and more where it is known that they are small."""
        return max(self._size, KEPT_BYTES // self._largest) if self._largest else self._size

    def of(self, examples: Sequence[Example]) -> list[Prefix]:
        """The prompts of examples; those that are not kept are read.

        Raises:
            ValueError: the model's cache does not have the positions that it has read.
        """
        found = {key: self._kept[key] for key in map(_prompt, examples) if key in self._kept}
        missing = {_prompt(example): example for example in examples if _prompt(example) not in found}
        first: dict[Hashable, Example] = {}
        several = dict[Hashable, Example]()
        for example in missing.values():
            key = _beginning(example)
            if key in first and key not in self._kept:
                several[key] = first[key]
            first.setdefault(key, example)
        begun = {key: self._kept[key] for key in first if key in self._kept}
        begun |= self._read(several, {}, begins=True)
        for from_begun in (False, True):
            some = {k: e for k, e in missing.items() if (_beginning(e) in begun and _goes_on(e)) is from_begun}
            found |= self._read(some, begun if from_begun else {}, begins=False)
        return [found[_prompt(example)] for example in examples]

    def _read(
        self, wanted: dict[Hashable, Example], begun: dict[Hashable, Prefix], begins: bool
    ) -> dict[Hashable, Prefix]:
        found: dict[Hashable, Prefix] = {}
        order = sorted(wanted, key=lambda key: self._batches.prompt_length(wanted[key]))  # padding is computed too
        for start in range(0, len(order), self._size):
            keys = order[start : start + self._size]
            examples = [wanted[key] for key in keys]
            counts = [_leading(example) for example in examples]
            rows = self._batches.prompt_rows(examples)
            past = None
            if begins:
                rows = [row[: 1 + count] for row, count in zip(rows, counts, strict=True)]
            elif begun:
                rows = [row[1 + count :] for row, count in zip(rows, counts, strict=True)]
                targets = self._batches.contexts.index(self._batches.target_context(examples[0]))
                past = Past([begun[_beginning(example)] for example in examples], again=False, padding=targets)
            batch = self._batches.of_rows(rows, examples, past).to(self._device)
            for key, prefix in zip(keys, self._model.read(batch, past), strict=True):
                found[key] = prefix
                self._largest = max(self._largest, prefix.size_bytes)
                if self._bytes < KEPT_BYTES:
                    self._kept[key] = prefix
                    self._bytes += prefix.size_bytes
        return found


def _prompt(example: Example) -> Hashable:
    return (example.member, example.target, _strings(example.inputs))


def _beginning(example: Example) -> Hashable:
    return ("begins", *leading_inputs(example))


def _strings(inputs: Iterable[tuple[str, object]]) -> tuple[tuple[str, str], ...]:
    return tuple((context, str(value)) for context, value in inputs)


def _leading(example: Example) -> int:
    """How many inputs there are up to the last file."""
    return len(leading_inputs(example)[2]) if example.files else 0


def _goes_on(example: Example) -> bool:
    """Whether the prompt begins with files, and something follows."""
    return 0 < _leading(example) < len(example.inputs)
