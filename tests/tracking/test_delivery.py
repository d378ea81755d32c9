"""Delivery to the real MLflow through a connection that breaks at every call in turn: nothing is lost or doubled."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from harness.core.files import write_atomically
from harness.core.record import read_run, write_record
from harness.tracking import delivery as module
from harness.tracking import grid as grid_module
from harness.tracking.delivery import Delivery
from harness.tracking.grid import Grid, child_runs, close_grid
from harness.tracking.journal import JOURNAL, Journal
from harness.tracking.store import repository_of
from harness.tracking.tracker import MlflowTracker
from tests.support.tracking import Trial, artifacts, finished_record, four_trials, new_grid, write_plan


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return four_trials()


@pytest.fixture(params=["sqlite", "files"])
def grid(
    tmp_path: Path, mlflow_database: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Grid:
    (tmp_path / "grid").mkdir()
    if request.param == "sqlite":
        shutil.copy(mlflow_database, tmp_path)
        return new_grid(tmp_path, "grid")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return grid_module.open_grid(str(tmp_path / "store"), "grid", tmp_path / "grid")


class Breaking:
    """A client, and artifacts, whose connection breaks at its n-th call: before it, or after it: the answer is lost."""

    def __init__(self, uri: str, good: int, arrives: bool) -> None:
        self._client, self.good, self.arrives = MlflowClient(uri), good, arrives

    def __getattr__(self, name: str) -> Any:
        return self._breaking(getattr(self._client, name))

    def artifacts_of(self, run: Any, uri: str) -> Any:
        return SimpleNamespace(log_artifact=self._breaking(repository_of(run, uri).log_artifact))

    def _breaking(self, do: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.good -= 1
            if self.good >= 0:
                return do(*args, **options)
            if self.arrives and self.good == -1:
                do(*args, **options)
            raise ConnectionError("the server is gone")

        return call


def points_of(client: MlflowClient, run: Any) -> Counter[tuple[str, int, float]]:
    found: Counter[tuple[str, int, float]] = Counter()
    for key in run.data.metrics:
        found.update(
            (metric.key, metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)
        )
    return found


@pytest.mark.parametrize("calls", [6, 7], ids=["short", "long"])
def test_a_connection_that_breaks_anywhere_loses_and_doubles_nothing(
    grid: Grid, trials: list[Trial], monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The run; params, points, scores and tags, in two calls if the trial is long; the data; two files; the end."""
    write_plan(grid.folder, trials)
    client, wanted, broken = MlflowClient(grid.uri), None, 0
    for good in range(40):
        for arrives in (False, True):
            spec, planned = trials[0]
            values = spec.model_dump(mode="json")
            trial_id = f"{good:03d}-{arrives}"
            planned = planned.model_copy(update={"trial_id": trial_id})
            home = grid.folder / "trials" / trial_id
            journal = Journal(home)
            journal.begin()
            for step in (2, 4):
                journal.add({"epoch/train_loss": 3.0 - step / 4, "system/cpu": 50.0 + step}, step)
            record = finished_record(planned, None)
            write_record(grid.folder, record)
            write_atomically(home / "log.txt", "a line\n")
            breaking = Breaking(grid.uri, good, arrives)
            monkeypatch.setattr(module, "connect", lambda _, it=breaking: it)
            monkeypatch.setattr(module, "repository_of", breaking.artifacts_of)
            first = Delivery(grid, planned, values, journal, looking=False)
            try:
                if calls == 7:
                    first.update()
                first.end(record)
            except ConnectionError:
                broken += 1
                monkeypatch.setattr(module, "connect", MlflowClient)
                monkeypatch.setattr(module, "repository_of", repository_of)
                for _ in range(2):  # the second time nothing is missing
                    Delivery(grid, planned, values, Journal(home), looking=True).end(record)
            found = list(client.search_runs([str(grid.experiment_id)], f"tags.`harness.trial_id` = '{trial_id}'"))
            assert len(found) == 1, (good, arrives)
            assert found[0].info.status == "FINISHED"
            points = points_of(client, found[0])
            assert set(points.values()) == {1}, (good, arrives)
            assert found[0].inputs.dataset_inputs
            data = found[0].data
            assert data.params["learning_rate"] == str(spec.optimizer.learning_rate)
            seen = (points, data.params, data.tags["harness.status"], artifacts(client, found[0].info.run_id))
            wanted = wanted or seen
            assert seen == wanted, (good, arrives)
        if breaking.good >= 0:  # all calls came through
            break
    assert broken == 2 * calls
    assert breaking.good >= 0


def test_a_server_that_is_lost_during_a_trial_lacks_nothing_once_the_grid_is_closed(
    grid: Grid, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(grid.folder, trials)
    client = MlflowClient(grid.uri)
    spec, planned = trials[0]
    home = grid.folder / "trials" / planned.trial_id
    failing = Breaking(grid.uri, 100, arrives=True)
    monkeypatch.setattr(module, "connect", lambda _: failing)
    tracker = MlflowTracker(grid, spec, planned, home)
    tracker.metrics({"train_loss": 2.0, "validation_perplexity": 9.0, "learning_rate": 1e-3}, step=4)
    assert tracker.run_id is not None
    failing.good = 0
    tracker.metrics({"train_loss": 1.5, "validation_perplexity": 8.0, "learning_rate": 1e-4}, step=8)
    record = finished_record(planned, tracker.run_id)
    write_record(grid.folder, record)
    tracker.finish(record, home)
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    assert (home / JOURNAL).exists()
    assert tracker.warnings == (), "nothing is lost"
    monkeypatch.setattr(module, "connect", MlflowClient)
    assert close_grid(grid, complete=False, artifacts=[]).delivered == [planned.trial_id]
    (child,) = child_runs(client, str(grid.experiment_id), grid.parent_run_id)
    assert (child.info.run_id, child.info.status) == (tracker.run_id, "FINISHED")
    history = client.get_metric_history(tracker.run_id, "epoch/train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(4, 2.0), (8, 1.5)]
    assert not (home / JOURNAL).exists()
    assert close_grid(grid, complete=True, artifacts=[]).delivered == []
    assert client.get_run(grid.parent_run_id).info.status == "FINISHED"


def test_a_store_without_any_of_a_grid_gets_all_of_it_from_the_records(grid: Grid, trials: list[Trial]) -> None:
    write_plan(grid.folder, trials)
    for _, planned in trials[:3]:
        write_record(grid.folder, finished_record(planned, None))
    failed = finished_record(trials[3][1], None, status="failed", reason="too hot", metrics={})
    write_record(grid.folder, failed)
    client = MlflowClient(grid.uri)
    closed = close_grid(grid, complete=False, artifacts=[])
    assert (closed.problem, len(closed.delivered)) == (None, 4)
    children = {
        run.data.tags["harness.trial_id"]: run
        for run in child_runs(client, str(grid.experiment_id), grid.parent_run_id)
    }
    assert children.keys() == read_run(grid.folder).records.keys()
    assert sorted(run.info.status for run in children.values()) == ["FAILED"] + ["FINISHED"] * 3
    one = children[trials[0][1].trial_id]
    assert one.info.run_name == "LoRA r=4 specific examples=64 lr=0.006 seed=0"
    assert (one.data.metrics["epoch/train_loss"], one.data.metrics["test/cider"]) == (2.0, 0.5)
    # A trial that failed and has finished since, when the server was down.
    write_record(grid.folder, finished_record(trials[3][1], None))
    assert close_grid(grid, complete=True, artifacts=[]).delivered == [trials[3][1].trial_id]
    again = client.get_run(children[trials[3][1].trial_id].info.run_id)
    assert again.info.status == "FINISHED"
    assert "harness.reason" not in again.data.tags


def test_a_journal_that_cannot_be_written_is_a_warning_and_the_trial_is_logged_all_the_same(
    grid: Grid, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(grid.folder, trials)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "_write", full)
    spec, planned = trials[1]
    home = grid.folder / "trials" / planned.trial_id
    tracker = MlflowTracker(grid, spec, planned, home)
    tracker.metrics({"train_loss": 2.0}, step=4)
    assert tracker.warnings == (f"{home / JOURNAL}: MLflow's journal could not be written: No space left on device",)
    record = finished_record(planned, tracker.run_id)
    write_record(grid.folder, record)
    write_atomically(home / "log.txt", "a line\n")
    tracker.finish(record, home)
    run = MlflowClient(grid.uri).get_run(str(tracker.run_id))
    assert (run.info.status, run.data.metrics["epoch/train_loss"]) == ("FINISHED", 2.0)
