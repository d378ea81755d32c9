"""Which run folder an experiment takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.core.errors import UserError
from harness.core.storage import Copy, Folder, run_copy


def run_folder(output: Path, name: str, fresh: bool) -> Path:
    """The latest run folder of an experiment, or the next one.

    Args:
        output: parent of the run folders.
        name: of the experiment.
        fresh: whether the next one is taken.
    """
    return output / _run_name(name, fresh, lambda run: (output / run).exists())


def stored_run(output: str, name: str, fresh: bool) -> Copy:
    """The run folder at a URL, and its copy as it is there now.

    Raises:
        StorageError: the storage cannot be used.
    """
    runs = Folder(output)
    if runs.url.startswith("memory:"):
        raise UserError(
            f"{runs.url}: is in the memory of this process, but trials run in others; allowed: s3, gs, file"
        )
    names = set(runs.folders())
    copy = run_copy(f"{runs.url}/{_run_name(name, fresh, names.__contains__)}")
    copy.pull()
    return copy


def _run_name(name: str, fresh: bool, exists: Callable[[str], bool]) -> str:
    """The latest of ``name``, ``name@2``, ``name@3`` …, or with ``fresh`` the next one; names cannot contain ``@``."""
    number = 1

    def numbered(n: int) -> str:
        return name if n == 1 else f"{name}@{n}"

    while exists(numbered(number + 1)):
        number += 1
    return numbered(number + 1) if fresh and exists(numbered(number)) else numbered(number)
