"""Whole runs whose MLflow server dies, or whose disk is full, half-way: the same command, later, completes them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from harness.core.record import TrialRecord, read_run
from tests.support.disks import fill
from tests.support.small_grid import run_of, run_to_end, start, write_grid
from tests.support.stores import running_server

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
TRIALS = 6


def wait_for(condition: Callable[[], bool], driver: Any) -> None:
    until = time.monotonic() + 600
    while not condition():
        assert driver.poll() is None, "the run ended before"
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def recorded(run: Path) -> int:
    return len(list(run.glob("trials/*/record.json")))


def in_mlflow(uri: str) -> tuple[Counter[str], set[str]]:
    """Of the trials: how often each id is there; and the statuses of all runs, with the grid's."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("small")
    found = client.search_runs([experiment.experiment_id], max_results=100)
    trials = [one for one in found if one.data.tags.get("harness.kind") == "trial"]
    assert len(found) == len(trials) + 1
    return Counter(one.data.tags["harness.trial_id"] for one in trials), {one.info.status for one in found}


def test_a_server_that_dies_in_a_run_has_every_trial_once_in_the_end(tmp_path: Path) -> None:
    with running_server(tmp_path / "server") as server:
        write_grid(tmp_path, seeds=TRIALS // 3)
        run, variables = tmp_path / "runs" / "small", {"MLFLOW_TRACKING_URI": server.uri}
        driver = start(tmp_path, output=subprocess.PIPE, **variables)
        wait_for(lambda: recorded(run) >= 2, driver)
        server.kill()
        output = driver.communicate(timeout=900)[0]
        assert driver.returncode == 0, output
        assert f"{TRIALS} of {TRIALS} trials finished" in output
        assert "harness sync" in output
        code, again = run_to_end(tmp_path, **variables)
        assert (code, recorded(run)) == (0, TRIALS), again
        server.start()
        command = [sys.executable, "-m", "harness", "sync", "runs/small"]
        for _ in range(2):  # the second time there is nothing left
            done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            assert in_mlflow(server.uri) == (dict.fromkeys(run_of(tmp_path).records, 1), {"FINISHED"})


def numbers(record: TrialRecord) -> tuple[Any, ...]:
    return record.status, record.metrics, record.history, record.data


def test_a_run_whose_disk_fills_goes_on_when_there_is_space(tmp_path: Path) -> None:
    undisturbed, disturbed, disk = (tmp_path / name for name in ("undisturbed", "disturbed", "disk"))
    for folder in (undisturbed, disturbed, disk):
        folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    done = subprocess.run(mount, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        write_grid(undisturbed, seeds=TRIALS // 3)
        write_grid(disturbed, seeds=TRIALS // 3)
        assert run_to_end(undisturbed)[0] == 0
        driver = start(disturbed, "-o", str(disk), output=subprocess.PIPE)
        run = disk / "small"
        wait_for(lambda: recorded(run) >= 1, driver)
        filler = fill(disk)
        output = driver.communicate(timeout=900)[0]
        assert driver.returncode == 1, output
        assert "Traceback" not in output
        assert str(disk) in output
        assert "full" in output or "No space left" in output
        filler.unlink()
        code, output = run_to_end(disturbed, "-o", str(disk))
        assert code == 0, output
        records, expected = read_run(run).records, run_of(undisturbed).records
        assert {key: numbers(one) for key, one in records.items()} == {k: numbers(one) for k, one in expected.items()}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
