"""Run folders fetched from MLflow, compared with the ones that were logged."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.profile import Profile, read_profile, write_profile
from harness.core.record import read_run, write_record
from harness.tracking import fetch
from harness.tracking import grid as tracking_grid
from harness.tracking.fetch import fetch_run
from harness.tracking.grid import close_grid, open_grid, reopen_grid, whole_uri
from harness.tracking.store import default_uri
from harness.tracking.tracker import MlflowTracker
from tests.support.tracking import Trial, artifacts, finished_record, four_trials, write_plan


@pytest.fixture(autouse=True)
def no_system_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return four_trials()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> str:
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_database, folder)
    return default_uri(folder)


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


def log_trial(grid: Any, folder: Path, trial: Trial, **changes: Any) -> None:
    """One trial from its start to its end; ``score`` distinguishes attempts."""
    home = folder / "trials" / trial[1].trial_id
    tracker = MlflowTracker(grid, *trial, home)
    record = finished_record(trial[1], tracker.run_id, **changes)
    write_record(folder, record)
    if record.status == "finished":
        write_atomically(home / "examples.parquet", f"scores of {tracker.run_id}")
        write_atomically(home / "log.txt", "a line\n")
    tracker.finish(record, home)
    assert tracker.warnings == ()


@pytest.fixture
def logged(uri: str, trials: list[Trial], request: pytest.FixtureRequest) -> Path:
    """A run folder, run twice: two trials finish, one fails, one still runs; and earlier runs of these trials exist."""
    name = re.sub(r"\W", "-", request.node.name)[-40:]
    folder = Path(uri.removeprefix("sqlite:///")).parent / name
    write_plan(folder, trials)
    grid = open_grid(uri, "experiment", folder)
    log_trial(grid, folder, trials[0], wall_time_s=1.0)
    log_trial(grid, folder, trials[1], status="failed", reason="first", metrics={})
    close_grid(grid, complete=False, artifacts=[])
    (folder / "trials" / trials[0][1].trial_id / "mlflow_run_id").unlink()  # as of another folder: a run beside it
    log_trial(grid, folder, trials[0], wall_time_s=2.0)
    (folder / "trials" / trials[0][1].trial_id / "mlflow_run_id").unlink()
    log_trial(grid, folder, trials[0], wall_time_s=3.0)
    last = read_run(folder).records[trials[0][1].trial_id]
    MlflowClient(uri).delete_run(str(last.mlflow_run_id))
    grid = open_grid(uri, "experiment", folder)
    log_trial(grid, folder, trials[0], wall_time_s=4.0)  # its run was deleted: a new one
    log_trial(grid, folder, trials[1], status="failed", reason="second", metrics={})
    log_trial(grid, folder, trials[2])
    running = MlflowTracker(grid, *trials[3], folder / "trials" / trials[3][1].trial_id)
    assert running.run_id, "the thread that delivers has made the run, and writes no more"
    return folder


def files(folder: Path) -> dict[str, bytes]:
    left_out = {"mlflow_run_id", "mlflow.jsonl", "log.txt", fetch.MARKER}
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_fetched_run_is_the_run_that_was_logged(uri: str, logged: Path, tmp_path: Path, trials: list[Trial]) -> None:
    fetched = fetch_run(uri, logged.name, tmp_path / "here")
    assert fetched == tmp_path / "here" / logged.name
    original, copy = read_run(logged), read_run(fetched)
    assert copy.plan == original.plan
    assert copy.records == original.records
    assert (len(copy.records), copy.broken, copy.foreign) == (3, (), ())
    assert copy.records[trials[0][1].trial_id].wall_time_s == 4.0
    assert copy.records[trials[1][1].trial_id].reason == "second"
    assert files(fetched) == files(logged)
    assert {path.name for path in fetched.iterdir()} == {
        "plan.json", "experiment.yaml", "trials", fetch.MARKER,
    }  # fmt: skip


def test_the_profile_and_the_previews_are_fetched_too(
    uri: str, logged: Path, tmp_path: Path, trials: list[Trial], client: MlflowClient
) -> None:
    write_profile(logged, Profile(entries=()))
    for name in ("a.png", "b.txt"):
        write_atomically(logged / "previews" / name, f"content of {name}")
    plan = read_run(logged).plan.model_copy(update={"mlflow_uri": uri})
    grid = reopen_grid(plan, logged)
    assert grid is not None
    assert close_grid(grid, complete=False, artifacts=[]).problem is None
    assert close_grid(grid, complete=False, artifacts=[]).problem is None, "logged once, closed twice"
    assert artifacts(client, grid.parent_run_id, "previews") == ["previews/a.png", "previews/b.txt"]
    fetched = fetch_run(uri, logged.name, tmp_path)
    assert files(fetched) == files(logged)
    assert (fetched / "previews" / "a.png").read_text(encoding="utf-8") == "content of a.png"
    assert read_profile(fetched) == Profile(entries=())


def test_a_run_that_was_logged_nowhere_has_no_grid(tmp_path: Path, trials: list[Trial]) -> None:
    write_plan(tmp_path, trials)
    assert reopen_grid(read_run(tmp_path).plan, tmp_path) is None


def test_a_grid_whose_password_is_not_known_is_not_opened(
    tmp_path: Path, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(tmp_path, trials)
    write_atomically(tmp_path / "mlflow_run_id", "0" * 32)
    plan = read_run(tmp_path).plan.model_copy(update={"mlflow_uri": "http://me:***@127.0.0.1:1"})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r":\*\*\*@127.0.0.1:1: its password is not stored; set MLFLOW_TRACKING_URI"):
        reopen_grid(plan, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    with pytest.raises(UserError, match=r"plan.json: 'http://me:\*\*\*@127.0.0.1:1' could not be used"):
        reopen_grid(plan, tmp_path)


def test_credentials_go_to_no_server_that_only_a_plan_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mine:5000")
    with pytest.raises(UserError, match=r"^http://attacker: MLFLOW_TRACKING_TOKEN would be sent there; if it is for"):
        whole_uri("http://attacker")
    assert whole_uri("http://mine:5000") == "http://mine:5000"
    assert whole_uri("sqlite:////runs/mlflow.db") == "sqlite:////runs/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    assert whole_uri("http://attacker") == "http://attacker"


def test_fetching_again_updates_and_removes_trials(
    uri: str, logged: Path, tmp_path: Path, trials: list[Trial], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_grid, "PAGE_SIZE", 2)  # more children than fit on one page
    fetched = fetch_run(uri, logged.name, tmp_path)
    write_atomically(fetched / "report" / "index.html", "made here")
    log_trial(open_grid(uri, "experiment", logged), logged, trials[3])
    gone = read_run(logged).records[trials[2][1].trial_id]
    client.delete_run(str(gone.mlflow_run_id))
    assert fetch_run(uri, logged.name, tmp_path) == fetched
    assert set(read_run(fetched).records) == {trials[number][1].trial_id for number in (0, 1, 3)}
    assert (fetched / "report" / "index.html").is_file()


def test_a_run_is_found_by_id_and_by_experiment(uri: str, logged: Path, tmp_path: Path, client: MlflowClient) -> None:
    again = Path(uri.removeprefix("sqlite:///")).parent / "elsewhere" / logged.name
    shutil.copytree(logged, again, ignore=shutil.ignore_patterns("mlflow_run_id", "trials"))
    other = open_grid(uri, "another", again)
    first = (logged / "mlflow_run_id").read_text(encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"2 parent runs have the name '{logged.name}'; use the id of one:\n"
    ) as caught:
        fetch_run(uri, logged.name, tmp_path)
    for run_id, name in ((first, "experiment"), (other.parent_run_id, "another")):
        assert re.search(rf"{run_id}  \d{{4}}-\d\d-\d\d \d\d:\d\d UTC  {name}/{logged.name}", str(caught.value))
    assert read_run(fetch_run(uri, f"another/{logged.name}", tmp_path / "a")).records == {}
    assert read_run(fetch_run(uri, first, tmp_path / "b")).records == read_run(logged).records
    with pytest.raises(UserError, match=rf"{logged.name}: holds another run of this name, {first}; delete it"):
        fetch_run(uri, other.parent_run_id, tmp_path / "b")


def test_an_unknown_name_or_a_child_run_is_an_error_with_the_nearest_name(
    uri: str, logged: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"--from mlflow:{uri}: .*'{logged.name}x'; .* did you mean '{logged.name}'\?"):
        fetch_run(uri, f"{logged.name}x", tmp_path)
    child = next(iter(read_run(logged).records.values())).mlflow_run_id
    with pytest.raises(UserError, match=f"no parent run '{child}'"):
        fetch_run(uri, str(child), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_not_fetched_is_not_overwritten(uri: str, logged: Path) -> None:
    before = files(logged)
    with pytest.raises(UserError, match=f"{logged}: exists and was not fetched from MLflow"):
        fetch_run(uri, logged.name, logged.parent)
    assert files(logged) == before


def test_a_run_without_a_plan_or_with_artifacts_on_another_machine_is_an_error(
    uri: str, logged: Path, tmp_path: Path, client: MlflowClient
) -> None:
    parent = client.get_run((logged / "mlflow_run_id").read_text(encoding="utf-8"))
    artifacts = Path(parent.info.artifact_uri)
    (artifacts / "plan.json").unlink()
    with pytest.raises(UserError, match=r"has no artifact plan\.json; create its report from its run folder"):
        fetch_run(uri, logged.name, tmp_path)
    artifacts.rename(artifacts.with_name("moved"))
    with pytest.raises(
        UserError, match=f"its artifacts are files in {artifacts}, which does not exist on this machine"
    ):
        fetch_run(uri, logged.name, tmp_path)


def test_names_from_the_server_cannot_leave_the_folder(
    uri: str, logged: Path, tmp_path: Path, client: MlflowClient
) -> None:
    run_id = (logged / "mlflow_run_id").read_text(encoding="utf-8")
    child = next(iter(read_run(logged).records.values())).mlflow_run_id
    for name in ("../outside", "..", "a/b"):
        client.update_run(run_id, name=name)
        with pytest.raises(UserError, match=re.escape(f"its name {name!r} is not a valid folder name")):
            fetch_run(uri, run_id, tmp_path / "into")
        client.update_run(run_id, name="good")
        client.set_tag(str(child), "harness.trial_id", name)
        with pytest.raises(UserError, match=re.escape(f"its tag harness.trial_id is {name!r}")):
            fetch_run(uri, run_id, tmp_path / "into")
    assert [path.name for path in tmp_path.iterdir()] == ["into"]


def test_a_download_that_fails_leaves_what_was_there(
    uri: str, logged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetch_run(uri, logged.name, tmp_path)
    before = files(fetched)
    whole = fetch._download

    def lossy(uri: str, run: Any, names: Any, folder: Path) -> list[str]:
        if folder.parent.name == "trials":
            raise MlflowException("connection reset")
        return whole(uri, run, names, folder)

    monkeypatch.setattr(fetch, "_download", lossy)
    with pytest.raises(UserError, match=f"fetching '{logged.name}' from '{uri}' failed: connection reset"):
        fetch_run(uri, logged.name, tmp_path)
    assert files(fetched) == before


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://127.0.0.1:9", "--from: 'http://127.0.0.1:9' could not be used: "),
        ("sqlite:////nowhere/mlflow.db", "--from: sqlite:////nowhere/mlflow.db: no such file"),
        ("bogus://there", "--from: 'bogus://there' could not be used: "),
    ],
)
def test_a_server_that_cannot_be_reached_is_the_users_error(uri: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        fetch_run(uri, "any", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def server(uri: str, tmp_path: Path) -> Iterator[str]:
    """A real tracking server, which hands out artifacts itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1", "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_through_a_real_server(server: str, logged: Path, tmp_path: Path, trials: list[Trial]) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(logged, folder, ignore=shutil.ignore_patterns("mlflow_run_id", "trials"))
    grid = open_grid(server, "remote", folder)
    log_trial(grid, folder, trials[0])
    log_trial(grid, folder, trials[1], status="failed", reason="killed", metrics={})
    write_atomically(folder / "report" / "index.html", "<p>report</p>")
    assert close_grid(grid, complete=False, artifacts=[folder / "report" / "index.html"]).problem is None
    fetched = fetch_run(server, "remote", tmp_path / "here")
    assert read_run(fetched).records == read_run(folder).records
    assert len(read_run(fetched).records) == 2
    assert files(fetched) == {name: content for name, content in files(folder).items() if not name.startswith("report")}
    with pytest.raises(UserError, match="did you mean 'remote'"):
        fetch_run(server, "remotes", tmp_path / "here")
