"""Computes the encoder features of input files, once per trial, and caches them in memory; a worker keeps them longer.

Without augmentation, a frozen encoder gives the same output in every epoch and for every reference, so a file is
encoded once; beyond ``CACHE_BYTES``, files are encoded again each time. Augmented inputs are encoded for every training
item. Shapes: N tokens of an item, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.core.origin import during
from harness.model.checks import check_features, check_finite
from harness.model.inputs import stamp
from harness.model.kept import Kept, Key
from harness.model.workers import ALONE, Workers
from tasks.base import Example, Modality, Task
from tasks.encoder import Encoder

CACHE_BYTES = 1 << 30
BATCH_SIZE = 64  # files per encoder call


@dataclass(frozen=True)
class _Wanted:
    """A file of an example; ``view`` is the seed of its augmentation, None for no augmentation."""

    member: str
    context: str
    path: Path
    view: int | None
    example: str = field(compare=False)  # id, for messages: several examples may share a file


class Features:
    """Encoder features of a task's examples.

    Args:
        task: for the modality of each context, and for augmentation.
        modalities: by registry name; they read the files.
        encoders: frozen encoders by modality, with their preprocessing.
        device: of the encoders; the cache is in main memory.
        kept: what this process keeps from one trial for the next.
        keys: for each modality what its features depend on, besides the files; None: they are not kept.
    """

    def __init__(
        self,
        task: Task,
        modalities: Mapping[str, Modality],
        encoders: Mapping[str, Encoder],
        device: torch.device,
        kept: Kept | None = None,
        keys: Mapping[str, Key | None] = MappingProxyType({}),
    ) -> None:
        self.task, self.modalities = task, modalities
        self._kept, self._keys = kept or Kept(0), keys
        self._members = task.members()
        self.encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
        self._cache: dict[tuple[str, Path], Tensor] = {}
        self._bytes = 0

    def width(self, context: str) -> int:
        """Width D of the features of a context."""
        return self.encoders[self.task.modalities[context]].width

    def of(self, examples: Sequence[Example], views: Sequence[int] | None = None) -> list[list[Tensor]]:
        """The features (N, D) of each example's files, in order, in main memory.

        Args:
            examples: of the task.
            views: for training, the seed of each example's augmentation; None: no augmentation.
        """
        wanted = self._wanted(examples, views)
        rows = self._rows([want for wants in wanted for want in wants])
        return [[rows[want] for want in wants] for wants in wanted]

    def augments(self, example: Example) -> bool:
        """Whether a file of the example is augmented in training, so that its features depend on the view."""
        return any(self._augments(example, context) for context, _ in example.files)

    def _wanted(self, examples: Sequence[Example], views: Sequence[int] | None = None) -> list[list[_Wanted]]:
        return [
            [
                _Wanted(example.member, context, path, view if self._augments(example, context) else None, example.id)
                for context, path in example.files
            ]
            for example, view in zip(examples, views or itertools.repeat(None), strict=False)
        ]

    def precompute(
        self,
        train: Sequence[Example],
        evaluation: Sequence[Example],
        tick: Callable[[], None],
        workers: Workers = ALONE,
    ) -> None:
        """Encode examples before training until the cache is full.

        Args:
            train: of the budget; those that are augmented are left out.
            evaluation: of the other splits.
            tick: called after every batch.
            workers: each encodes its share of the batches and gives the others what it found.
        """
        once = [e for e in train if not self.augments(e)]
        examples = [*once, *evaluation]
        for first in range(0, len(examples), BATCH_SIZE * workers.count):
            if self._bytes >= CACHE_BYTES:
                return
            start, known = first + BATCH_SIZE * workers.rank, len(self._cache)
            self._rows([want for wants in self._wanted(examples[start : start + BATCH_SIZE]) for want in wants], True)
            new = list(itertools.islice(self._cache.items(), known, None))
            for found in workers.gather(new):
                for key, x_ND in found:
                    self._store(key, x_ND)
            tick()

    def _rows(self, wanted: Sequence[_Wanted], keep: bool = False) -> dict[_Wanted, Tensor]:
        rows: dict[_Wanted, Tensor] = {}
        missing: dict[str, dict[_Wanted, None]] = {}
        for want in wanted:
            modality = self.task.modalities[want.context]
            if want.view is None and (modality, want.path) in self._cache:
                rows[want] = self._cache[modality, want.path]
            else:
                missing.setdefault(modality, {})[want] = None
        for modality, wants in missing.items():
            todo = list(wants)
            for start in range(0, len(todo), BATCH_SIZE):
                part = todo[start : start + BATCH_SIZE]
                found = self._known(modality, part) if keep else self._encode(modality, part)
                for want, x_ND in zip(part, found, strict=True):
                    rows[want] = x_ND
                    if want.view is None:
                        self._store((modality, want.path), x_ND)
        return rows

    def _store(self, key: tuple[str, Path], x_ND: Tensor) -> None:
        if self._bytes < CACHE_BYTES and key not in self._cache:
            self._cache[key] = x_ND
            self._bytes += x_ND.nbytes

    def _known(self, modality: str, wants: Sequence[_Wanted]) -> list[Tensor]:
        """Features of files without augmentation, maybe of an earlier trial: only of the same batch, where rounding is
        the same.
        """
        key = self._keys.get(modality)
        try:
            files = tuple((str(want.path), *stamp(want.path)) for want in wants)
        except OSError:  # decoding says more about a file that cannot be read
            key = None
        if key is None:
            return self._encode(modality, wants)
        return self._kept.of(
            ("features", key, files),
            lambda: self._encode(modality, wants),
            lambda rows: sum(x_ND.nbytes for x_ND in rows),
        )

    @torch.no_grad()
    def _encode(self, modality: str, wants: Sequence[_Wanted]) -> list[Tensor]:
        items = [self._load(modality, want) for want in wants]
        with during(f"encoder of modality {modality}", (want.example for want in wants)):
            found = self.encoders[modality].encode(items)
            check_features(found, len(items), self.encoders[modality].width)
            # Cloned, because a view of the batch would keep the whole batch in memory.
            features = [x_ND.cpu().clone() for x_ND in found]
            check_finite(features)
        return features

    def _load(self, modality: str, want: _Wanted) -> Any:
        with during(f"modality {modality}: {want.path}", [want.example]):
            item = self.modalities[modality].load(want.path)
        if want.view is None:
            return item
        rng = np.random.Generator(np.random.Philox(key=want.view))
        with during(f"augmentation of {want.path}", [want.example]):
            return self._members[want.member].augment(want.context, item, rng)

    def _augments(self, example: Example, context: str) -> bool:
        return context in self._members[example.member].augmented
