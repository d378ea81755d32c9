"""Halving through Ray, with kills: the winners' records are those of the full search, to the last digit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

from harness.core.record import Run, read_run
from harness.core.search import read_decisions
from results.leaderboard.table import build_leaderboard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

HARNESS = [sys.executable, "-m", "harness", "run"]
EXPERIMENT = """\
task: {name: scenes, train_examples: 24, validation_examples: 8, test_examples: 8}
adapters:
  - {method: none, learning_rate: [1e-4, 1e-2]}
  - {method: full, search: {learning_rate: {log_uniform: [1e-4, 3e-3]}, sampler: grid, candidates: 2}}
seeds: [0, 1]
budget: {examples: 24, epochs: 3}
optimizer: {per_device_train_batch_size: 8, lr_scheduler_type: cosine}
eval: {max_new_tokens: 8}
resources: {profile: false, max_concurrent_trials: 2, max_failures: 3}
"""
HALVING = "search: {halving: {rungs: [1]}}\n"


def start(folder: Path, name: str, search: str) -> subprocess.Popen[bytes]:
    (folder / f"{name}.yaml").write_text(EXPERIMENT + search, encoding="utf-8")
    return subprocess.Popen(
        [*HARNESS, f"{name}.yaml"], cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True, env=dict(os.environ)
    )


def wait_until(true: Callable[[], bool], driver: subprocess.Popen[bytes], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert driver.poll() is None, "the sweep ended before"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def same(folder: Path, one: Run, other: Run, trial_id: str) -> bool:
    """Whether a trial has the same numbers in two runs."""
    fields = {"history", "metrics", "data", "parameters", "best_epoch", "answers", "status"}
    a, b = (pd.read_parquet(run.folder / "trials" / trial_id / "examples.parquet") for run in (one, other))
    records = [run.records[trial_id].model_dump(include=fields) for run in (one, other)]
    return records[0] == records[1] and a.equals(b)


def training(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of trials, by the names that Ray gives them."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            # A function of Tune's, or the class that the harness makes of it.
            if any(f"ray::{name}" in " ".join(process.cmdline()) for name in ("ImplicitFunc", "ResourceTrainable")):
                found.append(process)
    return found


def test_winners_are_those_of_the_full_search_whatever_is_killed(tmp_path: Path) -> None:
    driver = start(tmp_path, "halved", HALVING)
    trials = tmp_path / "runs/halved/trials"
    wait_until(lambda: any(trials.glob("*/paused.json")), driver)
    wait_until(lambda: bool(training(driver)), driver)  # between two trials no process may have the name
    training(driver)[0].kill()
    wait_until((tmp_path / "runs/halved/halving.json").exists, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    decided = read_decisions(tmp_path / "runs/halved")
    assert start(tmp_path, "halved", HALVING).wait(1800) == 0
    halved = read_run(tmp_path / "runs/halved")
    assert read_decisions(tmp_path / "runs/halved")[: len(decided)] == decided
    statuses = sorted(record.status for record in halved.records.values())
    assert statuses == ["finished"] * 4 + ["pruned"] * 4
    assert [(row.effort, row.halving, row.apart) for row in build_leaderboard(halved).rows] == [
        (2, "halving at epoch 1 by 2", ())
    ] * 2

    assert start(tmp_path, "full", "").wait(1800) == 0
    full = read_run(tmp_path / "runs/full")
    finished = [trial_id for trial_id, record in halved.records.items() if record.status == "finished"]
    assert [trial_id for trial_id in finished if not same(tmp_path, halved, full, trial_id)] == []
    for trial_id, record in halved.records.items():
        assert record.history == full.records[trial_id].history[: len(record.history)]

    # Without halving the pruned trials go on from their checkpoints.
    assert start(tmp_path, "halved", "").wait(1800) == 0
    after = read_run(tmp_path / "runs/halved")
    assert [trial_id for trial_id in after.records if not same(tmp_path, after, full, trial_id)] == []
    pruned = set(after.records) - set(finished)
    logs = [(after.folder / "trials" / trial_id / "log.txt").read_text(encoding="utf-8") for trial_id in pruned]
    assert all("resumed after epoch 1" in log for log in logs)


def test_a_sampler_that_learns_proposes_in_waves_and_the_same_after_a_kill(tmp_path: Path) -> None:
    search = "{learning_rate: {log_uniform: [1e-4, 1e-2]}, candidates: 3, sampler: tpe}"
    text = EXPERIMENT.replace("epochs: 3", "epochs: 1").replace("seeds: [0, 1]", f"search: {search}")
    text = text.replace(", learning_rate: [1e-4, 1e-2]", "").replace(
        "\n  - {method: full, search: {learning_rate: {log_uniform: [1e-4, 3e-3]}, sampler: grid, candidates: 2}}", ""
    )
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    assert subprocess.run([*HARNESS, "whole.yaml"], cwd=tmp_path, check=False).returncode == 0
    driver = subprocess.Popen([*HARNESS, "killed.yaml"], cwd=tmp_path, start_new_session=True)
    wait_until(lambda: any((tmp_path / "runs/killed/trials").glob("*/record.json")), driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert subprocess.run([*HARNESS, "killed.yaml"], cwd=tmp_path, check=False).returncode == 0
    plans = [read_run(tmp_path / "runs" / name).plan.trials for name in ("whole", "killed")]
    assert len(plans[0]) == 3
    assert plans[0] == plans[1]


def test_rows_of_trials_of_two_processes_are_halved(tmp_path: Path) -> None:
    """Both workers of a trial leave its engine at the rung, and the one that goes on takes it up again."""
    experiment = """\
task: {name: scenes, train_examples: 16, validation_examples: 4, test_examples: 4}
adapters: [{method: none, learning_rate: [1e-4, 1e-2]}]
budget: {examples: 16, epochs: 2}
optimizer: {per_device_train_batch_size: 8}
eval: {max_new_tokens: 4}
resources: {profile: false, workers: 2}
search: {halving: {rungs: [1]}}
"""
    (tmp_path / "two.yaml").write_text(experiment, encoding="utf-8")
    done = subprocess.run(  # noqa: PLW1510 - the exit code is looked at
        [*HARNESS, "two.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_run(tmp_path / "runs/two")
    (decision,) = read_decisions(run.folder)
    by_rate = {trial.learning_rate: run.records[trial.trial_id] for trial in run.plan.trials}
    best = min(decision.candidates, key=lambda one: one.validation_perplexity[0]).learning_rate
    assert {rate: (record.status, len(record.history)) for rate, record in by_rate.items()} == {
        rate: ("finished", 2) if rate == best else ("pruned", 1) for rate in (1e-4, 1e-2)
    }
    assert {record.workers for record in by_rate.values()} == {2}
