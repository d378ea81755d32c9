"""MLflow's database gets its name only when its schema is complete; tests/faults kills the process that makes it."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.tracking.schema import advice, make_database
from harness.tracking.store import check_uri, default_uri


def test_of_two_processes_that_make_a_database_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "mlflow.db"

    def migrate(new: Path) -> None:
        make_database(path, lambda other: other.write_text("first") and None)
        new.write_text("second")

    make_database(path, migrate)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    old, new = tmp_path / ".mlflow.db.1.partial", tmp_path / ".mlflow.db.2.partial"
    for partial in (old, new):
        partial.write_text("half")
    os.utime(old, times=(time.time() - 7200,) * 2)
    make_database(path, lambda partial: partial.write_text("whole") and None)
    assert sorted(tmp_path.iterdir()) == [new, path]


def test_an_error_leaves_no_database(tmp_path: Path) -> None:
    def fail(new: Path) -> None:
        new.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        make_database(tmp_path / "mlflow.db", fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("runs", "says"), [(0, "it holds no run: remove the file"), (3, "it holds 3 runs: restore")])
def test_a_database_of_which_a_migration_was_killed_is_refused_with_what_to_do(
    runs: int, says: str, tmp_path: Path, mlflow_database: Path
) -> None:
    path = Path(shutil.copy(mlflow_database, tmp_path))
    with sqlite3.connect(path) as database:  # as if it had stopped before the last one was noted
        columns = "run_uuid, name, experiment_id, lifecycle_stage"
        database.executemany(
            f"INSERT INTO runs ({columns}) VALUES (?, 'x', 0, 'active')", [(str(n),) for n in range(runs)]
        )
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(UserError, match=re.escape(says)):
        check_uri(default_uri(tmp_path))
    assert says in advice(path)


def test_no_advice_about_what_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    assert advice(tmp_path / "mlflow.db") == ""
