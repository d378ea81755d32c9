"""Where a worker runs a trial: in the run folder, or in a copy of the trial's folder if the run is at a URL.

Then its checkpoints are pushed as they are made, so that another node can go on, and its record after all other files.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import SweepEndedError
from harness.core.files import write_atomically
from harness.core.record import read_record, record_path
from harness.core.samples import PREVIEWS
from harness.core.storage import Copy, Folder, StorageError, copy_folder

logger = logging.getLogger(__name__)

PATIENCE_S = 600.0  # how long a lost connection to the storage is tried again before a trial fails
_CHECKPOINT_PATIENCE_S = 30.0  # of a checkpoint: the next one has all of it
_INPUTS = "inputs.json"  # digests of the input files, made by the driver


@dataclass(frozen=True)
class Stored:
    """A run folder at a URL, as its driver has it."""

    copy: Copy

    def fetch(self, trial_id: str) -> None:
        """Fetch what a trial that has ended has pushed, for the driver.

        Raises:
            SweepEndedError: the storage could not be reached for too long.
        """
        try:
            self.copy.pull(f"trials/{trial_id}")
        except StorageError as error:
            raise SweepEndedError(str(error)) from error


class TrialPlace:
    """The folder of a trial.

    Args:
        run: the run folder, if it is not at a URL.
        url: of the run folder, if it is.
        trial_id: of the trial.

    Attributes:
        run: the run folder to work in.
        folder: the trial's.
    """

    def __init__(self, run: Path, url: str | None, trial_id: str) -> None:
        self.run = run if url is None else copy_folder(url, "trials")
        self.folder = self.run / "trials" / trial_id
        self._there = None if url is None else Folder(url, PATIENCE_S)
        self._copy = None if self._there is None else Copy(self._there.below(f"trials/{trial_id}"), self.folder)
        self._pushed: int | None = None  # when the state of the last checkpoint was written

    def begin(self) -> bool:
        """Fetch what an earlier attempt on any node has left.

        Returns:
            Whether the trial has finished, and only ``end`` is missing.

        Raises:
            StorageError: the storage cannot be read.
        """
        if self._copy is None or self._there is None:
            return False
        self._copy.pull(weights=True)
        if content := self._there.read(_INPUTS):
            write_atomically(self.run / _INPUTS, content.decode())
        self._pushed = self._checkpointed()
        record = record_path(self.run, self.folder.name)
        if not record.exists():
            return False
        if read_record(record).status == "finished":
            return True
        record.unlink()
        return False

    def progressed(self) -> None:
        """Push the latest checkpoint, if it is new; without a connection, the next one."""
        if self._copy is None or (made := self._checkpointed()) in {None, self._pushed}:
            return
        self._copy.there.patience_s = _CHECKPOINT_PATIENCE_S
        try:
            self._copy.push(removed=True)
            self._pushed = made
        except StorageError as error:
            logger.warning("the checkpoint is only on this machine: %s", error)
        finally:
            self._copy.there.patience_s = PATIENCE_S

    def end(self) -> None:
        """Push all files, the record last, and remove those here.

        Raises:
            StorageError: the storage cannot be written to; the files stay here, for the next attempt.
        """
        if self._copy is None or self._there is None:
            return
        Copy(self._there.below(PREVIEWS), self.run / PREVIEWS).push()
        self._copy.push(removed=True)
        shutil.rmtree(self.folder)

    def _checkpointed(self) -> int | None:
        try:
            return (self.folder / "checkpoint" / "state.json").stat().st_mtime_ns
        except FileNotFoundError:
            return None
