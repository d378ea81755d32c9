"""Computes the encoder features of input files once: for all trials of a machine on disk, else in a worker's memory.

Without augmentation, a frozen encoder gives the same output in every epoch and for every reference, so a file is
encoded once, before training. Augmented inputs are encoded for every training item. Where there is a cache on disk
(``harness.model.shelf``) both are found there by what they are made of; else at most ``CACHE_BYTES`` of the former are
kept in memory, and more is encoded again each time.

Rounding depends on the items of an encoder's call. So what is encoded together does not depend on what is cached, and
the key of a call names all of its items: features are the same bits in every case. An encoder that takes one item at a
time (``Encoder.items_per_call``) shares each file with all trials, others share it with those that encode it with the
same others. Shapes: N tokens of an item, D features.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.core.durations import duration
from harness.core.origin import during
from harness.model.checks import check_features, check_finite
from harness.model.inputs import stamp
from harness.model.kept import Kept, Key
from harness.model.on_disk import OnDisk, shelf_name
from harness.model.shelf import Shelf
from harness.model.workers import ALONE, Workers
from tasks.base import Example, Modality, Task
from tasks.encoder import Encoder

CACHE_BYTES = 1 << 30
BATCH_SIZE = 64  # examples whose files are encoded together, as far as the encoder takes several items
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Wanted:
    """A file of an example; ``view`` is the seed of its augmentation, None for no augmentation."""

    member: str
    context: str
    path: Path
    view: int | None
    example: str = field(compare=False)  # id, for messages: several examples may share a file


_Call = tuple[_Wanted, ...]  # what an encoder is given together


class Features:
    """Encoder features of a task's examples.

    Args:
        task: for the modality of each context, and for augmentation.
        modalities: by registry name; they read the files.
        encoders: frozen encoders by modality, with their preprocessing.
        device: of the encoders; features are in main memory.
        kept: what this process keeps from one trial for the next, where there is no cache on disk.
        keys: for each modality what its features depend on, besides the files; None: they are not kept.
        disk: the cache on disk; None: there is none.

    Attributes:
        progress: how far ``precompute`` is, in words.
    """

    def __init__(
        self,
        task: Task,
        modalities: Mapping[str, Modality],
        encoders: Mapping[str, Encoder],
        device: torch.device,
        kept: Kept | None = None,
        keys: Mapping[str, Key | None] = MappingProxyType({}),
        disk: OnDisk | None = None,
    ) -> None:
        self.task, self.modalities = task, modalities
        self._kept, self._keys, self._disk = kept or Kept(0), keys, disk
        self._members = task.members()
        self.encoders = {name: encoder.to(device).eval() for name, encoder in encoders.items()}
        self._cache: dict[tuple[str, Path], Tensor] = {}
        self._bytes = 0
        self._planned: dict[tuple[str, Path], _Call] = {}  # what each file is encoded with
        self._digests: dict[Path, str] = {}
        self._shelves: dict[str, Shelf] = {}
        for name, key in keys.items():
            if disk is not None and key is not None:
                encoder = self.encoders[name]
                self._shelves[name] = Shelf(
                    disk.cache, shelf_name(key, device, type(encoder), disk.threads), encoder.width
                )
        self.progress = ""

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

    def flush(self) -> None:
        """Write what was encoded on the way into the cache on disk."""
        for shelf in self._shelves.values():
            shelf.flush()

    def forget(self) -> None:
        """Know nothing of the files any more: they may have changed."""
        self._cache.clear()
        self._planned.clear()
        self._digests.clear()
        self._bytes = 0

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
        """Encode examples before training: all where there is a cache on disk, else until the memory's share is full.

        Args:
            train: of the budget; those that are augmented are left out.
            evaluation: of the other splits.
            tick: called after every call of an encoder, and while another process is waited for.
            workers: they share the work; without a cache on disk each gives the others what it found.

        Raises:
            CacheFullError, DiskFullError: there is no room on disk.
        """
        once = [e for e in train if not self.augments(e)]
        blocks = self._plan([*once, *evaluation])
        for modality, shelf in self._shelves.items():
            calls = [call for block in blocks for name, call in block if name == modality]
            self._build(modality, shelf, calls, tick)
        blocks = [[(name, call) for name, call in block if name not in self._shelves] for block in blocks]
        blocks = [block for block in blocks if block]
        for first in range(0, len(blocks), workers.count):
            if self._bytes >= CACHE_BYTES:
                return
            known = len(self._cache)
            for own in blocks[first + workers.rank : first + workers.rank + 1]:
                for modality in dict.fromkeys(name for name, _ in own):
                    self._remember(modality, [call for name, call in own if name == modality])
            new = list(itertools.islice(self._cache.items(), known, None))
            for found in workers.gather(new):
                for key, x_ND in found:
                    self._store(key, x_ND)
            tick()

    def _plan(self, examples: Sequence[Example]) -> list[list[tuple[str, _Call]]]:
        """The calls of encoders for files that are not augmented, by block of examples; of each file one."""
        blocks = []
        for first in range(0, len(examples), BATCH_SIZE):
            wanted = self._wanted(examples[first : first + BATCH_SIZE])
            new: dict[str, dict[Path, _Wanted]] = {}
            for want in (want for wants in wanted for want in wants):
                modality = self.task.modalities[want.context]
                if (modality, want.path) not in self._planned:
                    new.setdefault(modality, {}).setdefault(want.path, want)
            block = [(modality, call) for modality, own in new.items() for call in self._calls(modality, own.values())]
            for modality, call in block:
                self._planned |= {(modality, want.path): call for want in call}
            blocks.append(block)
        return blocks

    def _calls(self, modality: str, wants: Iterable[_Wanted]) -> Iterator[_Call]:
        size, left = min(self.encoders[modality].items_per_call, BATCH_SIZE), iter(wants)
        return iter(lambda: tuple(itertools.islice(left, size)), ())

    def _build(self, modality: str, shelf: Shelf, calls: Sequence[_Call], tick: Callable[[], None]) -> None:
        """Encode what the cache on disk lacks, together with other processes that do so at the same time."""
        missing = {key: call for call in calls if shelf.get(key := self._key(call)) is None}
        total, done, encoded, began = len(missing), 0, 0, time.monotonic()

        def encode(call: _Call) -> list[Tensor]:
            nonlocal encoded
            encoded += len(call)
            return self._encode(modality, call)

        def settled(count: int) -> None:
            nonlocal done
            done += count
            left = f", {duration((time.monotonic() - began) * (total - done) / done)} left" if done else ""
            self.progress = f"{modality} {done / total:.0%}{left}"
            tick()

        shelf.build(missing, encode, settled)
        files = sum(map(len, calls))
        logger.info(
            "features of %s: %d of %d files encoded, the others are in %s", modality, encoded, files, shelf.place
        )

    def _remember(self, modality: str, calls: Sequence[_Call]) -> None:
        """Keep the features of files in memory, maybe those of an earlier trial."""
        key = self._keys.get(modality)
        try:
            files = tuple(tuple((str(want.path), *stamp(want.path)) for want in call) for call in calls)
        except OSError:  # decoding says more about a file that cannot be read
            key = None

        def encode() -> list[list[Tensor]]:
            return [self._encode(modality, call) for call in calls]

        if key is None:
            found = encode()
        else:
            size = lambda made: sum(x_ND.nbytes for rows in made for x_ND in rows)  # noqa: E731
            found = self._kept.of(("features", key, files), encode, size)
        for call, rows in zip(calls, found, strict=True):
            for want, x_ND in zip(call, rows, strict=True):
                self._store((modality, want.path), x_ND)

    def _rows(self, wanted: Sequence[_Wanted]) -> dict[_Wanted, Tensor]:
        rows: dict[_Wanted, Tensor] = {}
        missing: dict[str, dict[_Wanted, None]] = {}
        for want in wanted:
            key = self.task.modalities[want.context], want.path
            if want.view is None and key in self._cache:
                rows[want] = self._cache[key]
            else:
                missing.setdefault(key[0], {})[want] = None
        for modality, wants in missing.items():
            found: dict[tuple[Path, int | None], Tensor] = {}
            planned = {want: self._planned.get((modality, want.path)) if want.view is None else None for want in wants}
            alone = [want for want, call in planned.items() if call is None]
            for call in (*dict.fromkeys(filter(None, planned.values())), *self._calls(modality, alone)):
                own, mapped = self._of_call(modality, call)
                for want, x_ND in zip(call, own, strict=True):
                    found[want.path, want.view] = x_ND
                    if want.view is None:
                        self._store((modality, want.path), x_ND, mapped)
            rows |= {want: found[want.path, want.view] for want in wants}
        return rows

    def _of_call(self, modality: str, call: _Call) -> tuple[list[Tensor], bool]:
        """The features of a call, and whether they are mapped, so that they take no memory."""
        shelf = self._shelves.get(modality)
        if shelf is None:
            return self._encode(modality, call), False
        key = self._key(call)
        found = shelf.get(key)
        if found is not None:
            return found, True
        found = self._encode(modality, call)
        shelf.keep(key, found)
        return found, False

    def _key(self, call: _Call) -> str:
        """What the features of a call depend on, besides the encoder: the content of its files, and their views."""
        assert self._disk is not None  # noqa: S101
        items = []
        for want in call:
            if want.path not in self._digests:
                with during(f"file {want.path}", [want.example]):
                    self._digests[want.path] = self._disk.digest(want.path)
            augmented = [] if want.view is None else [self._disk.source, want.member, want.context, want.view]
            items.append([self._digests[want.path], want.path.suffix.lower(), *augmented])
        return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:32]

    def _store(self, key: tuple[str, Path], x_ND: Tensor, mapped: bool = False) -> None:
        if (mapped or self._bytes < CACHE_BYTES) and key not in self._cache:
            self._cache[key] = x_ND
            self._bytes += 0 if mapped else x_ND.nbytes

    @torch.no_grad()
    def _encode(self, modality: str, wants: Sequence[_Wanted]) -> list[Tensor]:
        items = [self._load(modality, want) for want in wants]
        encoder = self.encoders[modality]
        with during(f"encoder of modality {modality}", (want.example for want in wants), of=encoder):
            with threads(self._disk.threads if self._disk is not None else None):
                found = encoder.encode(items)
            check_features(found, len(items), encoder.width)
            # Cloned, because a view of the batch would keep the whole batch in memory.
            features = [x_ND.cpu().clone() for x_ND in found]
            check_finite(features)
        return features

    def _load(self, modality: str, want: _Wanted) -> Any:
        with during(f"modality {modality}: {want.path}", [want.example], of=self.modalities[modality]):
            item = self.modalities[modality].load(want.path)
        if want.view is None:
            return item
        rng = np.random.Generator(np.random.Philox(key=want.view))
        with during(f"augmentation of {want.path}", [want.example]):
            return self._members[want.member].augment(want.context, item, rng)

    def _augments(self, example: Example, context: str) -> bool:
        return context in self._members[example.member].augmented


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads of the CPU in the block; None: with as many as before."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
