"""Progress of a grid: finished, failed, pruned, running and waiting trials, and the estimated time left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.core.record import Plan, PlannedTrial, Status, paused_path


class Ended(Protocol):
    """What is needed of the record of a trial: a part of it, or all."""

    @property
    def status(self) -> Status:
        """Of the trial."""

    @property
    def reason(self) -> str | None:
        """Why it did not finish."""

    @property
    def wall_time_s(self) -> float:
        """How long it took."""


class Known(Protocol):
    """What is needed of a run: ``Run`` or ``Brief``."""

    @property
    def folder(self) -> Path:
        """The run folder."""

    @property
    def plan(self) -> Plan:
        """Its plan."""

    @property
    def records(self) -> Mapping[str, Ended]:
        """By trial id, of planned trials."""

    @property
    def out(self) -> frozenset[str]:
        """Ids of trials that halving has pruned for good."""

    def trial_folder(self, trial_id: str) -> Path:
        """Folder of a trial's files."""


@dataclass(frozen=True)
class Progress:
    """The state of every trial in the plan. ``left_s`` is None if it cannot be estimated."""

    finished: int
    failed: Mapping[str, int]  # status → how many
    failures: tuple[tuple[PlannedTrial, Ended], ...]
    running: tuple[PlannedTrial, ...]  # started, without a record
    waiting: int
    mean_wall_time_s: float | None  # of the finished trials
    left_s: float | None  # their mean time × trials left / trials at once
    pruned: int = 0  # by halving
    paused: int = 0  # at a rung of halving, until the others of their row have come so far

    @property
    def planned(self) -> int:
        """Trials in the plan."""
        return self.finished + len(self.failures) + self.pruned + self.paused + len(self.running) + self.waiting


def progress_of(run: Known, active: bool) -> Progress:
    """Count the trials of a run folder.

    Args:
        run: as read.
        active: whether a harness is running in the folder. Only then does a trial without a record count as running
            if it has started (its log is newer than the plan, which every ``harness run`` rewrites); else it waits.
    """
    records = [(trial, run.records.get(trial.trial_id)) for trial in run.plan.trials]
    finished = [record for _, record in records if record and record.status == "finished"]
    pruned = [t for t, record in records if record and record.status == "pruned" and t.trial_id in run.out]
    ended = {"finished", "pruned"}
    failures = tuple((trial, record) for trial, record in records if record and record.status not in ended)
    # What another halving had pruned goes on when the experiment is run again.
    open_ = [t for t, record in records if record is None or (record.status == "pruned" and t.trial_id not in run.out)]
    paused = [trial for trial in open_ if _waits(run, trial)]
    running = tuple(trial for trial in open_ if _begun(run, trial) and trial not in paused) if active else ()
    mean_s = sum(record.wall_time_s for record in finished) / len(finished) if finished else None
    left_s = mean_s * len(open_) / max(1, len(running)) if active and mean_s is not None else None
    statuses = Counter(record.status.replace("_", " ") for _, record in failures)
    waiting = len(open_) - len(running) - len(paused)
    return Progress(len(finished), dict(statuses), failures, running, waiting, mean_s, left_s, len(pruned), len(paused))


def _waits(run: Known, trial: PlannedTrial) -> bool:
    """Whether a trial waits at a rung: it has paused, and has not been started since."""
    paused, log = paused_path(run.folder, trial.trial_id), run.trial_folder(trial.trial_id) / "log.txt"
    return paused.exists() and (not log.exists() or log.stat().st_mtime <= paused.stat().st_mtime)


def _begun(run: Known, trial: PlannedTrial) -> bool:
    log, plan = run.trial_folder(trial.trial_id) / "log.txt", run.folder / "plan.json"
    return log.exists() and log.stat().st_mtime >= plan.stat().st_mtime
