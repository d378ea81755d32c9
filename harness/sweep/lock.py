"""Locks a run folder: one sweep or profile at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from harness.core.errors import UserError


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a run folder against other sweeps and profiles.

    Raises:
        UserError: one is running in it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: in use by another sweep or profile; wait until it has ended, or `harness run --fresh`"
        ) from None
    try:
        yield
    finally:
        lock.release()
