"""Rebuilds a run folder from the artifacts on a tracking server: the inverse of ``harness.tracking.grid``."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from rich.progress import Progress

from harness.core.errors import UserError, did_you_mean
from harness.core.files import write_atomically
from harness.core.record import record_path
from harness.core.samples import PREVIEWS
from harness.core.terminal import Terminal
from harness.tracking.grid import RUN_FILES, child_runs
from harness.tracking.log import TRIAL_FILES
from harness.tracking.store import check_uri, connect, reason_of, redacted, repository_of, sqlite_path

MARKER = "fetched_from_mlflow.json"  # marks folders that may be overwritten
_DOWNLOADS = 8  # concurrent
_WANTED = tuple(name for name in TRIAL_FILES if name != "log.txt")


def fetch_run(uri: str, run: str, into: Path) -> Path:
    """Fetch the plan, the experiment file, the profile, the previews, and every trial's record, scores and attention.

    A trial that is running, or whose process died before writing a record, has no record, as on disk. If a trial has
    several runs, the latest finished one counts. Fetching again replaces what was fetched before.

    Args:
        uri: MLflow's tracking URI: ``sqlite:////runs/mlflow.db``, ``http://host:5000``.
        run: name of the parent run, which equals that of its run folder; or ``experiment/name``; or its id.
        into: the run folder is created in it, with the name of the parent run.

    Returns:
        The run folder.

    Raises:
        UserError: the server could not be reached or lacks an artifact, there is no such run or more than one, it has
            no plan, or the folder was not created by fetching this run.
    """
    where = "--from"
    if (database := sqlite_path(uri)) and not database.is_file():
        raise UserError(f"{where}: {uri}: no such file")  # MLflow would create an empty database
    check_uri(uri, where)
    client = connect(uri)
    try:
        parent = _parent(client, run, f"{where} mlflow:{redacted(uri)}")
        folder = _folder(into, parent, uri)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as temporary:
            incoming = Path(temporary)
            if "plan.json" not in _download(uri, parent, RUN_FILES, incoming):
                raise UserError(_missing_plan(parent))
            (incoming / "trials").mkdir()
            children = child_runs(client, parent.info.experiment_id, parent.info.run_id)
            _download_trials(uri, _latest_per_trial(children), incoming)
            _download_previews(uri, parent, incoming / PREVIEWS)
            for name in (*RUN_FILES, PREVIEWS, "trials"):
                _replace(incoming / name, folder / name)
    except UserError:
        raise
    except Exception as error:  # database drivers, HTTP clients and artifact stores raise many types
        raise UserError(f"{where}: fetching {run!r} from {redacted(uri)!r} failed: {reason_of(error, uri)}") from error
    return folder


def _parent(client: Any, run: str, where: str) -> Any:
    """The parent run with this id or name."""
    names = {e.experiment_id: e.name for e in _pages(client.search_experiments)}
    grids = list(_pages(client.search_runs, list(names), "tags.`harness.kind` = 'grid'")) if names else []
    if re.fullmatch(r"[0-9a-f]{32}", run):
        found = [grid for grid in grids if grid.info.run_id == run]
    else:
        experiment, _, name = run.rpartition("/")
        found = [
            grid for grid in grids if grid.info.run_name == name and experiment in ("", names[grid.info.experiment_id])
        ]
    if not found:
        known = {grid.info.run_name for grid in grids}
        raise UserError(f"{where}: no parent run {run!r}; {did_you_mean(run.rpartition('/')[2], known)}")
    if len(found) > 1:
        listed = "".join(
            f"\n  {grid.info.run_id}  {_date(grid)}  {names[grid.info.experiment_id]}/{grid.info.run_name}"
            for grid in sorted(found, key=lambda grid: -grid.info.start_time)
        )
        raise UserError(f"{where}: {len(found)} parent runs have the name {run!r}; use the id of one:{listed}")
    return found[0]


def _pages(search: Any, *arguments: Any) -> Any:
    """All results of one of the client's searches, over all pages."""
    page = search(*arguments)
    yield from page
    while page.token:
        page = search(*arguments, page_token=page.token)
        yield from page


def _date(run: Any) -> str:
    return datetime.fromtimestamp(run.info.start_time / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _folder(into: Path, parent: Any, uri: str) -> Path:
    """The run folder, with its marker."""
    name, run_id = parent.info.run_name, parent.info.run_id
    if not _is_folder_name(name):
        raise UserError(f"run {run_id}: its name {name!r} is not a valid folder name; rename it in MLflow")
    folder: Path = into / name
    marker = folder / MARKER
    if folder.exists() and not marker.exists():
        raise UserError(f"{folder}: exists and was not fetched from MLflow; name another folder with --output")
    if marker.exists() and (other := json.loads(marker.read_text(encoding="utf-8"))["run_id"]) != run_id:
        raise UserError(f"{folder}: holds another run of this name, {other}; delete it or name another folder")
    content = {"run_id": run_id, "uri": redacted(uri), "at": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomically(marker, json.dumps(content, indent=1) + "\n")
    return folder


def _is_folder_name(name: str) -> bool:
    """Whether a name from the server stays inside the folder."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


def _missing_plan(parent: Any) -> str:
    start = f"run {parent.info.run_name} ({parent.info.run_id}, {_date(parent)})"
    artifacts = _local_path(parent.info.artifact_uri)
    if artifacts.is_absolute() and not artifacts.exists():
        return f"{start}: its artifacts are files in {artifacts}, which does not exist on this machine; copy them there"
    return f"{start} has no artifact plan.json; create its report from its run folder"


def _local_path(uri: str) -> Path:
    return Path(unquote(uri.removeprefix("file://"))) if uri.startswith("file://") else Path(uri)


def _latest_per_trial(children: Any) -> list[Any]:
    """One run for each trial id: the latest that finished, else the latest that ended."""
    chosen: dict[str, Any] = {}
    for child in sorted(children, key=lambda run: (run.info.status == "FINISHED", run.info.end_time or 0)):
        trial_id = child.data.tags.get("harness.trial_id", "")
        if not _is_folder_name(trial_id):
            raise UserError(
                f"run {child.info.run_id}: its tag harness.trial_id is {trial_id!r}, which is not a trial id"
            )
        if child.info.end_time is not None and child.info.status != "RUNNING":
            chosen[trial_id] = child
    return list(chosen.values())


def _download_trials(uri: str, children: Sequence[Any], incoming: Path) -> None:
    console = Terminal(stderr=True)
    pool = ThreadPoolExecutor(_DOWNLOADS)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("fetching trials", total=len(children))
        futures = {
            pool.submit(
                _download, uri, child, _WANTED, record_path(incoming, child.data.tags["harness.trial_id"]).parent
            )
            for child in children
        }
        try:
            for future in as_completed(futures):
                future.result()
                progress.advance(bar)
        finally:
            pool.shutdown(cancel_futures=True)


def _download(uri: str, run: Any, names: Sequence[str], folder: Path) -> list[str]:
    """Download those of the named artifacts that a run has; returns their names.

    Uses the artifact URI in ``run``, which saves a request per run to the server.
    """
    repository = repository_of(run, uri)
    there = [info.path for info in repository.list_artifacts() if info.path in names and not info.is_dir]
    if there:
        folder.mkdir(parents=True, exist_ok=True)
    for name in there:
        repository.download_artifacts(name, str(folder))
    return there


def _download_previews(uri: str, run: Any, folder: Path) -> None:
    repository = repository_of(run, uri)
    for path in (info.path for info in repository.list_artifacts(PREVIEWS) if not info.is_dir):
        if Path(path).parts[:-1] != (PREVIEWS,) or not _is_folder_name(Path(path).name):
            raise UserError(f"run {run.info.run_id}: its artifact {path!r} is not a file in {PREVIEWS}/")
        folder.mkdir(exist_ok=True)
        repository.download_artifacts(path, str(folder.parent))


def _replace(new: Path, old: Path) -> None:
    """Replace a file or folder by another one, or remove it if the new one does not exist."""
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()
    if new.exists():
        os.replace(new, old)  # noqa: PTH105 -- of folders too
