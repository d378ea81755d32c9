"""A trial of Tune: one trial, or a pack of them, which goes by the id of its first one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.record import PlannedTrial

if TYPE_CHECKING:  # the command line knows of members, and should not load what plans need
    from harness.experiment.plan import TrialSpec

Planned = tuple["TrialSpec", PlannedTrial]


def as_one(pack: Sequence[Planned], rungs: Callable[[str], Collection[int]]) -> dict[str, Any]:
    """What Tune is given of a pack, and its worker gets.

    Args:
        pack: one or more trials.
        rungs: trial id → the epochs after which it pauses.
    """
    members = [
        {
            "trial_id": planned.trial_id,
            "spec": spec.model_dump_json(),
            "planned": planned.model_dump_json(),
            "epochs": spec.budget.epochs,
            "rungs": rungs(planned.trial_id),
        }
        for spec, planned in pack
    ]
    return {**members[0], "members": members}


def members_of(trial: Any) -> list[str]:
    """The ids of the trials that one of Tune is."""
    return [str(member["trial_id"]) for member in trial.config["trial"]["members"]]
