"""Delivers to MLflow what it lacks of a run: the server was down, or is another one, or the driver was killed.

``sync_run`` is called by ``harness sync`` and by scripts; the end of every run does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import UserError
from harness.core.storage import Copy, Folder, local_folder, url_of
from harness.sweep.lock import exclusive
from results.leaderboard.join import read_runs
from results.leaderboard.table import build_leaderboard
from results.loaded import Results


@dataclass(frozen=True)
class Synced:
    """What MLflow has of a run.

    Attributes:
        delivered: ids of the trials that it lacked, in whole or in part.
        trials: how many trials with a record it has now.
        place: the store and the parent run, for display.
    """

    delivered: tuple[str, ...]
    trials: int
    place: str


def sync_run(run: str | Path) -> Synced:
    """Bring MLflow up to what a run folder says: one ended run for each trial, every point once, the grid's status.

    It may be repeated, and killed, at any time.

    Args:
        run: a run folder, or its URL.

    Returns:
        What was delivered.

    Raises:
        UserError: it is no run folder, another harness works in it, or MLflow cannot be used.
    """
    from harness.tracking.grid import close_grid, open_grid, whole_uri
    from harness.tracking.journal import JOURNAL
    from harness.tracking.store import check_uri, redacted, unusable

    folder = local_folder(run)
    read_runs([folder])  # refuses what is no run folder before anything is written into it
    with exclusive(folder):
        found = read_runs([folder])
        if not found.plan.mlflow_uri:
            raise UserError(f"{folder / 'plan.json'}: mlflow_uri: found none; `harness run` writes where it logs to")
        uri = whole_uri(found.plan.mlflow_uri)
        check_uri(uri, str(folder / "plan.json"), found.plan.experiment)
        grid = open_grid(uri, found.plan.experiment, folder)
        if grid.problem:
            raise UserError(grid.problem)
        board = build_leaderboard(found)
        report = folder / "report"
        files = [report] if report.is_dir() else []
        closed = close_grid(grid, Results((folder,), known_board=board).complete, files, board)
        if url := url_of(folder):
            Copy(Folder(url), folder).remove_gone(JOURNAL)
    if closed.problem:
        raise unusable(uri, RuntimeError(closed.problem), str(folder / "plan.json"))
    return Synced(tuple(closed.delivered), len(found.records), f"{redacted(uri)}, run {grid.parent_run_id}")
