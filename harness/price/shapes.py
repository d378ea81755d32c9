"""The distinct shapes of a plan: trials that differ in seed and learning rate alone cost the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.core.record import Plan, PlannedTrial
from harness.core.registry import identity
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources

_NO_COST: dict[str, Any] = {
    "seed": True,
    "relative_to": True,
    "adapter": {"label", "grouping_name", "learning_rate", "tried_learning_rates", "init_from"},
    "optimizer": {"learning_rate"},
}


class PlannedRun(Protocol):
    """What a forecast needs to know of a run: ``harness.sweep.run.Prepared`` has it."""

    @property
    def experiment(self) -> Experiment:
        """For the resources of its trials."""

    @property
    def specs(self) -> list[TrialSpec]:
        """Of all trials."""

    @property
    def plan(self) -> Plan:
        """The same, as they are named."""

    @property
    def folder(self) -> Path:
        """The run folder."""


@dataclass(frozen=True)
class Shape:
    """Trials of one method with its options and grouping, on one backbone, budget and batch.

    Attributes:
        name: ``LoRA r=4 specific``.
        kind: method, grouping and setting: shapes of a kind differ in options of the method alone.
        setting: what else the plan varies.
        spec: of the first of its trials.
        trial_ids: of all.
    """

    name: str
    kind: tuple[str, str, str]
    setting: str
    spec: TrialSpec
    trial_ids: tuple[str, ...]


def shapes_of(specs: Sequence[TrialSpec], trials: Sequence[PlannedTrial]) -> list[Shape]:
    """The shapes of a plan, in its order.

    Args:
        specs: of all trials.
        trials: the same, as they are named.
    """
    rows: dict[tuple[str, str, str], list[int]] = {}
    for number, trial in enumerate(trials):
        rows.setdefault((trial.label, trial.grouping, trial.setting), []).append(number)
    found = []
    for (label, grouping, setting), own in rows.items():
        kind = (trials[own[0]].method, grouping, setting)
        ids = tuple(trials[number].trial_id for number in own)
        found.append(Shape(f"{label} {grouping}".rstrip(), kind, setting, specs[own[0]], ids))
    return found


def fingerprint(spec: TrialSpec, resources: Resources, *more: object) -> str:
    """SHA-256 of all that the cost of a trial depends on, and of ``more``: a device, versions."""
    given = resources.model_dump(mode="json", include={"workers", "cpus_per_worker", "zero_stage", "offload"})
    later = resources.model_dump(include={"gradient_checkpointing", "attn_implementation"})
    given |= {key: value for key, value in later.items() if value}
    content = [identity(spec.model_dump(mode="json", exclude=_NO_COST)), given, *more]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
