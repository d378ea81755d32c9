"""Logs grids to MLflow: one experiment, one parent run per grid, one child run per trial.

The record on disk is authoritative and written first; MLflow mirrors it for comparing runs. A tracking server that
fails during a trial causes a warning in the record, never a failed trial. docs/mlflow.md lists everything that is
logged; ``harness.tracking.fetch`` reads it back.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from harness.core.errors import UserError
from harness.core.paths import locate
from harness.core.profile import FILE_NAME
from harness.core.record import Plan, PlannedTrial, TrialRecord, read_record, record_path
from harness.core.samples import PREVIEWS
from harness.core.search import DECISIONS
from harness.experiment.plan import TrialSpec
from harness.tracking.board import describe_board, grid_link, log_board, save_view, trials_link
from harness.tracking.log import log_end, log_metrics, log_params
from harness.tracking.schema import HALF_MADE, advice, make_database
from harness.tracking.system import SystemMetrics
from results.leaderboard.table import Leaderboard

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
FOLDER_TAG = "harness.run_folder"
PAGE_SIZE = 1000  # runs per page of a search
RUN_ID_FILE = "mlflow_run_id"  # of a run folder, and of each trial's folder
HIDDEN = "***"  # in place of a password
RUN_FILES = ("plan.json", "experiment.yaml", FILE_NAME, DECISIONS)
_CURVES = {"learning_rate": "schedule/learning_rate"}  # in a section of its own, below the losses
_OUTCOME_TAGS = {"harness.status", "harness.reason"}


class Tracker(Protocol):
    """Receives the progress and the result of a trial."""

    run_id: str | None
    warnings: tuple[str, ...]

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics at one step of training."""

    def pause(self) -> None:
        """The trial waits, and this process goes on without it."""

    def finish(self, record: TrialRecord, folder: Path) -> None:
        """The trial has ended; its record is in ``folder``."""


class NoTracker:
    """Nothing is logged: by what is measured apart from trials, and by workers of a trial other than the first."""

    run_id: str | None = None
    warnings: tuple[str, ...] = ()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log nothing."""

    def pause(self) -> None:
        """Log nothing."""

    def finish(self, record: TrialRecord, folder: Path) -> None:
        """Log nothing."""


@dataclass(frozen=True)
class Grid:
    """Where the trials of one run folder log to; sent to the workers."""

    uri: str
    experiment_id: str
    parent_run_id: str

    @property
    def trials_link(self) -> str:
        """Path on MLflow's page of the table of trials; its columns are there once the grid has been closed."""
        return trials_link(self.experiment_id, self.parent_run_id)

    @property
    def grid_link(self) -> str:
        """Path on MLflow's page of the parent run."""
        return grid_link(self.experiment_id, self.parent_run_id)


def default_uri(runs: Path) -> str:
    """``MLFLOW_TRACKING_URI`` of MLflow, otherwise SQLite next to the run folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(runs.resolve() / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """The URI of an SQLite database in a file; ``%``, ``?`` and ``#`` in its path have a meaning in a URI."""
    if not _means_something(path):
        return f"sqlite:///{path}"
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path)).render_as_string()


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI, without its options (``?timeout=60``); None for other URIs."""
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy.engine import make_url

    database = make_url(uri).database
    return Path(database) if database else None


def located(uri: str, folder: Path) -> str:
    """The URI from an experiment, its SQLite file or folder relative to the folder of the experiment's file.

    Raises:
        ValueError: there is one in the current folder only; the message says what to write.
    """
    if (database := sqlite_path(uri)) is not None:
        if database.is_absolute() or str(database) == ":memory:":
            return uri
        from sqlalchemy.engine import make_url

        path = str(locate(database, folder, explain=True))
        return make_url(uri).set(database=path).render_as_string(hide_password=False)
    return uri if ":" in uri or uri.startswith("databricks") else str(locate(uri, folder, explain=True))


def _artifact_uri(folder: Path) -> str:
    return folder.as_uri() if _means_something(folder) else str(folder)


def _means_something(path: Path) -> bool:
    return bool(set("%?#") & set(str(path)))


def redacted(uri: str) -> str:
    """The URI without the password of its database or server, for display and storage."""
    return _without_password(uri, uri)


def _without_password(text: str, uri: str) -> str:
    password = urlsplit(uri).password
    return text.replace(f":{password}@", f":{HIDDEN}@") if password else text


def reason_of(error: Exception, uri: str) -> str:
    """An error of the store on one line, without the password of its URI."""
    return " ".join(_without_password(str(error), uri).split())[:300]


def connect(uri: str) -> Any:
    """A client that fails fast: with the defaults of MLflow, a server that is down blocks every call for minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow prints the address of every run that ends, with the password of its URI.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    def client(of: str) -> Any:
        with _no_folder_named_like(of):
            return MlflowClient(tracking_uri=of)

    database = sqlite_path(uri)
    if database is not None and str(database) != ":memory:" and not database.exists():
        make_database(database, lambda new: client(sqlite_uri(new)).search_experiments(max_results=1))
    return client(uri)


@contextmanager
def _no_folder_named_like(uri: str) -> Iterator[None]:
    """Remove the empty folder that MLflow makes for a database whose path is escaped: ``a%23b`` next to ``a#b``."""
    database = sqlite_path(uri)
    written = Path(uri.removeprefix("sqlite:///")).parent
    new = [] if database is None else [path for path in (written, *written.parents) if not path.exists()]
    try:
        yield
    finally:
        for folder in new:
            if database is not None and folder not in database.parents:
                with suppress(OSError):  # not empty, or not made
                    folder.rmdir()


def check_uri(uri: str, where: str = "tracking.mlflow_uri", experiment: str | None = None) -> None:
    """Check that the store answers, and that nobody has deleted the MLflow experiment that a grid will log to.

    Args:
        uri: of the store.
        where: the option or key that holds the URI.
        experiment: name of the experiment, if a grid will log to it.

    Raises:
        UserError: the store does not answer, or the experiment is deleted.
    """
    try:
        client = connect(uri)
        client.search_experiments(max_results=1)
        found = client.get_experiment_by_name(experiment) if experiment else None
    except Exception as error:  # database drivers and HTTP clients raise many types
        raise _unusable(uri, error, where) from error
    if found is not None and found.lifecycle_stage != "active":
        raise UserError(
            f"{where}: the MLflow experiment {experiment!r} at {redacted(uri)!r} is deleted; restore it "
            f"(mlflow experiments restore --experiment-id {found.experiment_id}) or give the experiment another name"
        )


def _unusable(uri: str, error: Exception, where: str = "tracking.mlflow_uri") -> UserError:
    database, reason = sqlite_path(uri), reason_of(error, uri)
    hint = f"; {text}" if database and HALF_MADE.search(reason) and (text := advice(database)) else ""
    return UserError(f"{where}: {redacted(uri)!r} could not be used: {reason}{hint}")


def child_runs(client: Any, experiment_id: str, parent_run_id: str, condition: str = "") -> Iterator[Any]:
    """All trial runs of a grid, over all pages; ``condition`` is a further term of MLflow's filter."""
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
    """Create schema, experiment and parent run, once, in the driver: several processes would race at first use.

    A run folder that is run again reuses its parent run. Its plan and experiment file, if already written, become
    artifacts, so that a running grid can be fetched.

    Raises:
        UserError: the tracking server or database could not be used.
    """
    from mlflow.exceptions import MlflowException

    try:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            place = _artifact_uri(run_folder.parent.resolve() / "mlartifacts") if uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(experiment, artifact_location=place)
        else:
            experiment_id = found.experiment_id
        tags = {"harness.kind": "grid", FOLDER_TAG: str(run_folder.resolve()), "mlflow.note.content": _note(run_folder)}
        parent = str(_open_run(client, experiment_id, run_folder, run_folder.name, tags)[0].info.run_id)
        _log_run_files(client, parent, run_folder, uri)
    except (MlflowException, OSError, ImportError, ValueError) as error:
        raise _unusable(uri, error) from error
    if database := sqlite_path(uri):
        # Write-ahead logging, because trials write concurrently: a write has a median of 6 ms instead of 22.
        with sqlite3.connect(database) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    return Grid(uri, experiment_id, parent)


def reopen_grid(plan: Plan, run_folder: Path) -> Grid | None:
    """The grid that a run folder was logged to, without changing it; None: it was not logged to a server.

    Raises:
        UserError: the server could not be used, the run is gone, or its URI has a password, which is not stored, and
            MLFLOW_TRACKING_URI is not this URI.
    """
    path = run_folder / RUN_ID_FILE
    if not plan.mlflow_uri or not path.exists():
        return None
    given, uri = os.environ.get("MLFLOW_TRACKING_URI", ""), plan.mlflow_uri
    if redacted(given) == uri:
        uri = given
    elif urlsplit(uri).password == HIDDEN:
        raise UserError(f"{uri}: its password is not stored; set MLFLOW_TRACKING_URI to the whole URI")
    check_uri(uri, str(run_folder / "plan.json"))
    try:
        found = connect(uri).get_run(path.read_text(encoding="utf-8").strip())
    except Exception as error:  # database drivers and HTTP clients raise many types
        raise _unusable(uri, error, str(path)) from error
    return Grid(uri, found.info.experiment_id, found.info.run_id)


def _note(run_folder: Path) -> str:
    """Description of the parent run on MLflow's page, in Markdown."""
    return f"""\
One grid of trials. Each child run is one adapter, learning rate, data budget and seed.

- **Report:** `report/index.html` among the artifacts, once the grid has ended. To render it again:
  `harness report {run_folder.resolve()}`, or from this server
  `harness report {run_folder.name} --from mlflow:URI --output FOLDER`.
- **Scores:** `test/…` and `validation/…`, from the epoch that validated best; `leaderboard/…`, means over seeds, once
  the grid has ended. **Curves** by optimizer step: `epoch/…`. **Sizes and times:** `system/…`.
- **Status:** the tag `harness.reason` of a run that is `FAILED` or `KILLED` gives the reason.
- "Model training", at the top left of the page, shows the views for training runs. Every name is explained in
  `docs/mlflow.md` of the harness.
"""


def _open_run(client: Any, experiment_id: str, folder: Path, name: str, tags: dict[str, str]) -> tuple[Any, bool]:
    """The run whose id the folder stores if it still exists at this tracking URI, else a new one; and whether new."""
    from mlflow.exceptions import MlflowException

    path = folder / RUN_ID_FILE
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


def close_grid(grid: Grid, complete: bool, artifacts: list[Path], board: Leaderboard | None = None) -> str | None:
    """End the parent run, with the leaderboard's scores and the report; returns the reason if MLflow fails.

    Args:
        grid: its child runs are ended too if their processes died.
        complete: whether all trials have finished.
        artifacts: the report's files or folders; they keep their relative paths below ``report/``.
        board: the leaderboard of its run folder, if there is one.
    """
    parent = grid.parent_run_id
    try:
        client = connect(grid.uri)
        folder = Path(client.get_run(parent).data.tags[FOLDER_TAG])
        lost = list(child_runs(client, grid.experiment_id, parent, "attributes.status = 'RUNNING'"))
        for child in lost:
            _end_lost(client, child, folder)
        _log_artifacts(client, parent, artifacts)
        _log_run_files(client, parent, folder, grid.uri)
        _log_previews(client, parent, folder / PREVIEWS)
        if board is not None:
            log_board(client, parent, child_runs(client, grid.experiment_id, parent), board)
            save_view(client, grid.experiment_id, parent, PARENT_TAG, board)
            for key, value in _counts(board).items():
                client.set_tag(parent, f"harness.trials_{key}", str(value))
            client.set_tag(parent, "mlflow.note.content", f"{describe_board(board)}\n{_note(folder)}")
        client.set_terminated(parent, "FINISHED" if complete else "FAILED")
    except Exception as error:  # database drivers and HTTP clients raise many types; the results are on disk
        return reason_of(error, grid.uri)
    return None


def _counts(board: Leaderboard) -> dict[str, int]:
    planned = len(board.run.plan.trials)
    return {
        "planned": planned,
        "finished": planned - len(board.failed) - len(board.missing) - len(board.pruned),
        "pruned": len(board.pruned),
        "failed": len(board.failed),
    }


def _log_artifacts(client: Any, run_id: str, paths: list[Path]) -> None:
    """Log files, and the files of folders, below ``report/``."""
    files = [f for path in paths for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file()]
    base = os.path.commonpath([file.parent for file in files]) if files else ""
    for file in files:
        client.log_artifact(run_id, str(file), Path("report", file.relative_to(base)).parent.as_posix())


def _log_run_files(client: Any, run_id: str, folder: Path, uri: str) -> None:
    for path in filter(Path.exists, (folder / name for name in RUN_FILES)):
        client.log_text(run_id, _without_password(path.read_text(encoding="utf-8"), uri), path.name)


def _log_previews(client: Any, run_id: str, folder: Path) -> None:
    """Log the previews of input files that are not there yet; they are named by their content."""
    if not folder.is_dir():
        return
    there = {Path(info.path).name for info in client.list_artifacts(run_id, PREVIEWS)}
    for path in sorted(folder.iterdir()):
        if path.name not in there:
            client.log_artifact(run_id, str(path), PREVIEWS)


def _end_lost(client: Any, run: Any, run_folder: Path) -> None:
    """End a child run without a process: it died, was interrupted, or lost the server."""
    path = record_path(run_folder, run.data.tags["harness.trial_id"])
    if path.exists():
        log_end(client, run.info.run_id, read_record(path), path.parent)
    else:
        client.set_tag(run.info.run_id, "harness.reason", "the process ended before the trial finished")
        client.set_terminated(run.info.run_id, "KILLED")


class MlflowTracker:
    """The child run of one trial.

    Args:
        grid: where to log.
        spec: spec of the trial, whose values become params.
        planned: display names.
        folder: folder of the trial, which stores the run id, so that a restarted trial reuses its run.
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
        """Log the metrics of an epoch, by optimizer step."""
        named = {_CURVES.get(name, f"epoch/{name}"): value for name, value in values.items()}
        self._guard(lambda: log_metrics(self._client, str(self.run_id), named, step))

    def pause(self) -> None:
        """Stop sampling the system; the run stays open, and a later process goes on with it."""
        if self._system:
            self._system.stop()

    def finish(self, record: TrialRecord, folder: Path) -> None:
        """Log the numbers and files of the record, and end the run."""
        if self._system:
            self._system.stop()
        self._guard(lambda: log_end(self._client, str(self.run_id), record, folder))

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        """Keep tracking failures from failing the trial; after the first one, stop logging."""
        if self.warnings:
            return
        try:
            call(*args)
        except Exception as error:  # database drivers and HTTP clients raise many types
            uri = self._grid.uri
            self.warnings = (f"MLflow logging stopped: {type(error).__name__}: {reason_of(error, uri)}",)
            logger.error("MLflow logging stopped\n%s", _without_password(traceback.format_exc(), uri))
