"""MLflow, the real one, on SQLite: parent and child runs, restarts, and failures that do not fail a trial."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.record import read_run, write_record
from harness.tracking.delivery import PARENT_TAG, RECORD_TAG
from harness.tracking.grid import Grid, close_grid, open_grid
from harness.tracking.store import check_uri, default_uri, redacted, sqlite_path
from harness.tracking.tracker import MlflowTracker
from results.leaderboard.recommend import recommend
from results.leaderboard.table import build_leaderboard
from tests.support.runs import fake_plan, write_run
from tests.support.tracking import Trial, artifacts, finished_record, four_trials, new_grid, write_plan

DEAD_SERVER = "http://127.0.0.1:9"  # the discard port: refused at once


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    """A folder of run folders with one database."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_database, folder)
    return folder


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return four_trials()


@pytest.fixture(scope="module")
def client(runs: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=default_uri(runs))


@pytest.fixture
def grid(runs: Path, request: pytest.FixtureRequest) -> Grid:
    return new_grid(runs, request.node.name)


def test_a_grid_is_one_parent_run_in_its_experiment(grid: Grid, client: MlflowClient, runs: Path) -> None:
    parent = client.get_run(grid.parent_run_id)
    folder = runs / "test_a_grid_is_one_parent_run_in_its_experiment"
    assert client.get_experiment(grid.experiment_id).name == folder.name
    assert parent.info.run_name == folder.name
    assert parent.info.status == "RUNNING"
    assert parent.data.tags["harness.kind"] == "grid"
    assert parent.data.tags["harness.run_folder"] == str(folder)
    assert f"`harness report {folder}`" in parent.data.tags["mlflow.note.content"]
    assert (runs / "mlflow.db").is_file()


def test_a_trial_is_a_child_run_with_everything_in_it(
    grid: Grid, client: MlflowClient, tmp_path: Path, trials: list[Trial]
) -> None:
    spec, planned = trials[0]
    folder = tmp_path / "trials" / planned.trial_id
    tracker = MlflowTracker(grid, spec, planned, folder)
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).info.status == "RUNNING"
    tracker.metrics({"train_loss": 2.5, "validation_perplexity": 9.5}, step=2)
    tracker.metrics({"train_loss": 2.0, "validation_perplexity": 9.0, "learning_rate": 1e-3}, step=4)
    record = finished_record(planned, tracker.run_id)
    write_record(tmp_path, record)
    (folder / "log.txt").write_text("a line\n", encoding="utf-8")
    tracker.finish(record, folder)
    assert tracker.warnings == ()

    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "LoRA r=4 specific examples=64 lr=0.006 seed=0")
    expected = {
        PARENT_TAG: grid.parent_run_id,
        "harness.kind": "trial",
        "harness.trial_id": planned.trial_id,
        "harness.label": "LoRA r=4",
        "harness.setting": "examples=64",
        "harness.status": "finished",
        "harness.device": "cpu",
        "harness.git_revision": "0123456789ab",
    }
    assert expected.items() <= run.data.tags.items()
    params = {
        "task": "scenes", "method": "lora", "grouping": "specific", "rank": "4", "examples": "64", "epochs": "1",
        "learning_rate": "0.006", "seed": "0", "language_model": "builtin/tiny-llama",
        "adapter.grouping.image": "image", "optimizer.bf16": "False",
    }  # fmt: skip
    assert params.items() <= run.data.params.items()
    assert not [key for key, value in run.data.params.items() if key.endswith(".target") or value in ("", "None", "[]")]
    losses = client.get_metric_history(tracker.run_id, "epoch/train_loss")
    assert [(metric.step, metric.value) for metric in losses] == [(2, 2.5), (4, 2.0)]
    rates = client.get_metric_history(tracker.run_id, "schedule/learning_rate")
    assert [(metric.step, metric.value) for metric in rates] == [(4, 1e-3)]
    curves = ("epoch/", "schedule/")
    assert {metric.step for metric in run.data._metric_objs if not metric.key.startswith(curves)} == {0}
    inputs = {input_.tags[0].value: input_.dataset for input_ in run.inputs.dataset_inputs}
    assert {context: dataset.digest for context, dataset in inputs.items()} == {
        "training": "e" * 36,
        "evaluation": "v" * 36,
    }
    assert (inputs["training"].name, inputs["training"].profile) == ("scenes training", '{"num_rows": 64}')
    assert run.data.metrics == {
        "epoch/train_loss": 2.0, "epoch/validation_perplexity": 9.0, "schedule/learning_rate": 1e-3,
        "validation/perplexity": 8.0, "test/perplexity": 7.5, "test/cider": 0.5,
        "system/wall_time_s": 1.5, "system/best_epoch": 1, "system/phases_s/train": 1.25,
        "system/parameters/trainable": 30, "system/parameters/adapter": 20, "system/parameters/projector": 10,
        "system/parameters/language_model": 100, "system/parameters/encoder": 50, "system/parameters/total": 180,
        "system/memory/weights_bytes": 4, "system/memory/gradients_bytes": 3, "system/memory/optimizer_bytes": 2,
        "system/memory/activations_bytes": 1, "system/throughput/examples_per_s": 12.5,
        "system/throughput/tokens_per_s": 100.0, "system/throughput/measured_steps": 4,
    }  # fmt: skip
    assert sorted(file.path for file in client.list_artifacts(tracker.run_id)) == ["log.txt", "record.json"]


def test_a_failed_trial_logs_the_reason_and_counts_as_failed(
    grid: Grid, client: MlflowClient, tmp_path: Path, trials: list[Trial]
) -> None:
    spec, planned = trials[0]
    tracker = MlflowTracker(grid, spec, planned, tmp_path)
    parts = ("parameters", "memory", "throughput", "data", "best_epoch")
    changes: dict[str, Any] = {"metrics": {}, "history": (), "phases_s": {}, **dict.fromkeys(parts)}
    tracker.finish(finished_record(planned, None, status="out_of_memory", reason="too large", **changes), tmp_path)
    assert tracker.warnings == ()
    assert tracker.run_id is not None
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["harness.reason"] == "too large"
    assert run.data.tags["harness.status"] == "out_of_memory"
    assert run.data.metrics == {"system/wall_time_s": 1.5}


def test_running_again_reuses_the_same_runs(
    grid: Grid, client: MlflowClient, runs: Path, tmp_path: Path, trials: list[Trial]
) -> None:
    spec, planned = trials[0]
    first = MlflowTracker(grid, spec, planned, tmp_path)
    first.finish(finished_record(planned, None, status="failed", reason="killed"), tmp_path)
    close_grid(grid, complete=False, artifacts=[])
    assert client.get_run(grid.parent_run_id).info.status == "FAILED"

    again = new_grid(runs, "test_running_again_reuses_the_same_runs")
    assert again == grid
    second = MlflowTracker(again, spec, planned, tmp_path)
    assert second.run_id == first.run_id
    assert second.run_id is not None
    running = client.get_run(second.run_id)
    assert running.info.status == "RUNNING"
    assert {"harness.status", "harness.reason"}.isdisjoint(running.data.tags)  # of the failed attempt
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


def test_a_run_id_of_another_server_is_not_reused(grid: Grid, runs: Path) -> None:
    name = "test_a_run_id_of_another_server_is_not_reused"
    (runs / name / "mlflow_run_id").write_text("0" * 32, encoding="utf-8")
    again = new_grid(runs, name)
    assert again.experiment_id == grid.experiment_id
    assert again.parent_run_id not in ("0" * 32, grid.parent_run_id)
    assert (runs / name / "mlflow_run_id").read_text(encoding="utf-8") == again.parent_run_id


def test_running_again_updates_tags_and_does_not_reuse_a_deleted_run(
    grid: Grid, client: MlflowClient, runs: Path, tmp_path: Path, trials: list[Trial]
) -> None:
    spec, planned = trials[0]
    first = MlflowTracker(grid, spec, planned, tmp_path)
    assert first.run_id is not None
    renamed = planned.model_copy(update={"label": "LoRA r=4 alpha=8"})
    options = {"label": "LoRA r=4 alpha=8", "grouping_name": "image=image"}
    respelled = spec.model_copy(update={"adapter": spec.adapter.model_copy(update=options)})
    again = MlflowTracker(grid, respelled, renamed, tmp_path)
    assert (again.run_id, again.warnings) == (first.run_id, ())
    run = client.get_run(str(again.run_id))
    assert run.data.tags["harness.label"] == "LoRA r=4 alpha=8"
    assert run.info.run_name.startswith("LoRA r=4 alpha=8 specific")
    client.delete_run(run.info.run_id)
    client.delete_run(grid.parent_run_id)
    other = new_grid(runs, "test_running_again_updates_tags_and_does_not_reuse_a_deleted_run")
    assert other.parent_run_id != grid.parent_run_id
    third = MlflowTracker(other, spec, planned, tmp_path)
    assert third.warnings == ()
    assert third.run_id not in (None, first.run_id)


def test_plan_experiment_and_report_are_artifacts_of_the_parent_run_and_not_doubled_by_another_run(
    runs: Path, client: MlflowClient, trials: list[Trial]
) -> None:
    folder = runs / "with-report"
    write_plan(folder, trials)
    for file in ("index.html", "leaderboard.csv", "figures/curve.png"):
        write_atomically(folder / "report" / file, file)
    for text in ("first", "second"):
        write_atomically(folder / "report" / "index.html", text)
        grid = new_grid(runs, "with-report")
        assert {"plan.json", "experiment.yaml"} <= set(artifacts(client, grid.parent_run_id))  # while it runs
        write_record(folder, finished_record(trials[0][1], None))
        write_record(folder, finished_record(trials[1][1], None, status="failed", reason="killed"))
        files = [path for path in (folder / "report").rglob("*") if path.is_file()]
        assert close_grid(grid, complete=text == "second", artifacts=files).problem is None
    assert artifacts(client, grid.parent_run_id) == [
        "experiment.yaml", "plan.json", "report/figures/curve.png", "report/index.html", "report/leaderboard.csv",
    ]  # fmt: skip
    page = client.download_artifacts(grid.parent_run_id, "report/index.html")
    assert Path(page).read_text(encoding="utf-8") == "second"
    run = client.get_run(grid.parent_run_id)
    assert run.info.status == "FINISHED"


def test_the_leaderboard_is_logged_when_a_grid_ends(runs: Path, client: MlflowClient) -> None:
    folder = write_run(runs / "with-scores", fake_plan(seeds=(0, 1), settings=("",)))
    grid = new_grid(runs, "with-scores")
    board = build_leaderboard(read_run(folder))
    children = {}
    for trial in board.run.plan.trials[:4]:
        tags = {PARENT_TAG: grid.parent_run_id, "harness.kind": "trial", "harness.trial_id": trial.trial_id}
        children[trial.trial_id] = client.create_run(grid.experiment_id, tags=tags).info.run_id
        client.set_terminated(children[trial.trial_id])
    assert close_grid(grid, complete=True, artifacts=[], board=board).problem is None
    row = next(row for row in board.rows if row.method == "none")
    child = client.get_run(children[row.trials[0].trial_id])
    assert child.data.metrics["leaderboard/cider"] == pytest.approx(row.metrics["cider"].mean)
    assert child.data.tags["harness.rank"] == row.rank_text
    parent = client.get_run(grid.parent_run_id)
    assert parent.data.tags["harness.trials_planned"] == "16"
    assert parent.data.tags["mlflow.note.content"].startswith(f"**Recommended:** {recommend(board)[0].sentence}")
    assert parent.data.metrics["leaderboard/none"] == pytest.approx(row.metrics["cider"].mean)
    view = client.get_experiment(grid.experiment_id).tags[f"mlflow.sharedViewState.harness-{grid.parent_run_id[:12]}"]
    found = client.search_runs([grid.experiment_id], json.loads(view)["searchFilter"])
    assert {run.info.run_id for run in found} > set(children.values())
    assert sorted(run.data.tags["harness.trial_id"] for run in found) == sorted(
        t.trial_id for t in board.run.plan.trials
    )
    assert grid.trials_link.endswith(f"viewStateShareKey=harness-{grid.parent_run_id[:12]}")


def test_a_trial_whose_process_died_does_not_run_forever(
    grid: Grid, client: MlflowClient, runs: Path, trials: list[Trial]
) -> None:
    folder = runs / "test_a_trial_whose_process_died_does_not_run_forever"
    died, cut = (MlflowTracker(grid, *trial, folder / "trials" / trial[1].trial_id) for trial in trials[:2])
    assert None not in (died.run_id, cut.run_id)
    write_plan(folder, trials)
    write_record(folder, finished_record(trials[0][1], None, status="failed", reason="the worker process died"))
    client.set_tag(str(cut.run_id), RECORD_TAG, "sent, before its files")
    assert close_grid(grid, complete=False, artifacts=[]).problem is None
    one, other = (client.get_run(str(tracker.run_id)) for tracker in (died, cut))
    assert (one.info.status, one.data.tags["harness.reason"]) == ("FAILED", "the worker process died")
    assert artifacts(client, one.info.run_id) == ["record.json"]
    assert (other.info.status, other.data.tags["harness.reason"]) == (
        "KILLED",
        "the process ended before the trial finished",
    )
    assert RECORD_TAG not in other.data.tags, "it has not all of that record"


@pytest.mark.parametrize(
    "uri", [DEAD_SERVER, "sqlite:////dev/null/mlflow.db", "bogus://nowhere"], ids=["refused", "no folder", "scheme"]
)
def test_a_tracking_uri_that_cannot_be_used_is_the_users_error_within_seconds(uri: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=re.escape(f"tracking.mlflow_uri: '{uri}' could not be used: ")):
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


def test_a_password_is_in_no_artifact_warning_or_log(
    runs: Path, client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    trials: list[Trial], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    uri = "postgresql://user:s3cret@db/mlflow"
    write_atomically(runs / "secret" / "experiment.yaml", f"tracking: {{mlflow_uri: '{uri}'}}\n")
    monkeypatch.setattr("harness.tracking.grid.connect", lambda _: client)
    grid = open_grid(uri, "secret", runs / "secret")
    kept = Path(client.download_artifacts(grid.parent_run_id, "experiment.yaml")).read_text(encoding="utf-8")
    assert kept == "tracking: {mlflow_uri: 'postgresql://user:***@db/mlflow'}\n"

    def refuse(_: str) -> None:
        raise ConnectionError(f"no route to {uri}")

    monkeypatch.setattr("harness.tracking.delivery.connect", refuse)
    monkeypatch.setattr("harness.tracking.grid.connect", refuse)
    with caplog.at_level("INFO"):
        tracker = MlflowTracker(grid, *trials[0], tmp_path)
        assert tracker.run_id is None
    problem = close_grid(grid, complete=True, artifacts=[]).problem
    assert problem == "no route to postgresql://user:***@db/mlflow"
    assert "user:***@db" in caplog.text
    assert "Traceback" in caplog.text
    assert "s3cret" not in f"{tracker.warnings} {caplog.text} {client.get_run(grid.parent_run_id).data}"


NAMES = ["is it?yes", "50%25off", "a#b", "ü ß", "anna's"]


@pytest.mark.parametrize("name", [" ".join(NAMES), *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    runs = tmp_path / "top" / name
    (runs / "grid").mkdir(parents=True)
    uri = default_uri(runs)
    assert sqlite_path(uri) == runs / "mlflow.db"
    check_uri(uri)
    grid = open_grid(uri, "e", runs / "grid")
    (runs / "grid" / "report").mkdir()
    (runs / "grid" / "report" / "index.html").write_text("report")
    assert close_grid(grid, True, [runs / "grid" / "report"]).problem is None
    assert (runs / "mlflow.db").is_file()
    assert [path.name for path in (runs / "mlartifacts").rglob("*.html")] == ["index.html"]
    assert [path.name for path in (tmp_path / "top").iterdir()] == [name]  # nothing is written next to it


def test_options_of_a_database_uri_are_no_part_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "grid").mkdir()
    open_grid(f"sqlite:///{tmp_path}/m.db?timeout=60", "e", tmp_path / "grid")
    assert (tmp_path / "m.db").is_file()
    assert not (tmp_path / "m.db?timeout=60").exists()
    assert sqlite_path("http://host:5000") is None


def test_a_deleted_mlflow_experiment_is_refused(tmp_path: Path, mlflow_database: Path) -> None:
    shutil.copy(mlflow_database, tmp_path)
    (tmp_path / "grid").mkdir()
    uri = default_uri(tmp_path)
    grid = open_grid(uri, "mine", tmp_path / "grid")
    check_uri(uri, experiment="mine")
    MlflowClient(uri).delete_experiment(grid.experiment_id)
    with pytest.raises(UserError, match=rf"'mine' .* is deleted; .*--experiment-id {grid.experiment_id}\)"):
        check_uri(uri, experiment="mine")
    check_uri(uri, experiment="other")
