"""MLflow: one experiment, one parent run per grid, one child run per trial. The only place that imports mlflow.

The record on disk is the truth and comes first; MLflow is its mirror for people who compare runs. A tracking server
that fails in the middle of a trial costs a warning in the record, never the trial.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from harness.errors import UserError
from harness.plan import TrialSpec
from harness.record import PlannedTrial, TrialRecord

PARENT_TAG = "mlflow.parentRunId"
_STATUS = {"finished": "FINISHED", "cancelled": "KILLED", "pruned": "KILLED"}


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
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def _client(uri: str) -> Any:
    """A client that fails fast: with MLflow's own settings a server that is down blocks every call for minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def open_grid(uri: str, experiment: str, run_folder: Path) -> Grid:
    """Create schema, experiment and parent run, once, in the driver: several processes at first use would race.

    A run folder that is run again goes on with its parent run.

    Raises:
        UserError: the tracking server or database cannot be used.
    """
    from mlflow.exceptions import MlflowException

    try:
        client = _client(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            place = f"{run_folder.parent.resolve() / 'mlartifacts'}" if uri.startswith("sqlite:") else None
            experiment_id = client.create_experiment(experiment, artifact_location=place)
        else:
            experiment_id = found.experiment_id
        parent = _remembered(client, run_folder / "mlflow_run_id")
        if parent is None:
            run = client.create_run(
                experiment_id,
                run_name=run_folder.name,
                tags={"harness.kind": "grid", "harness.run_folder": str(run_folder.resolve())},
            )
            parent = str(run.info.run_id)
            (run_folder / "mlflow_run_id").write_text(parent, encoding="utf-8")
        else:
            client.update_run(parent, status="RUNNING")
    except (MlflowException, OSError, ImportError, ValueError) as error:
        raise _unusable(uri, error) from error
    if uri.startswith("sqlite:///"):
        # Write-ahead logging: trials write at the same time; measured median of a write 6 ms instead of 22.
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    return Grid(uri, experiment_id, parent)


def _remembered(client: Any, path: Path) -> str | None:
    """The run id kept in a file, if that run still exists at this tracking URI."""
    from mlflow.exceptions import MlflowException

    if not path.exists():
        return None
    run_id = path.read_text(encoding="utf-8").strip()
    try:
        client.get_run(run_id)
    except MlflowException:
        return None
    return run_id


def check_uri(uri: str) -> None:
    """See that the store answers.

    Raises:
        UserError: it does not.
    """
    try:
        _client(uri).search_experiments(max_results=1)
    except Exception as error:  # whatever a database driver or an HTTP client may raise
        raise _unusable(uri, error) from error


def _unusable(uri: str, error: Exception) -> UserError:
    return UserError(f"tracking.mlflow_uri: {redacted(uri)!r} cannot be used: {_reason(uri, error)}")


def _reason(uri: str, error: Exception) -> str:
    """The error on one line, without the password of the URI."""
    return " ".join(str(error).replace(uri, redacted(uri)).split())[:300]


def close_grid(grid: Grid, complete: bool, artifacts: list[Path]) -> str | None:
    """End the parent run, with the report as its artifact; the reason if MLflow can no longer be reached."""
    client = _client(grid.uri)
    try:
        for path in artifacts:
            client.log_artifact(grid.parent_run_id, str(path))
        client.set_terminated(grid.parent_run_id, "FINISHED" if complete else "FAILED")
    except Exception as error:  # whatever a database driver or an HTTP client may raise; the results are on disk
        return _reason(grid.uri, error)
    return None


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
        self._guard(self._start, grid, spec, planned, folder)

    def _start(self, grid: Grid, spec: TrialSpec, planned: PlannedTrial, folder: Path) -> None:
        from mlflow.entities import Param

        self._client = _client(grid.uri)
        folder.mkdir(parents=True, exist_ok=True)
        self.run_id = _remembered(self._client, folder / "mlflow_run_id")
        if self.run_id is not None:
            self._client.update_run(self.run_id, status="RUNNING")
            return
        name = " ".join(filter(None, (planned.label, planned.grouping, planned.setting, f"seed={planned.seed}")))
        tags = {
            PARENT_TAG: grid.parent_run_id,
            "harness.kind": "trial",
            "harness.trial_id": planned.trial_id,
            "harness.method": planned.method,
            "harness.grouping": planned.grouping,
        }
        run = self._client.create_run(grid.experiment_id, run_name=name, tags=tags)
        self.run_id = str(run.info.run_id)
        (folder / "mlflow_run_id").write_text(self.run_id, encoding="utf-8")
        params = [Param(key, str(value)) for key, value in _flatten(spec.model_dump(mode="json"))]
        self._client.log_batch(self.run_id, params=params)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log by optimizer step."""
        self._guard(self._log, values, step)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [Metric(key, value, now, step) for key, value in values.items()])

    def finish(self, record: TrialRecord, folder: Path) -> None:
        """Log the record's numbers and files and end the run."""
        self._guard(self._finish, record, folder)

    def _finish(self, record: TrialRecord, folder: Path) -> None:
        values = {f"{split}/{name}": x for split, metrics in record.metrics.items() for name, x in metrics.items()}
        values["wall_time_s"] = record.wall_time_s
        for part in (record.parameters, record.memory, record.throughput):
            fields = part.model_dump(exclude={"by_group"}, exclude_none=True) if part else {}
            values |= {_unit_name(type(part).__name__, key): float(x) for key, x in fields.items()}
        self._log(values, record.history[-1].step if record.history else 0)
        for name in ("record.json", "examples.parquet", "log.txt"):
            if (folder / name).exists():
                self._client.log_artifact(self.run_id, str(folder / name))
        if record.reason:
            self._client.set_tag(self.run_id, "harness.reason", record.reason)
        self._client.set_terminated(self.run_id, _STATUS.get(record.status, "FAILED"))

    def _guard(self, call: Any, *args: Any) -> None:
        """Keep a tracking failure from failing the trial; after the first one, stop trying."""
        if self.warnings:
            return
        try:
            call(*args)
        except Exception as error:  # whatever a database driver or an HTTP client may raise
            reason = " ".join(str(error).split())[:200]
            self.warnings = (f"MLflow logging stopped: {type(error).__name__}: {reason}",)
            logging.getLogger(__name__).exception("MLflow logging stopped")


def _unit_name(kind: str, key: str) -> str:
    return {"Parameters": f"parameters/{key}", "Memory": f"memory/{key}"}.get(kind, f"throughput/{key}")


def _flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
