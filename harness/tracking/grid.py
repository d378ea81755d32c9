"""Logs grids to MLflow: one experiment, one parent run per grid, one child run per trial.

The records on disk are authoritative and written first; MLflow mirrors them for comparing runs. A server that is down
delays no trial and changes no result: what it lacks is delivered when a grid ends, and by ``harness sync``.
docs/mlflow.md lists everything that is logged; ``harness.tracking.fetch`` reads it back.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.profile import FILE_NAME
from harness.core.record import Plan, PlannedTrial, Run, TrialRecord, read_run
from harness.core.samples import PREVIEWS
from harness.core.schema import read_strictly
from harness.core.search import DECISIONS
from harness.tracking.board import describe_board, grid_link, log_board, save_view, trials_link
from harness.tracking.delivery import (
    PARENT_TAG,
    RECORD_TAG,
    RUN_ID_FILE,
    TRIAL_TAG,
    Delivery,
    Destination,
    digest_of,
    known_run,
)
from harness.tracking.journal import JOURNAL, Journal
from harness.tracking.store import (
    HIDDEN,
    UnreachableError,
    artifact_uri,
    check_uri,
    connect,
    is_database,
    reason_of,
    redacted,
    sqlite_path,
    unusable,
    without_password,
)
from results.leaderboard.table import Leaderboard

FOLDER_TAG = "harness.run_folder"
PAGE_SIZE = 1000  # runs per page of a search
_CREDENTIALS = (
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_AUTH",
)
RUN_FILES = ("plan.json", "experiment.yaml", FILE_NAME, DECISIONS)


@dataclass(frozen=True)
class Grid(Destination):
    """Where the trials of one run folder log to; sent to the workers.

    Attributes:
        folder: the run folder.
        problem: why the store did not answer when it was opened; None: it did.
    """

    folder: Path
    problem: str | None = None

    @property
    def trials_link(self) -> str | None:
        """Path on MLflow's page of the table of trials; its columns are there once the grid has been closed."""
        return trials_link(self.experiment_id, self.parent_run_id) if self.experiment_id else None

    @property
    def grid_link(self) -> str | None:
        """Path on MLflow's page of the parent run."""
        return grid_link(self.experiment_id, self.parent_run_id) if self.experiment_id else None


@dataclass
class Closed:
    """What came of closing a grid.

    Attributes:
        problem: why MLflow could not be brought up to date; None: it is.
        delivered: ids of the trials whose runs lacked something and do not any more.
    """

    problem: str | None = None
    delivered: list[str] = field(default_factory=list)


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


def check_grid(uri: str, experiment: str, run_folder: Path) -> None:
    """Check before any compute that a grid can be logged, now or later.

    A store that never worked is a mistake. One that this run folder has been logged to may be down for a while.

    Raises:
        UserError: the store does not answer and this run folder was never logged to it, or the experiment is deleted.
    """
    try:
        check_uri(uri, experiment=experiment)
    except UnreachableError as error:
        if _parent_of(run_folder, uri) is None:
            raise UnreachableError(
                f"{error}; nothing has been logged to it from {run_folder} yet, so its address may be wrong: correct "
                "it, or start the server"
            ) from error


def _parent_of(run_folder: Path, uri: str) -> str | None:
    """The parent run's id, if the run folder has been logged to this store."""
    path, plan = run_folder / RUN_ID_FILE, run_folder / "plan.json"
    try:
        logged_to = read_strictly(Plan, plan, "the plan of a run").mlflow_uri
        return path.read_text(encoding="utf-8").strip() or None if logged_to == redacted(uri) else None
    except (OSError, ValueError):
        return None


def open_grid(uri: str, experiment: str, run_folder: Path) -> Grid:
    """Create schema, experiment and parent run, once, in the driver: several processes would race at first use.

    A run folder that is run again reuses its parent run. Its plan and experiment file, if already written, become
    artifacts, so that a running grid can be fetched. If the store does not answer, but the run folder has been logged
    to it, the grid's ``problem`` says so, and its trials are delivered later.

    Raises:
        UserError: the tracking server or database could not be used.
    """
    try:
        client = connect(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            # Otherwise MLflow keeps the artifacts of a database in the current folder.
            place = artifact_uri(run_folder.parent.resolve() / "mlartifacts") if is_database(uri) else None
            experiment_id = client.create_experiment(experiment, artifact_location=place)
        else:
            experiment_id = found.experiment_id
        parent = _open_parent(client, experiment_id, run_folder)
        _log_run_files(client, parent, run_folder, uri)
    except Exception as error:  # database drivers and HTTP clients raise many types
        known = _parent_of(run_folder, uri)
        if known is None:
            raise unusable(uri, error) from error
        return Grid(uri, None, known, run_folder, str(unusable(uri, error)))
    if database := sqlite_path(uri):
        # Write-ahead logging, because trials write concurrently: a write has a median of 6 ms instead of 22.
        with sqlite3.connect(database) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    return Grid(uri, experiment_id, parent, run_folder)


def _open_parent(client: Any, experiment_id: str, run_folder: Path) -> str:
    """The parent run's id: of the run whose id the folder has, of one with the folder's tags, or of a new one."""
    tags = {"harness.kind": "grid", FOLDER_TAG: str(run_folder.resolve()), "mlflow.note.content": _note(run_folder)}
    path, run = run_folder / RUN_ID_FILE, known_run(client, run_folder)
    if run is None and path.exists() and not path.read_text(encoding="utf-8"):  # killed between the two lines below
        condition = f"tags.`{FOLDER_TAG}` = '{tags[FOLDER_TAG]}' and attributes.status = 'RUNNING'"
        run = next(iter(client.search_runs([experiment_id], condition, max_results=1)), None)
    if run is None:
        write_atomically(path, "")
        run = client.create_run(experiment_id, run_name=run_folder.name, tags=tags)
        write_atomically(path, str(run.info.run_id))
        return str(run.info.run_id)
    write_atomically(path, str(run.info.run_id))
    client.update_run(run.info.run_id, status="RUNNING", name=run_folder.name)
    for key, value in tags.items():
        client.set_tag(run.info.run_id, key, value)
    return str(run.info.run_id)


def reopen_grid(plan: Plan, run_folder: Path) -> Grid | None:
    """The grid that a run folder was logged to, without changing it; None: it was not logged to a server.

    Raises:
        UserError: the server could not be used, the run is gone, or its URI has a password, which is not stored, and
            MLFLOW_TRACKING_URI is not this URI.
    """
    path = run_folder / RUN_ID_FILE
    if not plan.mlflow_uri or not path.exists() or not path.read_text(encoding="utf-8"):
        return None
    uri = whole_uri(plan.mlflow_uri)
    check_uri(uri, str(run_folder / "plan.json"))
    try:
        found = connect(uri).get_run(path.read_text(encoding="utf-8").strip())
    except Exception as error:  # database drivers and HTTP clients raise many types
        raise unusable(uri, error, str(path)) from error
    return Grid(uri, found.info.experiment_id, found.info.run_id, run_folder)


def whole_uri(stored: str) -> str:
    """The URI of a plan, with the password that is not stored.

    Raises:
        UserError: it has a password, or credentials for a server are set, and MLFLOW_TRACKING_URI is not this URI.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if redacted(given) == stored:
        return given
    if urlsplit(stored).password == HIDDEN:
        raise UserError(f"{stored}: its password is not stored; set MLFLOW_TRACKING_URI to the whole URI")
    set_here = next((name for name in _CREDENTIALS if os.environ.get(name)), None)
    if set_here and not stored.startswith("sqlite:") and urlsplit(stored).netloc != urlsplit(given).netloc:
        raise UserError(  # the plan may be somebody else's, and MLflow would send them wherever it says
            f"{stored}: {set_here} would be sent there; if it is for this server, set MLFLOW_TRACKING_URI to it"
        )
    return stored


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


def close_grid(grid: Grid, complete: bool, artifacts: list[Path], board: Leaderboard | None = None) -> Closed:
    """Deliver what the runs of trials lack, and end the parent run with the leaderboard's scores and the report.

    Args:
        grid: its child runs are ended too if their processes died.
        complete: whether all trials have finished.
        artifacts: the report's files or folders; they keep their relative paths below ``report/``.
        board: the leaderboard of its run folder, if there is one.
    """
    closed, parent, folder = Closed(), grid.parent_run_id, grid.folder
    try:
        client = connect(grid.uri)
        experiment_id = grid.experiment_id or str(client.get_run(parent).info.experiment_id)
        run = board.run if board else read_run(folder) if (folder / "plan.json").exists() else None
        _deliver_missing(client, grid, list(child_runs(client, experiment_id, parent)), run, closed)
        _log_artifacts(client, parent, artifacts)
        _log_run_files(client, parent, folder, grid.uri)
        _log_previews(client, parent, folder / PREVIEWS)
        if board is not None:
            log_board(client, parent, child_runs(client, experiment_id, parent), board)
            save_view(client, experiment_id, parent, PARENT_TAG, board)
            for key, value in _counts(board).items():
                client.set_tag(parent, f"harness.trials_{key}", str(value))
            client.set_tag(parent, "mlflow.note.content", f"{describe_board(board)}\n{_note(folder)}")
        client.set_terminated(parent, "FINISHED" if complete else "FAILED")
    except Exception as error:  # database drivers and HTTP clients raise many types; the results are on disk
        closed.problem = reason_of(error, grid.uri)
    return closed


def _deliver_missing(client: Any, grid: Grid, children: Sequence[Any], run: Run | None, closed: Closed) -> None:
    """Bring the runs of all trials up to date with their records, and end those whose processes died without one."""
    planned = {trial.trial_id: trial for trial in run.plan.trials} if run else {}
    records: Mapping[str, TrialRecord] = run.records if run else {}
    runs: dict[str, list[Any]] = {}
    for child in children:
        runs.setdefault(child.data.tags.get(TRIAL_TAG, ""), []).append(child)
    for trial_id, record in records.items():
        home = grid.folder / "trials" / trial_id
        if (home / JOURNAL).exists() or not any(_has(child, record) for child in runs.get(trial_id, ())):
            kept = _deliver(grid, planned[trial_id], record, home)
            closed.delivered.append(trial_id)
        else:
            kept = next(child.info.run_id for child in runs[trial_id] if _has(child, record))
        _end_others(client, [child for child in runs.get(trial_id, ()) if child.info.run_id != kept])
    for trial_id in runs.keys() - records.keys():
        _end_others(client, runs[trial_id])


def _has(child: Any, record: TrialRecord) -> bool:
    """Whether a run has ended with this record; one of before 2026-12 does not say which record it has."""
    tags = child.data.tags
    same = tags[RECORD_TAG] == digest_of(record) if RECORD_TAG in tags else tags.get("harness.status") == record.status
    return bool(child.info.status != "RUNNING" and same)


def _deliver(grid: Grid, planned: PlannedTrial, record: TrialRecord, home: Path) -> str:
    journal = Journal(home)
    delivery = Delivery(grid, planned, record.spec, journal, looking=True)
    delivery.end(record)
    journal.remove()
    return str(delivery.run_id)


def _end_others(client: Any, runs: Sequence[Any]) -> None:
    """End runs without a process and without a record: of trials that died, or made when an answer was lost."""
    for run in runs:
        if run.info.status == "RUNNING":
            client.set_tag(run.info.run_id, "harness.reason", "the process ended before the trial finished")
            if RECORD_TAG in run.data.tags:  # sent before the files, which it may lack
                client.delete_tag(run.info.run_id, RECORD_TAG)
            client.set_terminated(run.info.run_id, "KILLED")


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
        client.log_text(run_id, without_password(path.read_text(encoding="utf-8"), uri), path.name)


def _log_previews(client: Any, run_id: str, folder: Path) -> None:
    """Log the previews of input files that are not there yet; they are named by their content."""
    if not folder.is_dir():
        return
    there = {Path(info.path).name for info in client.list_artifacts(run_id, PREVIEWS)}
    for path in sorted(folder.iterdir()):
        if path.name not in there:
            client.log_artifact(run_id, str(path), PREVIEWS)
