"""Makes an SQLite database with MLflow's schema in one step.

MLflow makes its tables by a chain of migrations, each committed by itself, which takes seconds. A process that is
killed meanwhile leaves a database that no later one can open ("duplicate column name"). So the database gets its schema
under another name, and its own name only when it is complete.
"""

from __future__ import annotations

import os
import re
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from harness.core.files import remove_abandoned

# How SQLite says that a migration meets what a killed one has left.
HALF_MADE = re.compile(r"table \S+ already exists|duplicate column name|no such table|out-of-date database schema")


def make_database(path: Path, migrate: Callable[[Path], None]) -> None:
    """Make a database that does not exist yet; of several processes that do, one wins, and all use its database.

    Args:
        path: of the database; its folder is created.
        migrate: makes the schema in a new file.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, f".{path.name}.*.partial*")  # with the journals of SQLite
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        migrate(partial)
        with suppress(FileExistsError):
            _name(partial, path)
    finally:
        _remove(partial)


def _name(partial: Path, path: Path) -> None:
    """Give a file its name, unless another one has it."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if not path.exists():
            partial.rename(path)


def _remove(partial: Path) -> None:
    for part in (partial, *(partial.with_name(f"{partial.name}{end}") for end in ("-journal", "-wal", "-shm"))):
        part.unlink(missing_ok=True)


def advice(path: Path) -> str:
    """What to do about a database whose schema MLflow cannot make or change; empty if it is not known."""
    with suppress(sqlite3.Error, OSError), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        runs = int(database.execute("SELECT count(*) FROM runs").fetchone()[0])
        hint = "a process was killed while MLflow changed its schema"
        if runs == 0:
            return f"{hint}; it holds no run: remove the file and run the same command again"
        return f"{hint}; it holds {runs} runs: restore a backup or move it away; finished trials are in the run folders"
    return ""
