"""How a trial ended in one of its workers; without torch, for the process that only waits for them."""

from __future__ import annotations

from dataclasses import dataclass

from harness.core.record import Status, TrialRecord


@dataclass(frozen=True)
class Outcome:
    """How a trial ended in one worker."""

    rank: int
    status: Status = "finished"
    reason: str | None = None  # one line
    traceback: str = ""
    lost: bool = False  # the error is that another worker could not be reached
    record: TrialRecord | None = None  # of rank 0; it is on disk if there was no error

    @property
    def failed(self) -> bool:
        """Whether an error ended it."""
        return bool(self.traceback)
