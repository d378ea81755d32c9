"""Provenance of every number: the facts of each trial, and once what many trials share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from harness.core.record import PlannedTrial, TrialRecord
from results.leaderboard import format as text
from results.leaderboard.table import Leaderboard
from results.statistics.resample import score_on_test


@dataclass(frozen=True)
class Environment:
    """Software and device; ``trials`` is the number of trials that ran with it."""

    number: int
    revision: str
    device: str
    versions: dict[str, str]
    trials: int


@dataclass(frozen=True)
class Note:
    """A warning, and the number of records with it."""

    number: int
    words: str
    trials: int


@dataclass(frozen=True)
class TrialLine:
    """One trial as its table shows it: text, ready to be escaped."""

    trial_id: str
    label: str
    grouping: str
    setting: str
    seed: str
    learning_rate: str
    status: str
    score: str
    best_epoch: str
    examples: str
    steps: str
    fingerprints: str
    environment: str
    notes: str
    started: str
    folder: str


@dataclass(frozen=True)
class Provenance:
    """Trials in the order of the plan; environments and notes in the order in which they first occur."""

    environments: tuple[Environment, ...]
    notes: tuple[Note, ...]
    folders: tuple[str, ...]  # the run folders, where there are several
    trials: tuple[TrialLine, ...]


def build_provenance(board: Leaderboard) -> Provenance:
    """Number the environments and warnings that records share, and refer to them from every trial."""
    run = board.run
    planned = [(trial, run.records[trial.trial_id]) for trial in run.plan.trials if trial.trial_id in run.records]
    environments = Counter(_environment(record) for _, record in planned)
    notes = Counter(warning for _, record in planned for warning in dict.fromkeys(record.warnings))
    environment_numbers = {key: number for number, key in enumerate(environments, 1)}
    note_numbers = {key: number for number, key in enumerate(notes, 1)}
    folders = tuple(dict.fromkeys(str(folder) for folder in run.folders.values()))
    several = len(folders) > 1
    lines = tuple(
        _line(
            trial,
            record,
            score=_number(score_on_test(record, board.primary.name)),
            environment=str(environment_numbers[_environment(record)]),
            notes=", ".join(str(note_numbers[warning]) for warning in dict.fromkeys(record.warnings)),
            folder=str(run.folders.get(trial.trial_id, run.folder)) if several else "",
        )
        for trial, record in planned
    )
    return Provenance(
        tuple(
            Environment(environment_numbers[key], key[0], key[1], dict(key[2]), count)
            for key, count in environments.items()
        ),
        tuple(Note(note_numbers[words], words, count) for words, count in notes.items()),
        folders if several else (),
        lines,
    )


def _environment(record: TrialRecord) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    return record.git_revision or text.ABSENT, record.device or text.ABSENT, tuple(sorted(record.versions.items()))


def _number(value: float | None) -> str:
    return text.ABSENT if value is None else text.number(value)


def _line(trial: PlannedTrial, record: TrialRecord, score: str, environment: str, notes: str, folder: str) -> TrialLine:
    data = record.data
    prints = (data.examples_fingerprint, data.order_fingerprint, data.evaluation_fingerprint) if data else ()
    return TrialLine(
        trial_id=trial.trial_id,
        label=trial.label,
        grouping=trial.grouping,
        setting=trial.setting,
        seed=str(trial.seed),
        learning_rate=text.ABSENT if trial.learning_rate is None else f"{trial.learning_rate:g}",
        status=record.status.replace("_", " "),
        score=score,
        best_epoch=text.ABSENT if record.best_epoch is None else str(record.best_epoch),
        examples=str(data.examples) if data else text.ABSENT,
        steps=str(data.steps) if data else text.ABSENT,
        fingerprints=" ".join(fingerprint[:8] for fingerprint in prints) or text.ABSENT,
        environment=environment,
        notes=notes,
        started=record.started_at,
        folder=folder,
    )
