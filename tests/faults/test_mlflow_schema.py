"""A process is killed while MLflow makes its tables: the next one begins anew, as if nothing had been."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.tracking.store import check_uri, default_uri

pytestmark = pytest.mark.faults
KILLS = 4
MAKE = "import sys; from harness.tracking.store import check_uri, default_uri; from pathlib import Path; "
MAKE += "check_uri(default_uri(Path(sys.argv[1])))"


def test_a_killed_creation_of_the_schema_breaks_no_database(tmp_path: Path) -> None:
    """Made under its own name, half of the databases could never be opened again: 3 of 5 in an experiment."""
    moments = random.Random(15)
    halves = []
    for number in range(KILLS):
        runs = tmp_path / str(number)
        maker = subprocess.Popen([sys.executable, "-c", MAKE, str(runs)])
        while not list(runs.glob("*.db*")) and not list(runs.glob(".*.partial")):
            assert maker.poll() is None, "ended before it made a file"
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 1.5))
        maker.kill()
        maker.wait()
        halves += runs.glob(".mlflow.db.*.partial")
        check_uri(default_uri(runs))
        assert (runs / "mlflow.db").is_file()
    assert halves, "no kill came while the tables were made"
