"""The features of one encoder in the cache on disk, as memory-mapped safetensors that all trials of a machine share.

A file of the cache holds the features of some calls of the encoder. Which file a call is in is read from the headers,
so there is no index that could be broken. Calls are dealt to buckets by their key: a process that holds the lock of a
bucket encodes what it lacks, and writes it in pieces, so that a process that is killed loses one piece.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness.core.disk_cache import CacheFullError, DiskCache, Use, open_regular

PIECE_BYTES = 32 << 20
_MOST_HEADER_BYTES = 64 << 20
_WAIT_S = 0.2
_SUFFIX = ".safetensors"
_VIEWS = "v"  # the bucket of what was encoded on the way
T = TypeVar("T")
logger = logging.getLogger(__name__)


class Shelf:
    """Features by the key of the call that made them: hexadecimal digits.

    Args:
        cache: whose files have them.
        name: of all that features depend on besides the items of a call: hexadecimal digits.
        width: D of the features.
    """

    def __init__(self, cache: DiskCache, name: str, width: int) -> None:
        self.cache, self.name, self.width = cache, name, width
        self._use = Use(cache)
        self._known: set[Path] = set()
        self._places: dict[str, tuple[Path, int]] = {}  # key of a call → its file, and how many items it has
        self._open: dict[Path, Any] = {}
        self._pending: dict[str, list[Tensor]] = {}
        self._full = False
        self._refresh("")

    @property
    def place(self) -> Path:
        """The folder."""
        return self.cache.folder / self.name

    def get(self, key: str) -> list[Tensor] | None:
        """The features (N, D) of each item of a call, memory-mapped; None: they are not there."""
        if key in self._pending:
            return self._pending[key]
        if key not in self._places:
            return None
        path, count = self._places[key]
        try:
            if path in self._open or self._take(path):
                found = [self._open[path].get_tensor(f"{key}.{n}") for n in range(count)]
                if all(x_ND.ndim == 2 and x_ND.shape[1] == self.width for x_ND in found):
                    return found
                self.cache.remove_broken(path, f"its features are not of width {self.width}")
        except (OSError, SafetensorError) as error:
            self.cache.remove_broken(path, f"cannot be read ({error})")
        self._forget(path)
        return None

    def build(
        self, wanted: Mapping[str, T], encode: Callable[[T], list[Tensor]], tick: Callable[[int], None] = lambda _: None
    ) -> None:
        """Let ``encode`` make what is not there; several processes that do so at once share the work.

        Args:
            wanted: calls by key.
            encode: makes the features of a call.
            tick: told how many calls are settled since the last time, also while another process is waited for.

        Raises:
            CacheFullError: there is no room.
            DiskFullError: the disk is full.
        """
        buckets: dict[str, list[str]] = {}
        for key in wanted:
            if self.get(key) is None:
                buckets.setdefault(key[0], []).append(key)
        waiting = deque(sorted(buckets))
        waiting.rotate(os.getpid())  # not all begin with the same one
        while waiting:
            free = [bucket for bucket in tuple(waiting) if self._fill(bucket, buckets[bucket], wanted, encode, tick)]
            for bucket in free:
                waiting.remove(bucket)
            if not free:
                time.sleep(_WAIT_S)
                tick(0)

    def keep(self, key: str, features: list[Tensor]) -> None:
        """Keep what was encoded on the way, such as augmented views, for other trials, as long as there is room."""
        if self._full:
            return
        self._pending[key] = features
        if sum(x_ND.nbytes for found in self._pending.values() for x_ND in found) >= PIECE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was kept and is not written yet."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        try:
            with self.cache.lock(self._prefix(_VIEWS)):
                self._refresh(_VIEWS)
                self._write(_VIEWS, {key: found for key, found in pending.items() if key not in self._places})
        except CacheFullError as error:
            logger.warning("augmented views are not kept from here on: %s", error)
            self._full = True

    def _fill(
        self,
        bucket: str,
        keys: Iterable[str],
        wanted: Mapping[str, T],
        encode: Callable[[T], list[Tensor]],
        tick: Callable[[int], None],
    ) -> bool:
        """Make what a bucket lacks; False: another process is at it."""
        lock = self.cache.lock(self._prefix(bucket))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        piece: dict[str, list[Tensor]] = {}
        size = 0
        try:
            self._refresh(bucket)
            try:
                for key in keys:
                    if self.get(key) is None:
                        piece[key] = encode(wanted[key])
                        size += sum(x_ND.nbytes for x_ND in piece[key])
                    if size >= PIECE_BYTES:
                        whole, piece, size = piece, {}, 0
                        self._write(bucket, whole)
                    tick(1)
            finally:
                self._write(bucket, piece)
        finally:
            lock.release()
        return True

    def _prefix(self, bucket: str) -> str:
        return f"{self.name}/{bucket}"

    def _write(self, bucket: str, piece: Mapping[str, list[Tensor]]) -> None:
        if not piece:
            return
        tensors = {f"{key}.{n}": x_ND.contiguous() for key, found in piece.items() for n, x_ND in enumerate(found)}
        path = self.cache.add(self._prefix(bucket), save(tensors), _SUFFIX)
        self._add(path)
        self._take(path)  # so that it is not this trial that evicts it

    def _refresh(self, bucket: str) -> None:
        """Read the headers of files that are new, of a bucket or of all ("")."""
        for one in bucket or f"0123456789abcdef{_VIEWS}":
            for path in self.cache.files(self._prefix(one)):
                if path not in self._known:
                    self._add(path)

    def _add(self, path: Path) -> None:
        try:
            names = _names(path)
        except FileNotFoundError:  # another process has made room
            return
        except (OSError, ValueError) as error:
            self.cache.remove_broken(path, f"its header cannot be read ({error})")
            return
        self._known.add(path)
        counts: dict[str, int] = {}
        for name in names:
            key = name.partition(".")[0]
            counts[key] = counts.get(key, 0) + 1
        for key, count in counts.items():
            self._places.setdefault(key, (path, count))

    def _take(self, path: Path) -> bool:
        if not path.exists() or not self._use.take(path):
            return False
        self._open[path] = safe_open(path, framework="pt")
        return True

    def _forget(self, path: Path) -> None:
        self._known.discard(path)
        self._open.pop(path, None)
        for key in [key for key, (place, _) in self._places.items() if place == path]:
            del self._places[key]


def _names(path: Path) -> list[str]:
    """The names of the tensors of a file, from its header.

    Raises:
        OSError: it cannot be read, or is a link.
        ValueError: it has no header of this format.
    """
    with open_regular(path) as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if length > min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        with suppress(RecursionError):
            header = json.loads(file.read(length))
            if isinstance(header, dict):
                return [name for name in header if name != "__metadata__"]
    raise ValueError("a header that is no object")
