"""What a run needs to know of its trials to go on: a few fields of every record, of ten thousand in a second."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat

from harness.core.inside import links_in
from harness.core.record import Plan, Status, read_plan, record_path
from harness.core.schema import read_strictly
from harness.core.search import read_decisions


class Summary(BaseModel):
    """Of a trial that has ended. The record, of which it is a part, is checked as a whole when its scores are read."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    trial_id: str
    status: Status
    reason: str | None = None
    wall_time_s: FiniteFloat
    device: str = ""


@dataclass(frozen=True)
class Summaries:
    """Of the records in a run folder, by the name of the trial's folder; or why one could not be read."""

    known: Mapping[str, Summary]
    broken: Mapping[str, str]


def read_summaries(run: Path) -> Summaries:
    """Read the summaries of all records in a run folder."""
    known: dict[str, Summary] = {}
    links = [name for name in links_in(run) if name.startswith("trials")]
    broken = {name.removeprefix("trials/"): f"{run / name}: a link, which is not followed" for name in links}
    for name in () if "trials" in links else _names(run / "trials"):
        path = record_path(run, name)
        if name in broken or not os.path.lexists(path):  # the trial has not ended; a dangling link is a broken record
            continue
        try:
            found = read_strictly(Summary, path, "a trial record")
        except ValueError as error:
            broken[name] = str(error)
        except OSError as error:
            broken[name] = f"{path}: not a trial record: {error}"
        else:
            if found.trial_id == name:
                known[name] = found
            else:
                broken[name] = f"{path}: contains the record of another trial, {found.trial_id}"
    return Summaries(known, broken)


def _names(trials: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(trials))
    except (FileNotFoundError, NotADirectoryError):  # reading the run says of a file in its place
        return []


@dataclass(frozen=True)
class Brief:
    """A run folder as far as its progress goes.

    Attributes:
        folder: the run folder.
        plan: its plan.
        records: by trial id, of planned trials.
        broken: one message for each file that could not be read.
        foreign: how many records belong to trials that are not in the plan.
        out: ids of trials that halving has pruned for good.
    """

    folder: Path
    plan: Plan
    records: Mapping[str, Summary]
    broken: tuple[str, ...]
    foreign: int
    out: frozenset[str]

    @property
    def foreign_lines(self) -> list[str]:
        """As of a whole ``Run``, without what has changed."""
        start = "1 record belongs to a trial" if self.foreign == 1 else f"{self.foreign} records belong to trials"
        return [f"{start} not in the plan"] if self.foreign else []

    def trial_folder(self, trial_id: str) -> Path:
        """Folder of a trial's files."""
        return self.folder / "trials" / trial_id


def read_brief(folder: Path) -> Brief:
    """Read the progress of a run.

    Raises:
        FileNotFoundError: the folder has no plan.
        ValueError: the plan is invalid.
    """
    plan, found = read_plan(folder), read_summaries(folder)
    planned = {trial.trial_id for trial in plan.trials}
    broken = list(found.broken.values())
    out: frozenset[str] = frozenset()
    try:
        out = frozenset(trial_id for decision in read_decisions(folder) for trial_id in decision.out)
    except ValueError as error:
        broken.append(str(error))
    records = {trial_id: one for trial_id, one in found.known.items() if trial_id in planned}
    return Brief(folder, plan, records, tuple(broken), len(found.known) - len(records), out)
