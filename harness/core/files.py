"""Atomic file writes, content digests, and where the harness caches files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SAYS_FULL = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122)\b")  # pyarrow, safetensors
_SAYS_UNWRITTEN = re.compile(r"PytorchStreamWriter|inline_container|failed writing file|unexpected pos")  # torch.save
_LEFT_BYTES = 2**20
_ABANDONED_S = 3600.0  # a file that is being written is younger


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces ``path`` when the block ends without an error.

    Concurrent readers and writers see the complete old file or the complete new one, also after a crash. The parent
    folder is created.

    Raises:
        DiskFullError: the disk is full; the old file is as it was.
    """
    with disk_full_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path, names: str = ".*.partial") -> None:
    """Remove what writers that were killed have left in a folder, once it is an hour old.

    Args:
        folder: whether it exists or not.
        names: pattern of the files.
    """
    for old in folder.glob(names):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _ABANDONED_S:
                old.unlink()


class DiskFullError(OSError):
    """A file could not be written because its disk, or the user's share of it, is full.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        text = f"{path}: could not be written: the disk is full; free some space, and run the same command again"
        super().__init__(text)
        self.errno = errno.ENOSPC


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn whatever the libraries raise where the disk is full into one error that says what could not be written.

    Raises:
        DiskFullError: the disk is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error, path):
            raise
        raise DiskFullError(path) from error


def is_disk_full(error: BaseException, path: Path) -> bool:
    """Whether an error means that the disk of a path is full; torch does not say so."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return bool(_SAYS_FULL.search(str(error))) or (bool(_SAYS_UNWRITTEN.search(str(error))) and _is_full(path))


def _is_full(path: Path) -> bool:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free < _LEFT_BYTES


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
