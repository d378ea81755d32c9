"""The run of one trial in MLflow, while the trial runs.

What is to be logged is written to the trial's journal; a thread delivers it. Training waits for MLflow only where a
trial ends, and for a few seconds in all: what is not delivered then is delivered when the grid ends.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from harness.core.record import PlannedTrial, TrialRecord
from harness.experiment.plan import TrialSpec
from harness.tracking.delivery import Delivery, Destination
from harness.tracking.journal import JOURNAL, Journal
from harness.tracking.log import named
from harness.tracking.store import import_libraries, reason_of, without_password
from harness.tracking.system import SystemMetrics

logger = logging.getLogger(__name__)

_WAIT_S = 2.0  # for the delivery of a trial that has ended
_IN_VAIN_S = 5.0  # after having waited so long without an answer, this process waits for this store no more
_RETRY_S, _LONGEST_RETRY_S = 5.0, 60.0
_GATHER_S = 1.0  # what comes within this time goes in one call; of a trial that is shorter, all of it
_waited_s: dict[str, float] = {}  # URI → how long this process has waited without an answer since the last one


class Tracker(Protocol):
    """Receives the progress and the result of a trial."""

    @property
    def run_id(self) -> str | None:
        """The id of the trial's run; None: there is none yet."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What could not even be kept for later."""

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


class MlflowTracker:
    """The run of one trial.

    Args:
        grid: where to log.
        spec: spec of the trial, whose values become params.
        planned: display names.
        folder: folder of the trial, which has the journal and the id of the run.
    """

    def __init__(self, grid: Destination, spec: TrialSpec, planned: PlannedTrial, folder: Path) -> None:
        self.warnings: tuple[str, ...] = ()
        self._journal = Journal(folder)
        self._keep(self._journal.begin)
        values = spec.model_dump(mode="json")
        self._courier = _Courier(
            grid.uri, self._journal, Delivery(grid, planned, values, self._journal, self._journal.earlier)
        )
        weakref.finalize(self, self._courier.abandon)  # Ray may reuse the process of an aborted trial
        self._system: SystemMetrics | None = None
        try:
            import_libraries(grid.uri)
            from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING as ENABLED
        except ImportError as error:
            self._lose(f"MLflow cannot be imported: {error}")
            return
        self._courier.start()
        if ENABLED.get() or not ENABLED.is_set():
            self._system = SystemMetrics(self._courier.add_sample, self._journal.began_ms)

    @property
    def run_id(self) -> str | None:
        """The id of the trial's run; it is waited for, if the store answers."""
        self._courier.wait_for(self._courier.tried)
        return self._courier.delivery.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of an epoch, by optimizer step."""
        self._keep(lambda: self._courier.add(named(values), step))

    def pause(self) -> None:
        """Stop sampling the system; the run stays open, and a later process goes on with it."""
        if self._system:
            self._system.stop()
        self._courier.end(None)
        self._journal.close()

    def finish(self, record: TrialRecord, folder: Path) -> None:
        """Log the numbers and files of the record, and end the run; if MLflow does not answer, the journal stays."""
        if self._system:
            self._system.stop()
        self._courier.end(record)
        self._journal.close()

    def _keep(self, write: Callable[[], None]) -> None:
        """Call what writes to the journal; points of a disk that is full are kept in memory, for this process alone."""
        try:
            write()
        except OSError as error:
            self._lose(f"{self._journal.path}: MLflow's journal could not be written: {error.strerror or error}")

    def _lose(self, warning: str) -> None:
        if not self.warnings:
            self.warnings = (warning,)
            logger.error("%s", warning)


class _Courier:
    """The thread that delivers; it does not know the tracker, so that it ends with it."""

    def __init__(self, uri: str, journal: Journal, delivery: Delivery) -> None:
        self.uri, self.journal, self.delivery = uri, journal, delivery
        self.tried, self.done = threading.Event(), threading.Event()
        self._wake, self._hurry = threading.Event(), threading.Event()  # there is something; do not wait for more
        self._over, self._ending = False, False
        self._record: TrialRecord | None = None
        self._failing, self._problem = False, ""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._deliver, daemon=True, name=f"deliver {JOURNAL}")

    def start(self) -> None:
        self._thread.start()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add points to the journal, and deliver them.

        Raises:
            OSError: the journal could not be written.
        """
        try:
            with self._lock:
                self.journal.add(values, step)
        finally:
            if not self._failing:
                self._wake.set()

    def add_sample(self, values: Mapping[str, float], step: int) -> None:
        """Likewise, a sample of the system's metrics, which may be lost where the disk is full."""
        try:
            self.add(values, step)
        except OSError as error:
            logger.warning("a sample of the system is not in the journal: %s", error.strerror)

    def end(self, record: TrialRecord | None) -> None:
        """Deliver the rest, and the record if there is one; wait for it a little, and then leave it to others."""
        if self._thread.is_alive():
            self._record, self._ending = record, True
            self._hurry.set()
            self._wake.set()
            self.wait_for(self.done)
            self.abandon()
        if self._failing or not self.done.is_set():
            said = f"MLflow does not answer ({self._problem or 'it is slow'})"
            logger.warning("%s; what it lacks is kept in %s and delivered later", said, self.journal.path)

    def abandon(self) -> None:
        """Deliver no more."""
        self._over = True
        self._hurry.set()
        self._wake.set()

    def wait_for(self, event: threading.Event) -> None:
        """Wait for an answer of the store, for a few seconds in all trials of this process that get none."""
        patience_s = min(_WAIT_S, _IN_VAIN_S - _waited_s.get(self.uri, 0.0))
        began = time.monotonic()
        if self._thread.is_alive() and not event.wait(max(0.0, patience_s)):
            _waited_s[self.uri] = _waited_s.get(self.uri, 0.0) + time.monotonic() - began

    def _deliver(self) -> None:
        pause_s, opened = _RETRY_S, False
        while not self._over:
            ending = self._ending
            try:
                self._once(ending, opened)
                pause_s, self._failing = _RETRY_S, False
                _waited_s.pop(self.uri, None)
            except Exception as error:  # database drivers and HTTP clients raise many types
                self._note(error)
                pause_s, self._failing = min(2 * pause_s, _LONGEST_RETRY_S), True
            self.tried.set()
            if ending:
                self.done.set()
                return
            if self._failing or opened:  # the params are still to be sent when the run has just been made
                self._wake.wait(pause_s if self._failing else None)
            if not self._failing:
                opened = True
                self._hurry.wait(_GATHER_S)
            self._wake.clear()

    def _once(self, ending: bool, opened: bool) -> None:
        if ending and self._record is not None:
            self.delivery.end(self._record)
            if not self._over:  # otherwise the folder may be gone, or another process's
                self.journal.remove()
        elif ending or opened:
            self.delivery.update()
        else:
            self.delivery.open()

    def _note(self, error: Exception) -> None:
        self._problem = f"{type(error).__name__}: {reason_of(error, self.uri)}"
        if not self._failing:
            logger.info("MLflow does not answer\n%s", without_password(traceback.format_exc(), self.uri))
