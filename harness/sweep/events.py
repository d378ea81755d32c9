"""Tune's events: forwarded to the display, and records of trials whose process died."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from harness.core.errors import SweepEndedError
from harness.core.files import DiskFullError
from harness.core.lease import Lease
from harness.core.origin import shown
from harness.core.record import Status, TrialRecord, read_record, record_path, write_record
from harness.experiment.plan import TrialSpec
from harness.sweep.grace import STOPPED, Grace
from harness.sweep.hangs import Hangs
from harness.sweep.live import PAUSED
from harness.sweep.members import members_of
from harness.sweep.nodes import node_name
from harness.sweep.oom import oom_kills
from harness.sweep.placement import Amounts, room_for
from harness.sweep.ranks import RankDiedError
from harness.sweep.ray_library import ray, tune
from harness.sweep.stored import Stored
from harness.trial.log import LOG


class Display(Protocol):
    """Receives the events of a sweep while it runs."""

    def opened(self, run: Path, at_once: int) -> None:
        """The sweep starts, in this run folder and with so many trials at once."""

    def noted(self, line: str) -> None:
        """Something about the cluster that is worth a line."""

    def abandoned(self, line: str) -> None:
        """The process ends now, for this reason; nothing else can be shown."""

    def started(self, trial_id: str, place: str) -> None:
        """A trial was started in a worker process; trials of one pack have the same place."""

    def progressed(self, trial_id: str, progress: dict[str, Any]) -> None:
        """A trial reported progress: the fields of ``harness.trial.trial.Progress``."""

    def ended(self, record: TrialRecord) -> None:
        """A trial has ended; its record is written."""


_NODES_S = 5.0  # how often Ray is asked for its nodes
_WAIT_S = 30.0  # without any running trial: then it is said why
_RETURN_S = 300.0  # for nodes to come back, if those that are left cannot run a trial


class Events(tune.Callback):  # type: ignore[misc]
    """Forwards Tune's events to the display, and writes the record of a trial whose process died.

    Ray's node process dies with its agents (``DashboardAgent``, ``RuntimeEnvAgent``), and Tune then waits forever for a
    node that can run the next trial. So it asks for the nodes, and ends the sweep if none is alive, or if those that
    are left cannot run a trial and no other comes back. If other jobs have the resources, it says so and waits.
    """

    def __init__(
        self,
        run: Path,
        experiment: str,
        display: Display,
        needs: Amounts,
        workers: int = 1,
        stored: Stored | None = None,
        lease: Lease | None = None,
        grace: Grace | None = None,
        hangs: Hangs | None = None,
    ) -> None:
        self.run, self.experiment, self.display, self.stored, self.lease = run, experiment, display, stored, lease
        self.grace = grace  # for the trials that run when the sweep is ended
        self.needs, self.workers = needs, workers  # of each worker of a trial, and their number
        self.ran = time.monotonic()  # when a trial was last running
        self.short_since: float | None = None  # since the nodes cannot run a trial
        self.told = False  # of waiting for other jobs
        self.ended = 0  # trials with a record
        self.over: set[str] = set()  # their ids
        self.asked = -math.inf  # at the first step, so that the death of a node in the first seconds is told too
        self.alive: set[str] = set()  # ids of the nodes that were alive when Ray was asked
        self.hangs = hangs or Hangs(None)
        self.stuck: dict[str, str] = {}  # trials that were ended because they made no progress, and how
        self.killed_before: dict[str, int | None] = {}  # trial → processes that the kernel had killed when it started

    def __getstate__(self) -> dict[str, Any]:
        """Return no state: Tune pickles callbacks into a snapshot that is never read, and displays are unpicklable."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Check that a node is alive.

        Raises:
            SweepEndedError: none is, those that are left cannot run a trial, or another driver has taken over the run
                folder.
        """
        if self.grace:
            self.grace.check(trials)
        if time.monotonic() - self.asked < _NODES_S:
            return
        self.asked = time.monotonic()
        if self.lease:
            self.lease.check()
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        for died in sorted(self.alive - {key for key, node in nodes.items() if node["Alive"]}):
            self.display.noted(f"node {node_name(nodes[died])} has died; its trials start again on another one")
        self.alive = {key for key, node in nodes.items() if node["Alive"]}
        if not self.alive:
            raise SweepEndedError(
                "Ray has died: one of its processes (raylet, DashboardAgent, RuntimeEnvAgent) was killed"
            )
        self._check_room([node["Resources"] for node in nodes.values() if node["Alive"]])
        running = {trial.config["trial"]["trial_id"]: trial for trial in trials if trial.status == "RUNNING"}
        self._tell_waiting(bool(running))
        for trial_id, how in self.hangs.stuck(list(running)).items():
            self._end_stuck(trial_id, running[trial_id], how)

    def _end_stuck(self, trial_id: str, trial: Any, how: str) -> None:
        """Kill the worker of a trial, which is not started again."""
        actor = trial.temporary_state.ray_actor
        if trial_id in self.stuck or actor is None:
            return
        self.stuck[trial_id] = how
        trial.max_failures = 0
        ray.kill(actor)

    def _check_room(self, nodes: Sequence[Amounts]) -> None:
        if (room := room_for(self.needs, nodes)) >= self.workers:
            self.short_since = None
            return
        lacking = f"the nodes that are left have room for {room} of {self.workers} workers of a trial ({self._needed})"
        if self.short_since is None:
            self.short_since = time.monotonic()
            self.display.noted(f"{lacking}; waiting up to {_RETURN_S / 60:g} min for nodes to come back")
        if time.monotonic() - self.short_since >= _RETURN_S:
            raise SweepEndedError(lacking)

    def _tell_waiting(self, running: bool) -> None:
        if running or self.short_since is not None:
            self.ran, self.told = time.monotonic(), False
        elif not self.told and time.monotonic() - self.ran >= _WAIT_S:
            self.told = True
            free = ray.available_resources()
            there = " and ".join(f"{free.get(key, 0.0):g} {key}s" for key in self.needs)
            self.display.noted(f"no trial is running: waiting for {self._needed}; free in the cluster: {there}")

    @property
    def _needed(self) -> str:
        each = " and ".join(f"{share:g} {key}s" for key, share in self.needs.items())
        return each if self.workers == 1 else f"{self.workers} × {each}"

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial, or a pack of them, got a worker."""
        self.hangs.progressed(_id(trial))
        self.killed_before[_id(trial)] = oom_kills()
        for trial_id in self._left(trial):
            self.display.started(trial_id, _id(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A trial reported progress, or a pack that of its trials."""
        self.hangs.progressed(_id(trial), str(result.get("phase", "")))
        shared = result.get("waiting", members_of(trial)) if result.get("phase") in {PAUSED, STOPPED} else [_id(trial)]
        for trial_id, progress in result.get("members", dict.fromkeys(shared, result)).items():
            if trial_id not in self.over:
                self.display.progressed(trial_id, progress)
        for trial_id in result.get("ended", ()):
            self._end(record_path(self.run, trial_id))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A trial or a pack ended; its worker wrote the records, unless it was asked to stop."""
        if (trial.last_result or {}).get("phase") == STOPPED:
            return
        self._fetch(trial)
        for trial_id in self._left(trial):
            self._end(record_path(self.run, trial_id))
        self._left_place(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """A worker died for the last time: write the records that it did not."""
        self._fetch(trial)
        for trial_id in self._left(trial):
            path = record_path(self.run, trial_id)
            if not path.exists():
                record = _died(trial, trial_id, self.experiment, path.with_name(LOG), self._cause(_id(trial)))
                try:
                    write_record(self.run, record)
                except DiskFullError as error:  # it counts as not finished, and the next run runs it
                    self.ended += 1
                    self.over.add(trial_id)
                    self.display.noted(str(error))
                    self.display.ended(record)
                    continue
            self._end(path)
        self._left_place(trial)

    def _left(self, trial: Any) -> list[str]:
        """The ids of the trials of a pack, or of the trial, that have not ended."""
        return [trial_id for trial_id in members_of(trial) if trial_id not in self.over]

    def _left_place(self, trial: Any) -> None:
        self.hangs.ended(_id(trial))
        self.killed_before.pop(_id(trial), None)

    def _cause(self, trial_id: str) -> tuple[Status, str] | None:
        """Why a worker died, if it is known better than Ray knows it."""
        if trial_id in self.stuck:
            return "failed", self.stuck[trial_id]
        before, now = self.killed_before.get(trial_id), oom_kills()
        # The kernel counts for this machine, and Ray does not say where a worker was that has died.
        if before is not None and now is not None and now > before and len(self.alive) <= 1:
            return "out_of_memory", "the kernel killed the worker process because there was no memory"
        return None

    def _fetch(self, trial: Any) -> None:
        if self.stored:
            self.stored.fetch(_id(trial))

    def _end(self, path: Path) -> None:
        self.ended += 1
        self.over.add(path.parent.name)
        self.display.ended(read_record(path))


def _id(trial: Any) -> str:
    """The id of a trial; of a pack that of its first one."""
    return str(trial.config["trial"]["trial_id"])


def _died(trial: Any, trial_id: str, experiment: str, log: Path, cause: tuple[Status, str] | None) -> TrialRecord:
    """The record of a trial whose process was killed or crashed before it could write one."""
    members = trial.config["trial"]["members"]
    spec = TrialSpec.model_validate_json(next(own["spec"] for own in members if own["trial_id"] == trial_id))
    began = trial.run_metadata.start_time or time.time()
    lines = [line for line in getattr(trial, "failure", "").splitlines() if line.strip()]
    status, reason = cause or ("failed", f"the worker process died: {_told(lines)}")
    if len(members) > 1:
        reason += f"; it ran {len(members)} trials"
    return TrialRecord(
        trial_id=spec.trial_id,
        experiment=experiment,
        status=status,
        reason=f"{reason[:500]} (log: {shown(log)})",
        spec=spec.model_dump(mode="json"),
        seed=spec.seed,
        wall_time_s=time.time() - began,
        started_at=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
    )


def _told(lines: Sequence[str]) -> str:
    """What Ray's error says: of a trial with several workers which of them died, else its first line."""
    name = f"{RankDiedError.__name__}: "
    told = next((line.partition(name)[2] for line in reversed(lines) if name in line), "")
    # An error of a task is told by its last line, after the traceback; the death of a process by the first.
    line = lines[-1 if "ray::" in lines[0] else 0] if lines else "Ray gave no reason"
    return told.strip() or line.strip()
