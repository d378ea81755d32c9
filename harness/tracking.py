"""MLflow: one experiment, one parent run per grid, one child run per trial; ``tracking_fetch`` reads them back.

The record on disk is the truth and comes first; MLflow is its mirror for people who compare runs. A tracking server
that fails in the middle of a trial costs a warning in the record, never the trial. docs/mlflow.md names everything
that is logged.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from harness.errors import UserError
from harness.plan import TrialSpec
from harness.record import PlannedTrial, TrialRecord, read_record, read_run, record_path
from harness.tracking_system import SystemMetrics
from harness.tracking_trial import log_end, log_metrics, log_params

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
FOLDER_TAG = "harness.run_folder"
PAGE_SIZE = 1000  # of a search for runs
RUN_FILES = ("plan.json", "experiment.yaml")
_OUTCOME_TAGS = {"harness.status", "harness.reason"}


class Tracker(Protocol):
    """What a trial tells the outside while it runs."""

    run_id: str | None
    warnings: tuple[str, ...]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Metrics of one moment in training."""

    def finish(self, record: TrialRecord, folder: Path) -> None:
        """The trial has ended and its record lies in ``folder``."""


@dataclass(frozen=True)
class Grid:
    """Where the trials of one run folder log to; small enough to travel to a worker."""

    uri: str
    experiment_id: str
    parent_run_id: str


def default_uri(runs: Path) -> str:
    """MLflow's own ``MLFLOW_TRACKING_URI``, else SQLite beside the run folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs.resolve() / 'mlflow.db'}"


def redacted(uri: str) -> str:
    """The URI as it may be shown and stored: without the password of a database or server."""
    return _without_password(uri, uri)


def _without_password(text: str, uri: str) -> str:
    password = urlsplit(uri).password
    return text.replace(f":{password}@", ":***@") if password else text


def reason_of(error: Exception, uri: str) -> str:
    """An error of the store on one line, without the password of its URI."""
    return " ".join(_without_password(str(error), uri).split())[:300]


def connect(uri: str) -> Any:
    """A client that fails fast: with MLflow's own settings a server that is down blocks every call for minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def check_uri(uri: str, where: str = "tracking.mlflow_uri") -> None:
    """See that the store answers; ``where`` is what the user wrote the URI for.

    Raises:
        UserError: it does not.
    """
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # whatever a database driver or an HTTP client may raise
        raise _unusable(uri, error, where) from error


def _unusable(uri: str, error: Exception, where: str = "tracking.mlflow_uri") -> UserError:
    return UserError(f"{where}: {redacted(uri)!r} cannot be used: {reason_of(error, uri)}")


def child_runs(client: Any, experiment_id: str, parent_run_id: str, condition: str = "") -> Iterator[Any]:
    """The runs of a grid's trials, however many; ``condition`` is one more term of MLflow's filter."""
    term, token = f"tags.`{PARENT_TAG}` = '{parent_run_id}'", None
    while True:
        page = client.search_runs(
            [experiment_id], " and ".join(filter(None, (term, condition))), max_results=PAGE_SIZE, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def open_grid(uri: str, experiment: str, run_folder: Path) -> Grid:
    """Create schema, experiment and parent run, once, in the driver: several processes at first use would race.

    A run folder that is run again goes on with its parent run. Its plan and experiment file, where they are there
    already, become artifacts, so that a grid that still runs can be fetched.

    Raises:
        UserError: the tracking server or database cannot be used.
    """
    from mlflow.exceptions import MlflowException

    try:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            place = f"{run_folder.parent.resolve() / 'mlartifacts'}" if uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(experiment, artifact_location=place)
        else:
            experiment_id = found.experiment_id
        tags = {"harness.kind": "grid", FOLDER_TAG: str(run_folder.resolve()), "mlflow.note.content": _note(run_folder)}
        parent = str(_open_run(client, experiment_id, run_folder, run_folder.name, tags)[0].info.run_id)
        for path in filter(Path.exists, (run_folder / name for name in RUN_FILES)):
            client.log_text(parent, _without_password(path.read_text(encoding="utf-8"), uri), path.name)
    except (MlflowException, OSError, ImportError, ValueError) as error:
        raise _unusable(uri, error) from error
    if uri.startswith("sqlite:///"):
        # Write-ahead logging: trials write at the same time; measured median of a write 6 ms instead of 22.
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    return Grid(uri, experiment_id, parent)


def _note(run_folder: Path) -> str:
    """What the parent run says of itself in MLflow's page, as Markdown."""
    return f"""\
One grid of trials: its child runs are one adapter, learning rate, data budget and seed each.

- **Report:** `report/index.html` among the artifacts, once the grid has ended. To render it again:
  `harness report {run_folder.resolve()}`, or from this server
  `harness report {run_folder.name} --from mlflow:URI --output FOLDER`.
- **Scores:** `test/…` and `validation/…`, of the epoch that validated best. **Curves** by optimizer step: `epoch/…`.
- **Status:** a run that is `FAILED` or `KILLED` says why in its tag `harness.reason`.
- "Model training", at the top left of the page, shows the pages made for runs like these. Every name is explained in
  `docs/mlflow.md` of the harness.
"""


def _open_run(client: Any, experiment_id: str, folder: Path, name: str, tags: dict[str, str]) -> tuple[Any, bool]:
    """The run that a folder remembers, if it still exists at this tracking URI, else a new one; and: is it new?"""
    from mlflow.exceptions import MlflowException

    path = folder / "mlflow_run_id"
    run = None
    if path.exists():
        try:
            run = client.get_run(path.read_text(encoding="utf-8").strip())
        except MlflowException:
            logger.info("%s: the tracking server has no such run; logging to a new one", path)
    if run is None or run.info.lifecycle_stage != "active":
        run = client.create_run(experiment_id, run_name=name, tags=tags)
        path.write_text(str(run.info.run_id), encoding="utf-8")
        return run, True
    run_id = run.info.run_id
    client.update_run(run_id, status="RUNNING", name=name)
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    for key in _OUTCOME_TAGS & run.data.tags.keys():
        client.delete_tag(run_id, key)
    return run, False


def close_grid(grid: Grid, complete: bool, artifacts: list[Path]) -> str | None:
    """End the parent run, with the report as its artifact; the reason if MLflow can no longer be reached.

    Args:
        grid: its child runs are ended too where their processes died before they could.
        complete: all trials have finished.
        artifacts: the report's files or folders; they keep their places relative to one another, in ``report/``.
    """
    try:
        client = connect(grid.uri)
        folder = Path(client.get_run(grid.parent_run_id).data.tags[FOLDER_TAG])
        lost = list(child_runs(client, grid.experiment_id, grid.parent_run_id, "attributes.status = 'RUNNING'"))
        for child in lost:
            _end_lost(client, child, folder)
        files = [f for path in artifacts for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file()]
        base = os.path.commonpath([file.parent for file in files]) if files else ""
        for file in files:
            place = Path("report", file.relative_to(base)).parent.as_posix()
            client.log_artifact(grid.parent_run_id, str(file), place)
        if (folder / "plan.json").exists():
            run = read_run(folder)
            finished = sum(record.status == "finished" for record in run.records.values())
            counts = {"planned": len(run.plan.trials), "finished": finished, "failed": len(run.records) - finished}
            log_metrics(client, grid.parent_run_id, {f"trials/{key}": count for key, count in counts.items()})
        client.set_terminated(grid.parent_run_id, "FINISHED" if complete else "FAILED")
    except Exception as error:  # whatever a database driver or an HTTP client may raise; the results are on disk
        return reason_of(error, grid.uri)
    return None


def _end_lost(client: Any, run: Any, run_folder: Path) -> None:
    """End a child run that nobody works on any more: its process died, was interrupted, or lost the server."""
    path = record_path(run_folder, run.data.tags["harness.trial_id"])
    if path.exists():
        log_end(client, run.info.run_id, read_record(path), path.parent)
    else:
        client.set_tag(run.info.run_id, "harness.reason", "its process ended before the trial did")
        client.set_terminated(run.info.run_id, "KILLED")


class MlflowTracker:
    """The child run of one trial.

    Args:
        grid: where to log.
        spec: its values become params.
        planned: names for people.
        folder: the trial's folder, which remembers the run id: a trial started again goes on with its run.
    """

    def __init__(self, grid: Grid, spec: TrialSpec, planned: PlannedTrial, folder: Path) -> None:
        self.run_id: str | None = None
        self.warnings: tuple[str, ...] = ()
        self._grid = grid
        self._system: SystemMetrics | None = None
        self._guard(self._start, spec, planned, folder)

    def _start(self, spec: TrialSpec, planned: PlannedTrial, folder: Path) -> None:
        from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as ENABLED

        self._client = connect(self._grid.uri)
        folder.mkdir(parents=True, exist_ok=True)
        rate = f"lr={planned.learning_rate:g}" if planned.learning_rate else ""
        parts = (planned.label, planned.grouping, planned.setting, rate, f"seed={planned.seed}")
        tags = {
            PARENT_TAG: self._grid.parent_run_id,
            "harness.kind": "trial",
            "harness.trial_id": planned.trial_id,
            "harness.label": planned.label,
            "harness.setting": planned.setting,
        }
        name = " ".join(filter(None, parts))
        run, new = _open_run(self._client, self._grid.experiment_id, folder, name, tags)
        self.run_id = str(run.info.run_id)
        if new:
            log_params(self._client, self.run_id, spec)
        if ENABLED.get() or not ENABLED.is_set():
            self._system = SystemMetrics(self._client, self._grid.uri, run.info)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log what an epoch ended with, by optimizer step."""
        named = {f"epoch/{name}": value for name, value in values.items()}
        self._guard(lambda: log_metrics(self._client, str(self.run_id), named, step))

    def finish(self, record: TrialRecord, folder: Path) -> None:
        """Log the record's numbers and files and end the run."""
        if self._system:
            self._system.stop()
        self._guard(lambda: log_end(self._client, str(self.run_id), record, folder))

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        """Keep a tracking failure from failing the trial; after the first one, stop trying."""
        if self.warnings:
            return
        try:
            call(*args)
        except Exception as error:  # whatever a database driver or an HTTP client may raise
            uri = self._grid.uri
            self.warnings = (f"MLflow logging stopped: {type(error).__name__}: {reason_of(error, uri)}",)
            logger.error("MLflow logging stopped\n%s", _without_password(traceback.format_exc(), uri))
