"""Atomic file writes, content digests, and where the harness caches files."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces ``path`` when the block ends without an error.

    Concurrent readers and writers see the complete old file or the complete new one, also after a crash. The parent
    folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def digest_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(files: Sequence[Path]) -> list[str]:
    """SHA-256 of each file, cached by path, size and times in ``fingerprints.json`` of the harness cache.

    Raises:
        OSError: one cannot be read.
    """
    store = cache_folder("fingerprints.json")
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(store.read_text(encoding="utf-8"))
    found, new = [], {}
    for path in files:
        stat = path.stat()
        # The time of the last change of the inode too: a copy can keep the time of its content (cp -p, rsync -t).
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        cached = known.get(str(path))
        if not isinstance(cached, list) or cached[:3] != stamp:
            cached = new[str(path)] = [*stamp, digest_of(path)]
        found.append(str(cached[3]))
    if new:
        with suppress(OSError):  # a cache that cannot be written to costs time only
            write_atomically(store, json.dumps(known | new))
    return found


def cache_folder(*parts: str) -> Path:
    """A path below ``$HARNESS_CACHE`` (by default ``~/.cache/harness``); nothing is created."""
    return Path(os.environ.get("HARNESS_CACHE") or "~/.cache/harness").expanduser().joinpath(*parts)
