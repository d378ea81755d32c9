"""How a trial ended, and its record; without torch, for the process that only waits for its workers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.core.files import remove_abandoned, write_atomically
from harness.core.record import Status, TrialRecord, paused_path, write_record

if TYPE_CHECKING:
    from harness.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended in one worker."""

    rank: int
    status: Status = "finished"
    reason: str | None = None  # one line
    traceback: str = ""
    lost: bool = False  # the error is that another worker could not be reached
    record: TrialRecord | None = None  # of rank 0; it is on disk if there was no error
    preempted: bool = False  # it was asked to stop because this worker's process got SIGTERM

    @property
    def failed(self) -> bool:
        """Whether an error ended it."""
        return bool(self.traceback)


def conclude(record: TrialRecord, run: Path, tracker: Tracker) -> None:
    """Write the record of a trial that has ended, and end its tracking; of one that waits, ``paused.json``.

    A trial that was asked to stop leaves no record, because it goes on later.
    """
    for warning in record.warnings:
        logger.warning("%s", warning)
    waits = paused_path(run, record.trial_id)
    if record.status == "paused":
        logger.info("paused: %s", record.reason)
        tracker.pause()
        write_atomically(waits, record.model_dump_json(indent=1) + "\n")
    elif record.status == "cancelled":
        logger.info("stopped: %s", record.reason)
        tracker.pause()
    else:
        write_record(run, record)
        remove_abandoned(run / "trials" / record.trial_id)
        waits.unlink(missing_ok=True)
        tracker.finish(record, run / "trials" / record.trial_id)
