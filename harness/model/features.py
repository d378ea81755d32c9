"""What the language model sees of a file: the frozen encoder's output, computed once per trial and kept in memory.

Without augmentation a frozen encoder gives the same output in every epoch and for each of an example's references, so
nothing is lost by encoding a file once; past ``CACHE_BYTES`` files are encoded again each time. What a task augments is
encoded anew for every training draw. Shapes: N tokens of an item, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.base import Example, Modality, Task
from tasks.encoder import Encoder

CACHE_BYTES = 1 << 30
BATCH_SIZE = 64  # files encoded at a time


@dataclass(frozen=True)
class _Wanted:
    """One file of one example; ``view``: the seed of its augmentation, None: as it is."""

    member: str
    context: str
    path: Path
    view: int | None


class Features:
    """Encoder outputs of a task's examples.

    Args:
        task: says which modality reads a context, and augments.
        modalities: by registry name; they read the files.
        encoders: by the modality's name; frozen, they know their own preprocessing.
        device: where the encoders run; what is kept lies in main memory.
    """

    def __init__(
        self,
        task: Task,
        modalities: Mapping[str, Modality],
        encoders: Mapping[str, Encoder],
        device: torch.device,
    ) -> None:
        self.task, self.modalities = task, modalities
        self._members = task.members()
        self.encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
        self._kept: dict[tuple[str, Path], Tensor] = {}
        self._bytes = 0

    def width(self, context: str) -> int:
        """Of the features of a context."""
        return self.encoders[self.task.modalities[context]].width

    def of(self, examples: Sequence[Example], views: Sequence[int] | None = None) -> list[list[Tensor]]:
        """For each example the features (N, D) of its files in order, in main memory.

        Args:
            examples: any.
            views: for training, one seed for each example's augmentation; None: nothing is augmented.
        """
        wanted = [
            [
                _Wanted(example.member, context, path, view if self._augments(example, context) else None)
                for context, path in example.files
            ]
            for example, view in zip(examples, views or itertools.repeat(None), strict=False)
        ]
        rows = self._rows([want for wants in wanted for want in wants])
        return [[rows[want] for want in wants] for wants in wanted]

    def keep(self, train: Sequence[Example], evaluation: Sequence[Example], tick: Callable[[], None]) -> None:
        """Encode ahead of use as many examples as fit into memory; ``tick`` is called after every batch."""
        once = [e for e in train if not any(self._augments(e, context) for context, _ in e.files)]
        examples = [*once, *evaluation]
        for start in range(0, len(examples), BATCH_SIZE):
            if self._bytes >= CACHE_BYTES:
                return
            self.of(examples[start : start + BATCH_SIZE])
            tick()

    def _rows(self, wanted: Sequence[_Wanted]) -> dict[_Wanted, Tensor]:
        rows: dict[_Wanted, Tensor] = {}
        missing: dict[str, dict[_Wanted, None]] = {}
        for want in wanted:
            modality = self.task.modalities[want.context]
            if want.view is None and (modality, want.path) in self._kept:
                rows[want] = self._kept[modality, want.path]
            else:
                missing.setdefault(modality, {})[want] = None
        for modality, wants in missing.items():
            todo = list(wants)
            for start in range(0, len(todo), BATCH_SIZE):
                part = todo[start : start + BATCH_SIZE]
                for want, x_ND in zip(part, self._encode(modality, part), strict=True):
                    rows[want] = x_ND
                    self._keep(modality, want, x_ND)
        return rows

    def _keep(self, modality: str, want: _Wanted, x_ND: Tensor) -> None:
        if want.view is None and self._bytes < CACHE_BYTES and (modality, want.path) not in self._kept:
            self._kept[modality, want.path] = x_ND
            self._bytes += x_ND.nbytes

    @torch.no_grad()
    def _encode(self, modality: str, wants: Sequence[_Wanted]) -> list[Tensor]:
        items = [self._load(modality, want) for want in wants]
        # Cloned: a row of the batch would keep the whole batch in memory.
        return [x_ND.cpu().clone() for x_ND in self.encoders[modality].encode(items)]

    def _load(self, modality: str, want: _Wanted) -> Any:
        item = self.modalities[modality].load(want.path)
        if want.view is None:
            return item
        rng = np.random.Generator(np.random.Philox(key=want.view))
        return self._members[want.member].augment(want.context, item, rng)

    def _augments(self, example: Example, context: str) -> bool:
        return context in self._members[example.member].augmented
