"""MLflow, the real one, on SQLite: parent and child runs, going on after a restart, and failures that cost no trial."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from harness.errors import UserError
from harness.experiment import load_experiment
from harness.plan import TrialSpec, describe, expand
from harness.record import Memory, MetricInfo, Parameters, PlannedTrial, Throughput, TrialRecord, write_record
from harness.tracking import PARENT_TAG, Grid, MlflowTracker, check_uri, close_grid, default_uri, open_grid, redacted

DEAD_SERVER = "http://127.0.0.1:9"  # the discard port: refused at once
EXPERIMENT = """\
name: grid
task: scenes
adapters: [{method: lora, rank: 4, grouping: [specific, {image: vision, text: null}], learning_rate: 6e-3}]
budget: {examples: [64, 128]}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of run folders with one database, whose schema takes seconds to make."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trials(runs: Path) -> list[tuple[TrialSpec, PlannedTrial]]:
    path = runs / "experiment.yaml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    experiment = load_experiment(path)
    specs = expand(experiment)
    info = MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False)
    return list(zip(specs, describe(experiment, specs, (info,), "").trials, strict=True))


@pytest.fixture(scope="module")
def client(runs: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=default_uri(runs))


@pytest.fixture
def grid(runs: Path, request: pytest.FixtureRequest) -> Grid:
    return new_grid(runs, request.node.name)


def new_grid(runs: Path, name: str) -> Grid:
    (runs / name).mkdir(exist_ok=True)
    return open_grid(default_uri(runs), name, runs / name)


def finished_record(planned: PlannedTrial, run_id: str | None, **changes: Any) -> TrialRecord:
    fields: dict[str, Any] = {
        "trial_id": planned.trial_id,
        "experiment": "grid",
        "status": "finished",
        "spec": {},
        "seed": 0,
        "metrics": {"validation": {"perplexity": 8.0}, "test": {"perplexity": 7.5, "cider": 0.5}},
        "history": ({"epoch": 1, "step": 4, "train_loss": 2.0, "validation_perplexity": 9.0, "learning_rate": 1e-3},),
        "parameters": Parameters(trainable=30, adapter=20, projector=10, language_model=100, encoder=50, total=180),
        "memory": Memory(weights_bytes=4, gradients_bytes=3, optimizer_bytes=2, activations_bytes=1),
        "throughput": Throughput(examples_per_s=12.5, tokens_per_s=100.0, measured_steps=4),
        "wall_time_s": 1.5,
        "started_at": "2026-01-01T00:00:00+00:00",
        "mlflow_run_id": run_id,
    }
    return TrialRecord(**fields | changes)


def test_a_grid_is_one_parent_run_in_its_experiment(grid: Grid, client: MlflowClient, runs: Path) -> None:
    parent = client.get_run(grid.parent_run_id)
    folder = runs / "test_a_grid_is_one_parent_run_in_its_experiment"
    assert client.get_experiment(grid.experiment_id).name == folder.name
    assert parent.info.run_name == folder.name
    assert parent.info.status == "RUNNING"
    assert parent.data.tags["harness.kind"] == "grid"
    assert parent.data.tags["harness.run_folder"] == str(folder)
    assert (runs / "mlflow.db").is_file()


def test_a_trial_is_a_child_run_with_everything_in_it(
    grid: Grid, client: MlflowClient, tmp_path: Path, trials: list[tuple[TrialSpec, PlannedTrial]]
) -> None:
    spec, planned = trials[0]
    folder = tmp_path / "trials" / planned.trial_id
    tracker = MlflowTracker(grid, spec, planned, folder)
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    tracker.metrics({"train_loss": 2.5, "validation_perplexity": 9.5}, step=2)
    tracker.metrics({"train_loss": 2.0, "validation_perplexity": 9.0}, step=4)
    record = finished_record(planned, tracker.run_id)
    write_record(tmp_path, record)
    (folder / "log.txt").write_text("a line\n", encoding="utf-8")
    tracker.finish(record, folder)
    assert tracker.warnings == ()

    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "LoRA r=4 specific examples=64 seed=0")
    expected = {
        PARENT_TAG: grid.parent_run_id,
        "harness.kind": "trial",
        "harness.trial_id": planned.trial_id,
        "harness.method": "lora",
        "harness.grouping": "specific",
    }
    assert expected.items() <= run.data.tags.items()
    params = {"adapter.config.rank": "4", "budget.examples": "64", "optimizer.learning_rate": "0.006", "seed": "0"}
    assert params.items() <= run.data.params.items()
    losses = client.get_metric_history(tracker.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in losses] == [(2, 2.5), (4, 2.0)]
    assert run.data.metrics == {
        "train_loss": 2.0, "validation_perplexity": 9.0, "validation/perplexity": 8.0, "test/perplexity": 7.5,
        "test/cider": 0.5, "wall_time_s": 1.5, "parameters/trainable": 30, "parameters/adapter": 20,
        "parameters/projector": 10, "parameters/language_model": 100, "parameters/encoder": 50, "parameters/total": 180,
        "memory/weights_bytes": 4, "memory/gradients_bytes": 3, "memory/optimizer_bytes": 2,
        "memory/activations_bytes": 1, "throughput/examples_per_s": 12.5, "throughput/tokens_per_s": 100.0,
        "throughput/measured_steps": 4,
    }  # fmt: skip
    assert sorted(file.path for file in client.list_artifacts(tracker.run_id)) == ["log.txt", "record.json"]


def test_a_failed_trial_says_why_and_counts_as_failed(
    grid: Grid, client: MlflowClient, tmp_path: Path, trials: list[tuple[TrialSpec, PlannedTrial]]
) -> None:
    spec, planned = trials[0]
    tracker = MlflowTracker(grid, spec, planned, tmp_path)
    changes: dict[str, Any] = {"metrics": {}, "history": (), "parameters": None, "memory": None, "throughput": None}
    tracker.finish(finished_record(planned, None, status="out_of_memory", reason="too large", **changes), tmp_path)
    assert tracker.warnings == ()
    assert tracker.run_id is not None
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["harness.reason"] == "too large"
    assert run.data.metrics == {"wall_time_s": 1.5}


def test_run_again_goes_on_with_the_same_runs(
    grid: Grid, client: MlflowClient, runs: Path, tmp_path: Path, trials: list[tuple[TrialSpec, PlannedTrial]]
) -> None:
    spec, planned = trials[0]
    first = MlflowTracker(grid, spec, planned, tmp_path)
    first.finish(finished_record(planned, None, status="failed", reason="killed"), tmp_path)
    close_grid(grid, complete=False, artifacts=[])
    assert client.get_run(grid.parent_run_id).info.status == "FAILED"

    again = new_grid(runs, "test_run_again_goes_on_with_the_same_runs")
    assert again == grid
    second = MlflowTracker(again, spec, planned, tmp_path)
    assert second.run_id == first.run_id
    assert second.run_id is not None
    assert client.get_run(second.run_id).info.status == "RUNNING"
    other = MlflowTracker(again, *trials[1], tmp_path / "other")
    assert other.run_id != second.run_id
    second.finish(finished_record(planned, None), tmp_path)
    assert client.get_run(second.run_id).info.status == "FINISHED"
    children = client.search_runs([again.experiment_id], f"tags.`{PARENT_TAG}` = '{again.parent_run_id}'")
    assert {run.info.run_id for run in children} == {first.run_id, other.run_id}


def test_a_grid_that_is_run_again_is_running_again(grid: Grid, client: MlflowClient, runs: Path) -> None:
    close_grid(grid, complete=False, artifacts=[])
    again = new_grid(runs, "test_a_grid_that_is_run_again_is_running_again")
    assert client.get_run(again.parent_run_id).info.status == "RUNNING"


def test_a_run_id_of_another_server_is_not_taken_for_one_of_this(grid: Grid, runs: Path) -> None:
    name = "test_a_run_id_of_another_server_is_not_taken_for_one_of_this"
    (runs / name / "mlflow_run_id").write_text("0" * 32, encoding="utf-8")
    again = new_grid(runs, name)
    assert again.experiment_id == grid.experiment_id
    assert again.parent_run_id not in ("0" * 32, grid.parent_run_id)
    assert (runs / name / "mlflow_run_id").read_text(encoding="utf-8") == again.parent_run_id


def test_the_report_is_an_artifact_of_the_parent_run(grid: Grid, client: MlflowClient, tmp_path: Path) -> None:
    report = tmp_path / "index.html"
    report.write_text("<p>report</p>", encoding="utf-8")
    close_grid(grid, complete=True, artifacts=[report])
    assert client.get_run(grid.parent_run_id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(grid.parent_run_id)] == ["index.html"]


class Failing:
    """A client whose connection is lost after some calls."""

    def __init__(self, client: Any, calls: int) -> None:
        self._client, self.calls = client, calls

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.calls -= 1
            if self.calls < 0:
                raise MlflowException("the database\nis locked")
            return getattr(self._client, name)(*args, **options)

        return call


def test_a_server_lost_mid_way_costs_a_warning(
    grid: Grid, client: MlflowClient, tmp_path: Path, trials: list[tuple[TrialSpec, PlannedTrial]]
) -> None:
    spec, planned = trials[0]
    tracker = MlflowTracker(grid, spec, planned, tmp_path)
    failing = Failing(client, calls=1)
    tracker._client = failing
    for step in (2, 4, 6):
        tracker.metrics({"train_loss": 2.0}, step=step)
    tracker.finish(finished_record(planned, tracker.run_id), tmp_path)
    assert tracker.warnings == ("MLflow logging stopped: MlflowException: the database is locked",)
    assert failing.calls == -1  # after the first failure nothing more is tried
    assert tracker.run_id is not None
    assert [metric.step for metric in client.get_metric_history(tracker.run_id, "train_loss")] == [2]


@pytest.mark.parametrize("uri", [DEAD_SERVER, "sqlite:////dev/null/mlflow.db"])
def test_a_trial_survives_a_tracking_uri_that_is_gone(
    uri: str, tmp_path: Path, trials: list[tuple[TrialSpec, PlannedTrial]]
) -> None:
    spec, planned = trials[0]
    tracker = MlflowTracker(Grid(uri, "1", "0" * 32), spec, planned, tmp_path)
    tracker.metrics({"train_loss": 2.0}, step=1)
    tracker.finish(finished_record(planned, None), tmp_path)
    assert tracker.run_id is None
    assert len(tracker.warnings) == 1
    assert tracker.warnings[0].startswith("MLflow logging stopped: ")


def test_a_server_lost_at_the_end_is_told_and_does_not_take_the_last_screen_with_it() -> None:
    reason = close_grid(Grid(DEAD_SERVER, "1", "0" * 32), complete=True, artifacts=[])
    assert reason is not None
    assert reason.startswith("API request to http://127.0.0.1:9/")


@pytest.mark.parametrize(
    "uri", [DEAD_SERVER, "sqlite:////dev/null/mlflow.db", "bogus://nowhere"], ids=["refused", "no folder", "scheme"]
)
def test_a_tracking_uri_that_cannot_be_used_is_the_users_error_within_seconds(uri: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=re.escape(f"tracking.mlflow_uri: '{uri}' cannot be used: ")):
        open_grid(uri, "grid", tmp_path)
    assert time.monotonic() - began < 20
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_not_shown() -> None:
    uri = "postgresql://user:s3cret@127.0.0.1:9/mlflow"
    assert redacted(uri) == "postgresql://user:***@127.0.0.1:9/mlflow"
    assert redacted("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"
    with pytest.raises(UserError, match=r"user:\*\*\*@127\.0\.0\.1") as caught:
        check_uri(uri)
    assert "s3cret" not in str(caught.value)
