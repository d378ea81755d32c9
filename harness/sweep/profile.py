"""Profiles a run: speed, memory and energy of its methods, apart from training, in ``profile.json`` of the run folder.

``profile_run`` is called by ``harness profile`` and by scripts; ``run_experiment`` calls ``measure_run`` at its end.
What is measured and how: harness/trial/profile.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from harness.core.durations import duration
from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.profile import Profile, ProfileEntry, profile_path, write_profile
from harness.core.record import read_run
from harness.core.schema import read_strictly
from harness.core.source import read_yaml
from harness.core.storage import local_folder, push_copy
from harness.core.terminal import Terminal
from harness.core.validation import check
from harness.core.weights import check_unchanged
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.components import check_files
from harness.sweep import preflight
from harness.sweep.lock import exclusive
from harness.sweep.profile_entries import bare, completed, measured_entry, reference_entry
from harness.sweep.profile_plan import Group, Wanted, groups_of, key_of
from harness.sweep.profile_worker import Worker
from harness.trial.profile import BLOCK_S, LONGEST_S, ROUNDS, Answer, Job, StageTimes
from results.leaderboard.join import read_runs

if TYPE_CHECKING:
    from results.report import ReportPaths


LOG = "profile.log"
PARTIAL, AGAIN = "profile.partial.json", "profile.again.json"  # of an unfinished profile; of an unfinished --fresh one
_START_S = 8.0  # of a process with its libraries


def profile_run(folder: str | Path, *, fresh: bool = False, console: Console | None = None) -> Profile:
    """Measure what a run's profile lacks, and write the report again.

    Ctrl-C ends it early: what was measured is kept for the next call, and ``profile.json`` stays as it was.

    Args:
        folder: a run folder, or its URL.
        fresh: measure everything again; the old profile is replaced when all is measured.
        console: for progress; default: standard output.

    Returns:
        The profile of the run.

    Raises:
        UserError: it is no run folder, no trial has finished, another harness works in it, or the models or the data
            are not there as they were in training; raised before anything is measured.
    """
    from results.report import write_report  # it imports matplotlib

    folder, console = local_folder(folder), console or Terminal()
    run = read_runs([folder])
    if not any(record.status == "finished" for record in run.records.values()):
        raise UserError(f"{folder}: no trial has finished, so there is nothing to profile")
    preflight.check_folder(folder)
    with exclusive(folder):
        specs = [entry.spec for group in groups_of(run) for entry in group.entries if entry.spec is not None]
        _check(specs, folder, console)
        profile = measure_run(folder, resources_of(folder), console, fresh)
        report = write_report([folder])
        _update_mlflow(folder, report, console)
        push_copy(folder)
    return profile


def _update_mlflow(folder: Path, report: ReportPaths, console: Console) -> None:
    """Log the profile and the report to the run's MLflow, if it was logged to one; a problem is shown."""
    from harness.tracking.grid import close_grid, reopen_grid

    board = report.board
    try:
        grid = reopen_grid(board.run.plan, folder)
    except UserError as error:
        problem: str | None = str(error)
    else:
        complete = not board.missing and not board.failed
        problem = close_grid(grid, complete, list(report.all), board).problem if grid else None
    if problem:
        console.print(f"MLflow could not be updated: {problem}", highlight=False, markup=False, soft_wrap=True)


def resources_of(folder: Path) -> Resources:
    """The resources that the trials of a run had, from the experiment in its folder.

    Raises:
        UserError: it is not there, or not valid.
    """
    path = folder / "experiment.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such file; `harness run` writes it into every run folder")
    content, top = read_yaml(path)
    section = content.get("resources") if isinstance(content, dict) else None
    return check(Resources, section or {}, top / "resources")


def _check(specs: Sequence[TrialSpec], folder: Path, console: Console) -> None:
    for spec in specs:
        check_unchanged(spec.pinned_backbone.model_dump(), spec.fingerprints)
        check_files(spec)
    preflight.check_models(specs)
    preflight.check_data(specs, folder, console)


def measure_run(folder: Path, resources: Resources, console: Console, fresh: bool = False) -> Profile:
    """Measure what the profile of a run lacks; the caller holds the lock of the folder.

    Args:
        folder: of a run with a finished trial.
        resources: that its trials had.
        console: for progress.
        fresh: measure everything again.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; what was measured is kept.
    """
    groups = groups_of(read_run(folder))
    known = _Known.read(folder, fresh)
    todo = sum(len(_missing(group, group.reference, resources, known)) for group in groups)
    if todo:
        about = duration(sum(_expected_s(group, resources, known) for group in groups) + _START_S)
        line = f"profile: speed and memory of {todo} method{'s' * (todo > 1)}, apart from training; about {about}"
        if resources.workers > 1:
            line += f"; in one process each, not in {resources.workers} as in training"
        console.print(line, highlight=False, soft_wrap=True)
    with ProfileProgress(console, 2 * todo) as progress, Worker(folder / LOG) as worker:
        found = [entry for group in groups for entry in _Measuring(group, resources, known, worker, progress).entries()]
    profile = Profile(entries=tuple(found))
    write_profile(folder, profile)
    known.path.unlink(missing_ok=True)
    for entry in profile.entries:
        if entry.reason and entry.key:
            console.print(f"not profiled: {entry.name}: {entry.reason}", highlight=False, markup=False, soft_wrap=True)
    return profile


@dataclass
class _Known:
    """Entries measured so far, by key, and where they are kept until all are."""

    path: Path
    entries: dict[str, ProfileEntry]

    @classmethod
    def read(cls, folder: Path, fresh: bool) -> _Known:
        """What an earlier call measured: of the profile and of one that was not completed."""
        path = folder / (AGAIN if fresh else PARTIAL)
        files = [path] if fresh else [profile_path(folder), path]
        entries: dict[str, ProfileEntry] = {}
        for file in files:
            with suppress(OSError, ValueError):  # a broken one is measured again
                for entry in read_strictly(Profile, file, "a profile").entries:
                    if entry.key and not entry.reason:
                        entries[entry.key] = entry
        return cls(path, entries)

    def add(self, entry: ProfileEntry) -> None:
        """Keep an entry, on disk too."""
        self.entries[entry.key] = entry
        write_atomically(self.path, Profile(entries=tuple(self.entries.values())).model_dump_json(indent=1) + "\n")


def _missing(group: Group, reference: Wanted, resources: Resources, known: _Known) -> list[Wanted]:
    """The entries that can be measured and have not been, with this reference."""
    wanted = [entry for entry in group.entries if entry.spec is not None]
    return [one for one in wanted if key_of(one.measurable, reference.measurable, resources) not in known.entries]


def _expected_s(group: Group, resources: Resources, known: _Known) -> float:
    """A rough estimate from the times of training."""
    missing = _missing(group, group.reference, resources, known)
    other = _step_s(group.reference)
    seconds = sum(3.0 + (ROUNDS + 6) * max(BLOCK_S, _step_s(entry) + other) for entry in missing)
    longest = len(missing) * (LONGEST_S + 3.0)
    return min(seconds, longest) + (_build_s(group.reference) if missing else 0.0)


def _step_s(entry: Wanted) -> float:
    if entry.record is None or entry.record.throughput is None:
        return 0.1
    options = entry.measurable.optimizer
    examples = options.per_device_train_batch_size * options.gradient_accumulation_steps
    return examples / entry.record.throughput.examples_per_s


def _build_s(entry: Wanted) -> float:
    return entry.record.phases_s.get("build", 0.0) if entry.record else 0.0


class _Measuring:
    """Measures one setting."""

    def __init__(
        self, group: Group, resources: Resources, known: _Known, worker: Worker, progress: ProfileProgress
    ) -> None:
        self.group, self.resources, self.known = group, resources, known
        self.worker, self.progress = worker, progress
        self.reference = group.reference
        self._failed: dict[tuple[str, ...], str] = {}  # trial ids → reason
        self._device = ""

    def entries(self) -> list[ProfileEntry]:
        """All entries of the setting, in the order of the plan.

        If the reference cannot be measured, the first method that can be takes its place.
        """
        while missing := self._missing():
            before = len(self._failed), set(self.known.entries)
            self._measure(missing)
            if before == (len(self._failed), set(self.known.entries)):
                for entry in missing:
                    self._failed[entry.trial_ids] = f"the measuring process ended; see {LOG}"
            if self.reference.trial_ids in self._failed:
                left = (one for one in self.group.entries if one.spec and one.trial_ids not in self._failed)
                self.reference = next(left, self.reference)
        return [self._entry(entry) for entry in self.group.entries]

    def _missing(self) -> list[Wanted]:
        missing = _missing(self.group, self.reference, self.resources, self.known)
        return [one for one in missing if one.trial_ids not in self._failed]

    def _key(self, entry: Wanted) -> str:
        return key_of(entry.measurable, self.reference.measurable, self.resources)

    def _bare(self, entry: Wanted, reason: str | None) -> ProfileEntry:
        key = self._key(entry) if entry.spec else ""
        return bare(entry, self.reference, key, self._device, reason)

    def _entry(self, entry: Wanted) -> ProfileEntry:
        reason = entry.reason or self._failed.get(entry.trial_ids)
        found = None if reason else self.known.entries.get(self._key(entry))
        reference = self.known.entries.get(self._key(self.reference))
        if found is None or reference is None:
            return self._bare(entry, reason)
        named = {"name", "setting", "trial_ids", "reference", "reference_trial_ids"}  # a grid may have grown
        return completed(found, reference).model_copy(update=self._bare(entry, None).model_dump(include=named))

    def _measure(self, missing: Sequence[Wanted]) -> None:
        """Measure entries with the reference, which may be one of them, until all are told or the process ends."""
        asked = [self.reference, *(entry for entry in missing if entry is not self.reference)]
        without = self.reference not in missing  # the reference was measured before
        numbers = tuple(range(1 if without else 0, len(asked)))
        peaks: dict[int, int | None] = {}
        reasons: dict[int, str] = {}
        rounds: list[tuple[StageTimes, ...]] = []
        for answer in self.worker.ask(self._job(asked, numbers)):
            index, entry = answer.index, asked[answer.index]
            if self._moved(answer.device):
                self.worker.stop()
                return
            if answer.begun:
                self.progress.now(entry.name)
            elif answer.reason:
                reasons[index] = answer.reason
            elif not answer.stages:
                peaks[index] = answer.peak_bytes
            else:
                rounds.append(answer.reference or answer.stages)
                if not without:
                    own = self._bare(self.reference, reasons.get(0))
                    self.known.add(reference_entry(own, rounds, peaks.get(0)))
                if index:
                    self.known.add(measured_entry(self._bare(entry, reasons.get(index)), answer, peaks.get(index)))
            self.progress.told(answer)
        for index, reason in reasons.items():
            if self._key(asked[index]) not in self.known.entries or (index == 0 and without):
                self._failed[asked[index].trial_ids] = reason

    def _job(self, asked: Sequence[Wanted], numbers: tuple[int, ...]) -> Job:
        most = (os.cpu_count() or 1) // self.resources.cpus_per_worker
        return Job(
            specs=tuple(entry.measurable for entry in asked),
            resources=self.resources,
            run=str(self.known.path.parent),
            memory=numbers,
            speed=tuple(range(1, len(asked))) or (0,),
            at_once=max(1, min(most, self.resources.max_concurrent_trials or most)),
        )

    def _moved(self, device: str) -> bool:
        """Whether entries of this setting were measured on another device; they are measured again."""
        self._device = device
        keys = {self._key(entry) for entry in self.group.entries if entry.spec is not None}
        old = [key for key in keys & set(self.known.entries) if self.known.entries[key].device != device]
        for key in old:
            del self.known.entries[key]
        return bool(old)


class ProfileProgress:
    """What is measured, a bar, and the time left; nothing without a terminal, where lines say the outcome.

    Args:
        console: where to draw.
        total: number of answers that are expected.
    """

    def __init__(self, console: Console, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not (total and console.is_terminal))
        self._total, self._began, self._answered = total, time.monotonic(), 0
        self._task = self._bar.add_task("profile: starting", total=total, left="")

    def __enter__(self) -> ProfileProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def now(self, name: str) -> None:
        """A method is measured now."""
        self._bar.update(self._task, description=f"profile: {escape(name)}")

    def told(self, answer: Answer) -> None:
        """An answer has come."""
        if answer.begun:
            return
        self._answered += 1
        elapsed = time.monotonic() - self._began
        left = max(0.0, elapsed * self._total / self._answered - elapsed)
        self._bar.update(self._task, completed=self._answered, left=f"about {duration(left)} left")
