"""What a run needs to know of its trials to go on: a few fields of every record, of ten thousand in a second."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat

from harness.core.record import Status
from harness.core.schema import read_strictly


class Summary(BaseModel):
    """Of a trial that has ended. The record, of which it is a part, is checked as a whole when its scores are read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    trial_id: str
    status: Status
    reason: str | None = None
    wall_time_s: FiniteFloat
    device: str = ""


def read_summaries(run: Path) -> dict[str, Summary]:
    """The summaries of all records in a run folder, by trial id.

    Raises:
        ValueError: a file is not a record; the message names it.
    """
    found = {}
    for name in _names(run / "trials"):
        path = run / "trials" / name / "record.json"
        try:
            found[name] = read_strictly(Summary, path, "a trial record")
        except FileNotFoundError:  # the trial has not ended, unless there is a dangling link
            if os.path.lexists(path):
                raise ValueError(f"{path}: not a trial record: a link to nothing") from None
        except OSError as error:
            raise ValueError(f"{path}: not a trial record: {error}") from error
    return found


def _names(trials: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(trials))
    except (FileNotFoundError, NotADirectoryError):  # reading the run says of a file in its place
        return []
