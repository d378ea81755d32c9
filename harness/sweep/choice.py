"""Which unfinished trials a run tries: those that are selected, and not those that fail again and again.

A trial that failed is tried again by the next run, because most failures are of the machine. One that fails for the
same reason each time would cost a large grid the same hours at every run, so after two such failures it is left alone,
until the code is another one or ``retry`` asks for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from harness.core.errors import UserError
from harness.core.record import Plan, PlannedTrial, Status, TrialRecord, read_record, record_path
from harness.core.selection import select
from harness.core.storage import Copy
from harness.experiment.plan import TrialSpec

Retry = Literal["auto", "failed", "none"]
FAILED = ("failed", "out_of_memory")  # the statuses of trials that are tried again
Pair = tuple[TrialSpec, PlannedTrial]


@dataclass
class Choice:
    """What a run was asked for.

    Attributes:
        only: selects trials, such as ``rank=8 and seed<3``; empty: all.
        retry: which trials that failed before are tried again: ``auto``, those that have not failed twice in the same
            way; ``failed``, all; ``none``.
        tried: ids of the trials that this run has tried; none is tried twice.
    """

    only: str = ""
    retry: Retry = "auto"
    tried: set[str] = field(default_factory=set)

    def selected(self, plan: Plan) -> frozenset[str]:
        """The ids of the selected trials.

        Raises:
            UserError: the selection cannot be read, selects none, or splits a row whose learning rates are halved.
        """
        if not self.only:
            return frozenset(trial.trial_id for trial in plan.trials)
        found = select(plan, self.only)
        rows: dict[tuple[str, str, str], set[bool]] = {}
        for trial in plan.trials:
            if trial.halving is not None:
                rows.setdefault((trial.label, trial.grouping, trial.setting), set()).add(trial.trial_id in found)
        split = next((" ".join(filter(None, row)) for row, inside in rows.items() if len(inside) > 1), None)
        if split:
            raise UserError(
                f"--only: {self.only!r} selects a part of {split}, whose learning rates are halved: they wait for one "
                "another; allowed: a selection of whole rows, with all their learning rates and seeds"
            )
        return found

    def todo(self, unfinished: Iterable[Pair], plan: Plan, run: Path) -> list[Pair]:
        """The trials to run now, which count as tried from then on.

        Args:
            unfinished: the trials without a finished record.
            plan: all trials.
            run: the run folder.
        """
        selected = self.selected(plan)
        chosen = [
            (spec, planned)
            for spec, planned in unfinished
            if (key := planned.trial_id) in selected and key not in self.tried and not self._leaves(run, key)
        ]
        self.tried |= {planned.trial_id for _, planned in chosen}
        return chosen

    def _leaves(self, run: Path, trial_id: str) -> bool:
        if self.retry == "failed" or not (path := record_path(run, trial_id)).exists():
            return False
        record = read_record(path)
        return record.status in FAILED and (self.retry == "none" or fails_alike(run, record))

    def lines(self, unfinished: Iterable[Pair], plan: Plan, run: Path) -> Iterator[str]:
        """What is left out, for the person who started the run."""
        selected = self.selected(plan)
        if self.only:
            yield f"{len(selected)} of {len(plan.trials)} trials selected by --only {self.only!r}"
        ids = (planned.trial_id for _, planned in unfinished)
        left = [trial_id for trial_id in ids if trial_id in selected and self._leaves(run, trial_id)]
        why = "failed before (--retry none)" if self.retry == "none" else "failed twice in the same way"
        if left:
            count = f"{len(left)} {_trials(len(left))}"
            yield f"{count} {why} and {_are(len(left))} not tried again; --retry failed does it"

    def nothing_to_compute(self, plan: Plan, states: Mapping[str, str]) -> Iterator[str]:
        """That there is nothing to run, unless this run has run something before.

        Args:
            plan: all trials.
            states: the status of each trial by its id.
        """
        if self.tried:
            return
        selected = self.selected(plan)
        counts = Counter(states[trial_id] for trial_id in selected)
        failed = sum(counts[status] for status in FAILED)
        ended = f"finished, or were pruned ({counts['pruned']})" if counts["pruned"] else "finished"
        others = f" or failed ({failed})" if failed else ""
        whole = f"all {len(selected)} trials have" if len(selected) != 1 else "the trial has"
        yield f"{whole} already {ended}{others}; nothing to compute"


def fails_alike(run: Path, record: TrialRecord) -> bool:
    """Whether a trial failed the last two times for the same reason, with the same code."""
    earlier = attempts(run, record.trial_id)
    if not earlier or record.status not in FAILED:
        return False
    return _way(earlier[-1]) == _way(record)


def attempts(run: Path, trial_id: str) -> list[TrialRecord]:
    """The records of a trial's failures in earlier runs, the oldest first."""
    paths = record_path(run, trial_id).parent.glob("attempt-*.json")
    numbered = sorted((int(number), path) for path in paths if (number := path.stem.partition("-")[2]).isdecimal())
    return [read_record(path) for _, path in numbered]


def _way(record: TrialRecord) -> tuple[object, ...]:
    """How a trial failed: the place and the examples in parentheses may differ."""
    versions = tuple(sorted(record.versions.items()))
    return record.status, (record.reason or "").partition(" (")[0], record.git_revision, versions


class Ended(Protocol):
    """A record, or a summary of it."""

    @property
    def status(self) -> Status:
        """How its trial ended."""


def stopped_trying(run: Path, records: Mapping[str, Ended]) -> str:
    """``2 trials failed twice in the same way: …``, for those that the next run leaves alone; empty without any."""
    failed = (trial_id for trial_id, record in records.items() if record.status in FAILED)
    count = sum(fails_alike(run, read_record(record_path(run, trial_id))) for trial_id in failed)
    if not count:
        return ""
    return (
        f"{count} {_trials(count)} failed twice in the same way: harness run --retry failed tries {_them(count)} again"
    )


def _trials(count: int) -> str:
    return "trial" if count == 1 else "trials"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def archive(record: Path, storage: Copy | None) -> None:
    """Rename the record of a failed trial that is run again; one that was pruned waits at its rung again."""
    if not record.exists():
        return
    number = len(list(record.parent.glob("attempt-*.json"))) + 1
    pruned = read_record(record).status == "pruned"
    archived = record.with_name("paused.json" if pruned else f"attempt-{number}.json")
    record.rename(archived)
    if storage:
        storage.there.put([archived.relative_to(storage.here).as_posix()], storage.here)
        storage.remove(record.relative_to(storage.here).as_posix())
