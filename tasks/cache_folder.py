"""Folders of the harness cache that are written once for all processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder, atomically; do nothing if the folder exists.

    Args:
        folder: the finished folder.
        write: receives an empty temporary folder, which is removed if it fails.

    Raises:
        OSError: the folder cannot be written to.
        Exception: whatever ``write`` raises.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir()
        try:
            write(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
