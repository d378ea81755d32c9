"""Counts the device-hours of a run, and ends it when ``budget.gpu_hours`` is reached.

A trial counts from when it gets its place until it ends, times its GPUs; without GPUs as one slot. ``spent.json`` in
the run folder has the sum, so that what was killed counts too; before there was one, it is the time of all records
and attempts. The run is ended as by ``harness stop``: running trials save where they are.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.core.files import write_atomically
from harness.core.record import TrialRecord
from harness.core.schema import Schema, read_strictly
from harness.core.summaries import Summary, read_summaries
from harness.experiment.sections import Resources
from harness.sweep.events import Display
from harness.sweep.placement import per_worker
from harness.sweep.ranks import nodes_alive
from harness.sweep.stopping import request_stop

FILE_NAME = "spent.json"
HOUR_S = 3600.0
_LOOK_S = 1.0  # how often the limit is looked at
_KEEP_S = 10.0  # how often the sum is written: what the kill of a driver leaves uncounted


class _Spent(Schema):
    device_s: float


def spent_s(run: Path, devices: float) -> float:
    """Device-seconds that a run has spent so far: those that were counted, or those of its records, if they are more.

    Args:
        run: the run folder.
        devices: of a trial.

    Raises:
        ValueError: a file is not what it should be.
    """
    counted = 0.0
    with suppress(FileNotFoundError):
        counted = read_strictly(_Spent, run / FILE_NAME, "the device-hours of a run").device_s
    records = sum(summary.wall_time_s for summary in read_summaries(run).known.values())
    attempts = (read_strictly(Summary, path, "a trial record") for path in run.glob("trials/*/attempt-*.json"))
    return max(counted, devices * (records + sum(attempt.wall_time_s for attempt in attempts)))


class Metered:
    """A display that counts what the trials spend, and passes everything on.

    Args:
        display: receives the events.
        run: the run folder.
        limit_h: device-hours at which the run is asked to end.
        resources: of a trial.
        devices_of: the GPUs of a trial, or 1 without GPUs, once there is a cluster.
    """

    def __init__(
        self,
        display: Display,
        run: Path,
        limit_h: float,
        resources: Resources,
        devices_of: Callable[[Resources], float] | None = None,
    ) -> None:
        self._display, self._run, self._limit_s, self._resources = display, run, limit_h * HOUR_S, resources
        self._devices_of = devices_of or _devices_here
        self._devices, self._before_s, self._ended_s = 1.0, 0.0, 0.0
        self._running: dict[str, float] = {}  # place → when its trial got it, or the first of a pack
        self._places: dict[str, str] = {}  # trial id → its place
        self._lock = threading.Lock()
        self._known = False  # what was spent before, which the cluster's devices decide

    @property
    def spent_s(self) -> float:
        """Device-seconds so far, with those of earlier runs in this folder."""
        now = time.monotonic()
        with self._lock:
            return self._before_s + self._devices * (self._ended_s + sum(now - t for t in self._running.values()))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the limit while trials run."""
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            self._keep()

    def _watch(self, over: threading.Event) -> None:
        kept, asked = time.monotonic(), False
        while not over.wait(_LOOK_S):
            if self._known and not asked and self.spent_s >= self._limit_s:
                asked = True
                request_stop(self._run, "budget")
            if time.monotonic() - kept >= _KEEP_S:
                kept = time.monotonic()
                self._keep()

    def _keep(self) -> None:
        if not self._known:  # the cluster is not there yet, and what earlier runs wrote stays
            return
        write_atomically(self._run / FILE_NAME, json.dumps({"device_s": round(self.spent_s, 3)}) + "\n")

    def opened(self, run: Path, at_once: int) -> None:
        """The cluster is there: what a trial has of it is known."""
        self._devices = self._devices_of(self._resources)
        self._before_s = spent_s(self._run, self._devices)
        self._known = True
        self._display.opened(run, at_once)

    def noted(self, line: str) -> None:
        """Passed on."""
        self._display.noted(line)

    def abandoned(self, line: str) -> None:
        """Passed on."""
        self._display.abandoned(line)

    def started(self, trial_id: str, place: str) -> None:
        """A trial got its place; if it had one that died, its time goes on."""
        with self._lock:
            self._places[trial_id] = place
            self._running.setdefault(place, time.monotonic())
        self._display.started(trial_id, place)

    def progressed(self, trial_id: str, progress: dict[str, Any]) -> None:
        """Passed on."""
        self._display.progressed(trial_id, progress)

    def ended(self, record: TrialRecord) -> None:
        """A trial left its place, which is free when all that shared it have."""
        with self._lock:
            place = self._places.pop(record.trial_id, "")
            if place not in self._places.values() and (began := self._running.pop(place, None)) is not None:
                self._ended_s += time.monotonic() - began
        self._display.ended(record)


def devices_of(resources: Resources, gpus_per_worker: float) -> float:
    """What a trial counts as: its GPUs, a part of one as a part; without GPUs it is one slot."""
    return resources.workers * gpus_per_worker or 1.0


def _devices_here(resources: Resources) -> float:
    return devices_of(resources, per_worker(resources, nodes_alive())["GPU"])
