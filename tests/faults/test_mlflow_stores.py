"""MLflow's stores under 8 writing processes, and a delivery that is killed again and again: every point there, once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from harness import sync_run
from harness.tracking.grid import child_runs, close_grid, open_grid
from harness.tracking.journal import JOURNAL
from harness.tracking.store import check_uri, default_uri
from tests.support.mlflow_writer import EPOCHS, planned_of, value_of
from tests.support.runs import fake_plan, write_run
from tests.support.stores import install_postgresql, postgresql
from tests.support.tracking import four_trials, write_plan

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]  # on a busy machine
WRITERS = 8


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, mlflow_database: Path) -> Iterator[str]:
    if request.param == "SQLite":
        shutil.copy(mlflow_database, tmp_path)
        yield default_uri(tmp_path)
        return
    if why := install_postgresql():
        pytest.skip(why)
    with postgresql() as address:
        yield address


def test_8_processes_lose_and_double_no_point(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    spec = four_trials()[0][0]
    write_plan(folder, [(spec, planned) for number in range(WRITERS) for planned in planned_of(number)])
    check_uri(uri)  # makes the schema, in one process
    grid = open_grid(uri, "grid", folder)
    command = [sys.executable, "-m", "tests.support.mlflow_writer", uri, str(grid.experiment_id), grid.parent_run_id]
    subprocess.run([*command, str(folder), str(WRITERS)], check=True, timeout=800)
    closed = close_grid(grid, complete=True, artifacts=[])
    assert closed.problem is None
    client = MlflowClient(uri)
    children = list(child_runs(client, str(grid.experiment_id), grid.parent_run_id))
    wanted = [planned.trial_id for number in range(WRITERS) for planned in planned_of(number)]
    assert sorted(child.data.tags["harness.trial_id"] for child in children) == sorted(wanted)
    assert {child.info.status for child in children} == {"FINISHED"}
    for child in children:
        trial_id = child.data.tags["harness.trial_id"]
        for key, sign in (("epoch/train_loss", 1), ("epoch/validation_perplexity", -1)):
            points = client.get_metric_history(child.info.run_id, key)
            expected = [(epoch, sign * value_of(trial_id, epoch)) for epoch in range(1, EPOCHS + 1)]
            assert sorted((point.step, point.value) for point in points) == expected
    assert list(folder.rglob(JOURNAL)) == []


def test_a_delivery_that_is_killed_again_and_again_delivers_everything_once(
    tmp_path: Path, mlflow_database: Path
) -> None:
    shutil.copy(mlflow_database, tmp_path)
    uri = default_uri(tmp_path)
    folder = write_run(tmp_path / "grid", fake_plan(settings=("",), mlflow_uri=uri))
    command = [sys.executable, "-m", "tests.support.killed_syncs", str(folder), "8", "15"]
    done = subprocess.run(command, check=True, timeout=800, capture_output=True, text=True)
    assert int(done.stdout) >= 2
    sync_run(folder)
    again = sync_run(folder)
    assert again.delivered == ()
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("synthetic")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id], "tags.`harness.kind` = 'trial'"))
    planned = fake_plan(settings=("",)).trials
    assert sorted(run.data.tags["harness.trial_id"] for run in runs) == sorted(trial.trial_id for trial in planned)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        for key in run.data.metrics:
            if not key.startswith("leaderboard/"):
                points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
                assert len(points) == len(set(points)), key
    grids = list(client.search_runs([experiment.experiment_id], "tags.`harness.kind` = 'grid'"))
    assert [grid.info.status for grid in grids] == ["FINISHED"]
