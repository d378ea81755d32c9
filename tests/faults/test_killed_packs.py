"""Packs lose their process or their driver, are stopped, and go on: each trial records what it records alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.record import TrialRecord, read_run
from harness.core.search import read_decisions
from results.leaderboard.table import build_leaderboard
from tests.support.drivers import drivers_end, finish, start  # noqa: F401 - a fixture of every test here

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

EXPERIMENT = """
name: small
task: {{name: scenes, train_examples: 64, validation_examples: 8, test_examples: 8}}
adapters:
  - {{method: lora, rank: 2, dropout: 0.2, grouping: specific, learning_rate: [1e-3, 3e-3, 6e-3]}}
  - {{method: ia3, learning_rate: [1e-2, 5e-2, 2e-1]}}
budget: {{examples: 64, epochs: 3}}
seeds: [0, 1]
optimizer: {{per_device_train_batch_size: 8}}
eval: {{max_new_tokens: 8}}
search: {search}
resources: {{profile: false, checkpoint_interval_s: 0.5, max_concurrent_trials: 2, pack: {pack}}}
"""
HALVING = "{halving: {rungs: [1]}}"


def write(folder: Path, pack: str = "8", search: str = "{}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(EXPERIMENT.format(pack=pack, search=search), encoding="utf-8")
    return folder


def wait_inside_an_epoch(folder: Path, driver: subprocess.Popen[str]) -> list[Path]:
    """The folders of trials that have a checkpoint inside an epoch after the third step, as all of a pack have."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert driver.poll() is None, driver.communicate()[0]
        found = {path.parents[1] for path in (folder / "runs/small/trials").glob("*/checkpoint/epoch-*-step-*")}
        if len(found) >= 6:
            return sorted(found)
        time.sleep(0.02)
    raise AssertionError("no checkpoint inside an epoch")


def records(folder: Path) -> dict[str, TrialRecord]:
    run = read_run(folder / "runs/small")
    assert not run.broken
    return dict(run.records)


def log_of(folder: Path, trial_id: str) -> str:
    return (folder / "runs/small/trials" / trial_id / "log.txt").read_text(encoding="utf-8")


def assert_as_alone(folder: Path, alone: Path) -> None:
    expected, found = records(alone), records(folder)
    assert set(found) == set(expected)
    for trial_id, record in found.items():
        one = expected[trial_id]
        assert (record.status, record.data, record.best_epoch) == (one.status, one.data, one.best_epoch)
        for split, metrics in one.metrics.items():
            values = {name: value for name, value in metrics.items() if name.startswith("perplexity")}
            assert {name: record.metrics[split][name] for name in values} == pytest.approx(values, rel=1e-5)
    boards = [build_leaderboard(read_run(at / "runs/small")) for at in (folder, alone)]
    ranks = [[(row.label, row.grouping, row.rank) for row in board.rows] for board in boards]
    assert ranks[0] == ranks[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, every trial in a process of its own."""
    folder = write(tmp_path_factory.mktemp("alone"), "off")
    finish(start(folder))
    return folder


def test_a_killed_worker_and_a_killed_driver(alone: Path, tmp_path: Path) -> None:
    driver = start(write(tmp_path))
    trial = wait_inside_an_epoch(tmp_path, driver)[0]
    worker = int(re.findall(r"^\S+ \S+ (\d+) ", log_of(tmp_path, trial.name), re.MULTILINE)[-1])
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 300
    while "resumed after epoch" not in log_of(tmp_path, trial.name):
        assert time.monotonic() < deadline
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    said = finish(start(tmp_path))
    assert "trials train in 2 processes (resources.pack)" in said
    assert all(record.pack is not None for record in records(tmp_path).values())
    assert_as_alone(tmp_path, alone)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_in_other_packs(alone: Path, tmp_path: Path) -> None:
    driver = start(write(tmp_path))
    wait_inside_an_epoch(tmp_path, driver)
    os.killpg(driver.pid, signal.SIGINT)
    said = finish(driver, 130)
    assert "12 running trials may save where they are, for 30 s" in said
    write(tmp_path, "2")
    said = finish(start(tmp_path, "--only", "method=lora"))
    assert "4 trials train in 2 processes (resources.pack)" in said
    finish(start(tmp_path))
    went_on: list[bool] = []
    for trial_id in records(tmp_path):
        log = log_of(tmp_path, trial_id)
        stopped = re.search(r"stopped: asked to stop at step (\d+) of", log)
        assert stopped is not None, log
        went_on.append(stopped[1] != "0")  # the other process may not have taken a step yet
        resumed = re.search(rf"resumed after epoch \d, step {stopped[1]}\b", log.partition(stopped[0])[2])
        assert bool(resumed) == went_on[-1], log
    assert any(went_on)
    assert_as_alone(tmp_path, alone)


@pytest.mark.slow
def test_rates_are_halved_as_alone(tmp_path: Path) -> None:
    folders = {pack: write(tmp_path / pack, pack, HALVING) for pack in ("off", "8")}
    finish(start(folders["off"]))
    driver = start(folders["8"])
    wait_until((folders["8"] / "runs/small/halving.json").exists, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    finish(start(folders["8"]))
    found = {pack: read_run(folder / "runs/small") for pack, folder in folders.items()}
    statuses = {pack: {key: record.status for key, record in run.records.items()} for pack, run in found.items()}
    assert statuses["8"] == statuses["off"]
    assert sorted(statuses["8"].values()).count("pruned") > 0
    outs = [[sorted(one.out) for one in read_decisions(folder / "runs/small")] for folder in folders.values()]
    assert outs[0] == outs[1]
    for trial_id, record in found["8"].records.items():
        history = [epoch.validation_perplexity for epoch in found["off"].records[trial_id].history]
        assert [epoch.validation_perplexity for epoch in record.history] == pytest.approx(history, rel=1e-5)


def wait_until(true: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not true():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
