"""The driver of a grid is killed (``kill -9``) again and again, each time followed by the same command."""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from harness.core.record import read_run
from tests.support.small_grid import run_of, run_to_end, start, write_grid

KILLS, TRIALS = 20, 30
EPOCH = re.compile(r" (\d+) harness\.trial\.trial INFO epoch \d+ of 2")
DIES_WITHIN_S = 30.0  # of a killed driver's workers, on a busy machine
pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


def records(run: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.glob("trials/*/record.json")}


def epochs(run: Path, trial_id: str) -> list[str]:
    """Of a trial's log: the process of each epoch that it trained."""
    return EPOCH.findall((run / "trials" / trial_id / "log.txt").read_text(encoding="utf-8"))


def kill(driver: Any) -> list[psutil.Process]:
    """Kill a driver and nothing else; returns the processes that it had started."""
    children: list[psutil.Process] = []
    if driver.poll() is None:
        children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    return children


def assert_each_trial_ran_once(folder: Path, expected: int) -> None:
    """Check for one finished record of each trial, and exactly one finished run of it in MLflow."""
    run = run_of(folder)
    assert [run.broken, run.foreign] == [(), ()]
    assert Counter(record.status for record in run.records.values()) == {"finished": expected}
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    logged = client.search_runs([experiment.experiment_id], "tags.`harness.kind` = 'trial'", max_results=1000)
    ids = Counter(one.data.tags["harness.trial_id"] for one in logged if one.info.status == "FINISHED")
    assert ids == dict.fromkeys(run.records, 1)
    assert {one.info.status for one in logged} == {"FINISHED"}, "runs of killed attempts are not left running"


@pytest.mark.slow
def test_a_driver_that_is_killed_twenty_times_loses_nothing_and_repeats_nothing(tmp_path: Path) -> None:
    write_grid(tmp_path)
    run, moments = tmp_path / "runs" / "small", random.Random(1)
    known: dict[str, bytes] = {}
    trained: dict[str, list[str]] = {}
    orphans: list[psutil.Process] = []
    for _ in range(KILLS):
        driver, before = start(tmp_path), len(records(run))
        # At a moment of its start, or after it has finished none to three trials: however fast the machine is.
        more, late = moments.choice([0, 0, 1, 2, 3]), moments.uniform(0, 5)
        while driver.poll() is None and len(records(run)) < min(before + more, TRIALS):
            time.sleep(0.02)
        time.sleep(late)
        orphans += kill(driver)
        # Ours were not touched since, and what had a record at an earlier kill was not trained again.
        now = records(run)
        assert {key: now[key] for key in known} == known
        assert {key: epochs(run, key) for key in trained} == trained
        known, trained = now, {key: epochs(run, key) for key in now}
    alive = psutil.wait_procs(orphans, timeout=DIES_WITHIN_S)[1]
    assert alive == [], "processes of killed drivers"
    code, output = run_to_end(tmp_path)
    assert code == 0, output
    assert {key: content for key, content in records(run).items() if key in known} == known
    assert {key: epochs(run, key) for key in trained} == trained
    assert_each_trial_ran_once(tmp_path, TRIALS)


def test_workers_of_a_killed_driver_write_nothing_into_the_next_run(tmp_path: Path) -> None:
    """They live for some seconds more; the next driver starts at once."""
    write_grid(tmp_path, seeds=4)
    run = tmp_path / "runs" / "small"
    driver = start(tmp_path)
    while len(records(run)) < 3:
        assert driver.poll() is None
        time.sleep(0.02)
    # Ray's own agents live longer, and write nothing into the run folder.
    started = psutil.Process(driver.pid).children(recursive=True)
    agents = {process.pid for process in started if process.name().endswith("Agent")}
    orphans = {process.pid for process in kill(driver)} - agents
    second = start(tmp_path)
    written: dict[str, list[str]] = {}
    first_of_second = 0.0
    while second.poll() is None:
        for log in run.glob("trials/*/log.txt"):
            written[log.parent.name] = epochs(run, log.parent.name)
        new = [pid for pids in written.values() for pid in pids if int(pid) not in orphans]
        if new and not first_of_second:
            first_of_second = time.monotonic()
            assert not [pid for pid in orphans if psutil.pid_exists(pid)], "a worker outlives the start of the next run"
        time.sleep(0.05)
    assert first_of_second
    assert second.returncode == 0
    for pids in written.values():  # no worker of the first driver trained after one of the second
        firsts = [int(pid) in orphans for pid in pids]
        assert firsts == sorted(firsts, reverse=True)
    assert_each_trial_ran_once(tmp_path, 12)


def test_a_kill_while_a_fresh_run_begins_and_while_the_report_is_written(tmp_path: Path) -> None:
    write_grid(tmp_path, seeds=1)
    assert run_to_end(tmp_path)[0] == 0
    first = records(tmp_path / "runs" / "small")
    moments = random.Random(3)
    for _ in range(2):  # in the middle of --fresh: before its plan, or after it
        driver = start(tmp_path, "--fresh")
        began, most = time.monotonic(), moments.uniform(2, 20)
        while driver.poll() is None and time.monotonic() - began < most:
            if list(tmp_path.glob("runs/small@*/plan.json")):
                break
            time.sleep(0.02)
        kill(driver)
    assert records(tmp_path / "runs" / "small") == first
    code, output = run_to_end(tmp_path)
    assert code == 0, output

    newest = max(tmp_path.glob("runs/small*"), key=lambda path: (len(path.name), path.name))
    report = newest / "report" / "index.html"
    report.unlink()
    driver = start(tmp_path)  # nothing to compute: it writes the report
    while driver.poll() is None and not list(newest.glob("report/*.partial")) + list(newest.glob("report/.*")):
        time.sleep(0.002)
    kill(driver)
    for half in newest.glob("report/.*.partial"):
        os.utime(half, (0, 0))  # of long ago: a new one may belong to a `harness report` that runs
    code, output = run_to_end(tmp_path)
    assert code == 0, output
    assert report.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert not read_run(newest).broken
    assert not list(newest.glob("report/.*.partial")), "half files"
