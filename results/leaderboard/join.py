"""Several run folders as one run: trials get common names, and each is counted once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.core import naming
from harness.core.errors import UserError
from harness.core.profile import Profile
from harness.core.record import MetricInfo, PlannedTrial, Run, TrialRecord, read_run

AGREES = 1e-6  # relative: test scores of one trial in two folders

__all__ = ["read_runs"]


@dataclass(frozen=True)
class _Part:
    """One of the runs, and its name in the report."""

    name: str
    run: Run


def read_runs(folders: Sequence[Path]) -> Run:
    """Read one run folder as it is, or several as one run.

    Trials of several folders are renamed from the specs of all records, so that equal trials have equal names and
    whatever differs between the folders becomes part of the setting. A trial that is in two folders is counted once:
    the finished one, otherwise the first. ``Run.notes`` reports it.

    Raises:
        UserError: a folder is missing, is given twice or holds no run; a plan is invalid; or the runs have different
            primary metrics or reference methods.
    """
    if not folders:
        raise UserError("no run folder given; a run folder is what `harness run` writes")
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(f"{folders[index]}: this run folder is given twice")
    runs = [_read(folder) for folder in folders]
    return runs[0] if len(runs) == 1 else _joined(_parts(runs))


def _read(folder: Path) -> Run:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; a run folder is what `harness run` writes")
    try:
        return read_run(folder)
    except FileNotFoundError:
        there = "no plan.json here" if folder.exists() else "no such folder"
        beside = [path.parent.name for path in folder.absolute().parent.glob("*/plan.json")]
        near = difflib.get_close_matches(folder.absolute().name, beside, 1, 0.5)
        hint = f"; did you mean '{folder.absolute().with_name(near[0])}'?" if near else ""
        raise UserError(f"{folder}: {there}; a run folder is what `harness run` writes{hint}") from None
    except ValueError as error:
        raise UserError(str(error)) from error


def _parts(runs: Sequence[Run]) -> list[_Part]:
    """The runs by folder name; by full path where two folders have the same name."""
    names = [run.folder.resolve().name for run in runs]
    return [
        _Part(name if names.count(name) == 1 else str(run.folder.resolve()), run)
        for name, run in zip(names, runs, strict=True)
    ]


def _joined(parts: Sequence[_Part]) -> Run:
    first = parts[0].run
    for part in parts[1:]:
        _same(first, part.run, "primary_metric")
        _same(first, part.run, "reference_method")
    records, folders, notes = _one_of_each(parts)
    plan = first.plan.model_copy(
        update={
            "experiment": " + ".join(dict.fromkeys(part.run.plan.experiment for part in parts)),
            "experiment_file": ", ".join(dict.fromkeys(part.run.plan.experiment_file for part in parts)),
            "metrics": _metrics([part.run for part in parts]),
            "equivalence_margin": min(part.run.plan.equivalence_margin for part in parts),
            "trials": _trials(parts, records),
        }
    )
    names = ", ".join(f"{part.name} ({len(part.run.records)} of {len(part.run.plan.trials)})" for part in parts)
    return Run(
        folder=first.folder,
        plan=plan,
        records=records,
        broken=tuple(message for part in parts for message in part.run.broken),
        foreign=tuple(trial_id for part in parts for trial_id in part.run.foreign),
        foreign_reasons=tuple(reason for part in parts for reason in part.run.foreign_reasons),
        folders=folders,
        profile=_profile([part.run for part in parts]),
        out=frozenset[str]().union(*(part.run.out for part in parts)),
        notes=(f"Joined from {len(parts)} run folders (trials with a record): {names}.", *notes),
    )


def _profile(runs: Sequence[Run]) -> Profile | None:
    """The entries of all runs, with the ratios of their own run; a trial that is in two has the entry of the first."""
    profiles = [run.profile for run in runs if run.profile is not None]
    return Profile(entries=tuple(entry for one in profiles for entry in one.entries)) if profiles else None


def _same(one: Run, other: Run, key: str) -> None:
    a, b = getattr(one.plan, key), getattr(other.plan, key)
    if a != b:
        raise UserError(
            f"{other.folder / 'plan.json'}: {key}: found {b!r}, but {one.folder / 'plan.json'} has {a!r}; "
            "runs that are joined must have the same"
        )


def _metrics(runs: Sequence[Run]) -> tuple[MetricInfo, ...]:
    """All metrics, in the order in which the runs name them."""
    known: dict[str, tuple[MetricInfo, Run]] = {}
    for run in runs:
        for info in run.plan.metrics:
            first, owner = known.setdefault(info.name, (info, run))
            if first.higher_is_better != info.higher_is_better:
                files = f"{owner.folder / 'plan.json'} and {run.folder / 'plan.json'}"
                raise UserError(f"{files}: metrics: {info.name}: higher is better in only one of them")
    return tuple(info for info, _ in known.values())


def _one_of_each(parts: Sequence[_Part]) -> tuple[dict[str, TrialRecord], dict[str, Path], list[str]]:
    """By trial id its record and its run folder, and a note on the trials that are in several."""
    records: dict[str, TrialRecord] = {}
    owner: dict[str, _Part] = {}
    again: dict[tuple[str, str], list[str]] = {}  # (counted, not counted) → how the scores of each trial differ
    for part in parts:
        for trial_id, record in part.run.records.items():
            before = records.get(trial_id)
            if before is None or (before.status != "finished" and record.status == "finished"):
                if before is not None:
                    again.setdefault((part.name, owner[trial_id].name), []).append("")
                records[trial_id], owner[trial_id] = record, part
            else:
                said = _scores_differ(before, record) if record.status == "finished" else ""
                again.setdefault((owner[trial_id].name, part.name), []).append(said)
    notes = [_note(counted, other, said) for (counted, other), said in again.items()]
    return records, {trial_id: part.run.folder for trial_id, part in owner.items()}, notes


def _note(counted: str, other: str, said: Sequence[str]) -> str:
    differing = [one for one in said if one]
    start = f"{len(said)} trial{'s are' if len(said) > 1 else ' is'} both in {counted} and in {other}, counted once"
    if not differing:
        return f"{start} (from {counted}); where both finished, their test scores agree."
    return f"{start} (from {counted}); the test scores of {len(differing)} differ: {differing[0]}."


def _scores_differ(one: TrialRecord, other: TrialRecord) -> str:
    """The first test score in which two records of one trial differ, as a phrase; empty where they agree."""
    a, b = one.metrics.get("test", {}), other.metrics.get("test", {})
    for name in {**a, **b}:
        x, y = a.get(name), b.get(name)
        if x is None or y is None or abs(x - y) > AGREES * max(abs(x), abs(y)):
            return f"{one.trial_id}: {name} is {_or_absent(x)} and {_or_absent(y)}"
    return ""


def _or_absent(value: float | None) -> str:
    return "absent" if value is None else f"{value:.6g}"


@dataclass
class _Named:
    """A planned trial of one part, under its names in the joined run."""

    trial: PlannedTrial
    part: str
    old_label: tuple[str, str, str]  # label, grouping and setting in its own plan
    label_known: bool  # taken from the spec of a record; otherwise from the plan
    setting_known: bool


def _trials(parts: Sequence[_Part], records: Mapping[str, TrialRecord]) -> tuple[PlannedTrial, ...]:
    """All planned trials, each once, under names that are consistent over all runs."""
    specs = {trial_id: record.spec for trial_id, record in records.items()}
    labels, settings = naming.labels(specs), naming.settings(specs)
    found: dict[str, _Named] = {}
    for part in parts:
        for named in _renamed(part, labels, settings):
            known = found.setdefault(named.trial.trial_id, named)
            if known is not named:
                found[named.trial.trial_id] = _merged(known, named)
    _separate_unknown(list(found.values()))
    return tuple(named.trial for named in found.values())


def _renamed(part: _Part, labels: Mapping[str, str], settings: Mapping[str, str]) -> list[_Named]:
    """The part's trials under new names; without a record, those of the trials that had the same old names."""
    trials = part.run.plan.trials
    label_of = {(t.label, t.grouping): labels[t.trial_id] for t in trials if t.trial_id in labels}
    setting_of = {t.setting: settings[t.trial_id] for t in trials if t.trial_id in settings}
    found = []
    for trial in trials:
        label = labels.get(trial.trial_id, label_of.get((trial.label, trial.grouping)))
        setting = settings.get(trial.trial_id, setting_of.get(trial.setting))
        names = {
            "label": trial.label if label is None else label,
            "setting": trial.setting if setting is None else setting,
        }
        old = (trial.label, trial.grouping, trial.setting)
        renamed = trial.model_copy(update=names)
        found.append(_Named(renamed, part.name, old, label is not None, setting is not None))
    return found


def _merged(one: _Named, other: _Named) -> _Named:
    """A trial that is in two plans; the learning rates tried before are those of both."""
    best = other if (other.label_known, other.setting_known) > (one.label_known, one.setting_known) else one
    tried = tuple(dict.fromkeys((*one.trial.tried_learning_rates, *other.trial.tried_learning_rates)))
    return replace(best, trial=best.trial.model_copy(update={"tried_learning_rates": tried}))


def _separate_unknown(found: Sequence[_Named]) -> None:
    """Add the run's name to a setting that would otherwise mix trials that may not be comparable.

    Trials may differ where no record says how they were made, and where a trial has the same names as one of another
    run but another id. The run's part of that setting then becomes a separate setting.
    """
    settings: dict[str, set[tuple[str, str]]] = {}
    rows: dict[tuple[str, str, str], set[tuple[str, ...]]] = {}
    for one in found:
        settings.setdefault(one.trial.setting, set()).add((one.part, one.old_label[2]))
        rows.setdefault(_row(one.trial), set()).add((one.part, *one.old_label))
    taken: dict[tuple[object, ...], str] = {}
    repeated: set[tuple[str, str]] = set()
    for one in found:
        place = (*_row(one.trial), one.trial.seed, one.trial.learning_rate)
        known = one.setting_known and one.label_known
        if known and taken.setdefault(place, one.part) != one.part:
            repeated.add((one.part, one.trial.setting))
    for one in found:
        unclear = (not one.setting_known and len(settings[one.trial.setting]) > 1) or (
            not one.label_known and len(rows[_row(one.trial)]) > 1
        )
        if unclear or (one.part, one.trial.setting) in repeated:
            setting = f"{one.trial.setting} run={one.part}".lstrip()
            one.trial = one.trial.model_copy(update={"setting": setting})


def _row(trial: PlannedTrial) -> tuple[str, str, str]:
    return trial.label, trial.grouping, trial.setting
