"""What a run's profile consists of: the distinct methods of its plan, and the reference of each setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.core import naming
from harness.core.record import PlannedTrial, Run, TrialRecord
from harness.core.registry import identity
from harness.experiment.init_sources import read_section
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.components import method_of

NO_EFFECT = ("budget.examples", "budget.epochs", "budget.patience")  # on a training step


@dataclass(frozen=True)
class Wanted:
    """One entry of the profile."""

    name: str
    setting: str
    trial_ids: tuple[str, ...]
    spec: TrialSpec | None  # as it is measured; None: see ``reason``
    record: TrialRecord | None  # of one of its finished trials
    reason: str | None = None  # why it is not measured

    @property
    def measurable(self) -> TrialSpec:
        """The spec of an entry that has one."""
        assert self.spec is not None  # noqa: S101 - the caller looked at ``reason``
        return self.spec


@dataclass(frozen=True)
class Group:
    """The entries of one setting; all are measured on the same batches."""

    setting: str
    entries: tuple[Wanted, ...]  # in the order of the plan
    reference: Wanted


def groups_of(run: Run) -> list[Group]:
    """The settings of a run, without what has no effect on a training step, and their entries.

    Seeds, learning rates and the amount of data do not multiply entries, but for methods with several stages: there the
    number of epochs decides how long each is. A method of which no trial has finished is an entry with the reason.

    Raises:
        UserError: a record was written by an incompatible version of the harness.
    """
    finished = {trial_id: record for trial_id, record in run.records.items() if record.status == "finished"}
    specs = {trial_id: record.spec for trial_id, record in finished.items()}
    names = naming.settings(specs, without=NO_EFFECT)
    base = {trial.setting: names[trial.trial_id] for trial in run.plan.trials if trial.trial_id in names}
    found: dict[str, list[PlannedTrial]] = {}
    for trial in run.plan.trials:
        if trial.setting in base:
            found.setdefault(base[trial.setting], []).append(trial)
    return [_group(setting, trials, run, finished) for setting, trials in found.items()]


def _group(setting: str, trials: Sequence[PlannedTrial], run: Run, finished: Mapping[str, TrialRecord]) -> Group:
    rows: dict[tuple[str, ...], list[PlannedTrial]] = {}
    for trial in trials:
        rows.setdefault((trial.label, trial.grouping, _epochs(trial, run, finished)), []).append(trial)
    whole = [trial for trial in trials if trial.trial_id in finished]
    # The data that all entries are measured on: of a trial of the reference, if one has finished.
    base = next((trial for trial in whole if trial.method == run.plan.reference_method), whole[0])
    common = _spec(run, finished[base.trial_id])
    entries = [_wanted(setting, row, run, finished, common) for row in rows.values()]
    reference = next(one for one in entries if base.trial_id in one.trial_ids)
    return Group(setting, tuple(entries), reference)


def _epochs(trial: PlannedTrial, run: Run, finished: Mapping[str, TrialRecord]) -> str:
    """The epochs of a method with several stages; empty for others, and for trials that have not finished."""
    if trial.trial_id not in finished:
        return ""
    spec = _spec(run, finished[trial.trial_id])
    return f"epochs={spec.budget.epochs}" if has_stages(spec) else ""


def has_stages(spec: TrialSpec) -> bool:
    """Whether the method of a trial has several training stages."""
    return len(method_of(spec.adapter, spec.relative_to).stages(spec.budget.epochs)) > 1


def _wanted(
    setting: str, row: Sequence[PlannedTrial], run: Run, finished: Mapping[str, TrialRecord], common: TrialSpec
) -> Wanted:
    """The entry of one row: its adapter on the data and the seed that the whole setting is measured on."""
    name = f"{row[0].label} {row[0].grouping}".rstrip()
    ids = tuple(trial.trial_id for trial in row)
    records = [finished[trial_id] for trial_id in ids if trial_id in finished]
    if not records:
        return Wanted(name, setting, ids, None, None, _why(row, run))
    # The smallest learning rate: it has no effect on speed, and is the least likely to diverge.
    specs = [(_spec(run, record), record) for record in records]
    spec, record = min(specs, key=lambda pair: pair[0].optimizer.learning_rate or 0.0)
    budget = common.budget.model_copy(update={"epochs": spec.budget.epochs})
    optimizer = common.optimizer.model_copy(update={"learning_rate": spec.optimizer.learning_rate})
    measured = common.model_copy(update={"adapter": spec.adapter, "budget": budget, "optimizer": optimizer})
    return Wanted(name, setting, ids, measured, record)


def _why(row: Sequence[PlannedTrial], run: Run) -> str:
    statuses = [run.records[trial.trial_id].status for trial in row if trial.trial_id in run.records]
    if "out_of_memory" in statuses:
        return "out of memory in training"
    return "no trial of it has finished" if statuses else "not trained yet"


def _spec(run: Run, record: TrialRecord) -> TrialSpec:
    spec: TrialSpec = read_section(TrialSpec, run.trial_folder(record.trial_id), record.spec)
    return spec


def key_of(spec: TrialSpec, reference: TrialSpec, resources: Resources) -> str:
    """SHA-256 of all that the measurement of an entry depends on, with its reference, without the device."""
    measured = [_content(spec), _content(reference), resources.cpus_per_worker, resources.zero_stage]
    if resources.offload != "none":
        measured.append(resources.offload)
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()


def _content(spec: TrialSpec) -> Any:
    adapter = {"label", "grouping_name", "learning_rate", "tried_learning_rates"}
    content = spec.model_dump(
        mode="json",
        exclude={
            "seed": True,
            "relative_to": True,
            "eval": True,
            "adapter": {**dict.fromkeys(adapter, True), "init_from": {"__all__": {"trial"}}},
            "optimizer": {"learning_rate"},
            "budget": {"examples", "patience"}
            if len(method_of(spec.adapter, spec.relative_to).stages(spec.budget.epochs)) > 1
            else {"examples", "epochs", "patience"},
        },
    )
    size, examples = spec.optimizer.per_device_train_batch_size, spec.budget.examples
    return [identity(content), size if examples == "all" else min(size, examples)]
