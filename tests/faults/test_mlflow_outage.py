"""A real MLflow server that dies, hangs and comes back while a trial runs: nothing waits long, nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from harness import UserError, sync_run
from harness.core.record import PlannedTrial, TrialRecord, read_run, write_record
from harness.tracking import tracker as tracker_module
from harness.tracking.grid import Grid, check_grid, child_runs, close_grid, open_grid
from harness.tracking.journal import JOURNAL
from harness.tracking.tracker import MlflowTracker
from results.leaderboard.table import build_leaderboard
from tests.support.runs import fake_plan, write_run
from tests.support.stores import Server, running_server
from tests.support.tracking import four_trials

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]  # on a busy machine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path / "server") as started:
        yield started


def run_trial(grid: Grid, planned: PlannedTrial, record: TrialRecord, epochs: range) -> float:
    """Log a trial as a worker does; returns the longest time that training waited, in seconds."""
    home, waits = grid.folder / "trials" / planned.trial_id, []
    tracker = MlflowTracker(grid, four_trials()[0][0], planned, home)
    for epoch in epochs:
        began = time.monotonic()
        tracker.metrics({"train_loss": 1 / epoch, "validation_perplexity": 2 / epoch}, step=epoch)
        waits.append(time.monotonic() - began)
    write_record(grid.folder, record)
    began = time.monotonic()
    tracker.finish(record, home)
    assert tracker.warnings == (), "nothing is lost"
    return max(*waits, time.monotonic() - began)


def test_a_server_that_dies_hangs_and_comes_back_gets_everything_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setattr(tracker_module, "_RETRY_S", 0.2)
    folder = tmp_path / "runs" / "synthetic"
    with pytest.raises(
        UserError, match=r"nothing has been logged to it from .*synthetic yet, so its address may be wrong"
    ):
        check_grid("http://127.0.0.1:9", "synthetic", folder)
    write_run(folder, fake_plan(settings=("",), seeds=(0,), mlflow_uri=server.uri))
    run = read_run(folder)
    records = {trial_id: record.model_copy(update={"history": ()}) for trial_id, record in run.records.items()}
    for trial_id in records:
        (folder / "trials" / trial_id / "record.json").unlink()
    grid = open_grid(server.uri, "synthetic", folder)
    assert grid.problem is None
    trials, epochs = list(run.plan.trials), range(1, 9)

    def log(index: int) -> float:
        return run_trial(grid, trials[index], records[trials[index].trial_id], epochs)

    assert log(0) < 30  # its first trial imports and connects
    server.kill()
    assert log(1) < 3
    check_grid(server.uri, "synthetic", folder)  # a known server may be down at the start
    down = open_grid(server.uri, "synthetic", folder)
    assert down.problem is not None
    assert down.parent_run_id == grid.parent_run_id
    assert run_trial(down, trials[2], records[trials[2].trial_id], epochs) < 3
    assert close_grid(down, complete=False, artifacts=[]).problem is not None
    server.start()
    assert run_trial(down, trials[3], records[trials[3].trial_id], epochs) < 3, "it came back in mid-run"
    server.send(signal.SIGSTOP)
    waited = [log(index) for index in range(4, 8)]
    assert max(waited) < 3.5
    assert sum(waited) < 12, "in all trials of a process together"
    server.send(signal.SIGCONT)
    server.kill()
    with pytest.raises(UserError, match="could not be used"):
        sync_run(folder)
    server.start()
    client = MlflowClient(server.uri)
    assert client.get_run(grid.parent_run_id).info.status == "RUNNING", "trials are missing"
    assert len(sync_run(folder).delivered) >= 4
    assert sync_run(folder).delivered == ()
    children = list(child_runs(client, str(grid.experiment_id), grid.parent_run_id))
    assert sorted(child.data.tags["harness.trial_id"] for child in children) == sorted(records)
    assert {child.info.status for child in children} == {"FINISHED"}
    for child in children:
        points = client.get_metric_history(child.info.run_id, "epoch/train_loss")
        assert sorted((point.step, point.value) for point in points) == [(epoch, 1 / epoch) for epoch in epochs]
    assert client.get_run(grid.parent_run_id).info.status == "FINISHED"
    assert list(folder.rglob(JOURNAL)) == []
    board = build_leaderboard(read_run(folder))
    assert close_grid(grid, complete=True, artifacts=[], board=board).delivered == []
