"""Which trials of a sweep train in one process: those that differ at most in their adapters and learning rates.

Whether they take their training steps together there is decided in that process (harness/trial/pack.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.experiment.shared import shared_dump
from harness.model.components import method_of, tower_in_step
from harness.sweep.members import Planned

MOST = 8  # trials of a pack, where their number is chosen here


def packs_of(
    trials: Sequence[Planned],
    resources: Resources,
    gpus: float,
    at_once: int,
    rungs: Callable[[str], Collection[int]] = lambda _: (),
    alone: Collection[str] = (),
) -> list[list[Planned]]:
    """Group trials into packs; a trial that trains alone is a pack of its own. Packs are in the order of their first.

    ``auto`` makes packs where a worker has a GPU, as many as can run at once. A CPU takes as long for the rows of two
    trials at once as for those of one after the other, so there it makes none.

    Args:
        trials: to be run.
        resources: of a trial, with ``pack``.
        gpus: of a worker.
        at_once: packs that can run at once.
        rungs: trial id → the epochs after which it pauses.
        alone: ids of trials that are not packed: they have failed before, or may have made others fail.
    """
    groups: dict[Any, list[Planned]] = {}
    for number, (spec, planned) in enumerate(trials):
        packable = makes_packs(resources, gpus) and planned.trial_id not in alone and can_pack(spec)
        key = (_alike(spec), tuple(rungs(planned.trial_id))) if packable else number
        groups.setdefault(key, []).append((spec, planned))
    packs = []
    for group in groups.values():
        most = _most(resources, len(group), sum(map(len, groups.values())), at_once)
        packs += [group[start : start + most] for start in range(0, len(group), most)]
    places = {planned.trial_id: number for number, (_, planned) in enumerate(trials)}
    return sorted(packs, key=lambda pack: places[pack[0][1].trial_id])


def makes_packs(resources: Resources, gpus: float) -> bool:
    """Whether a sweep may have packs at all; ``gpus`` are those of a worker."""
    plain = resources.workers == 1 and resources.zero_stage == 0
    plain = plain and not (resources.gradient_checkpointing or resources.torch_compile)
    return plain and (isinstance(resources.pack, int) or (resources.pack == "auto" and gpus > 0))


def _most(resources: Resources, group: int, trials: int, at_once: int) -> int:
    if isinstance(resources.pack, int):
        return resources.pack
    return max(1, min(MOST, group, -(-trials // max(1, at_once))))


def can_pack(spec: TrialSpec) -> bool:
    """Whether a trial leaves its language model as it is, so that others can use it, and trains in one stage."""
    return spec.optimizer.gradient_accumulation_steps == 1 and _only_changes_layers(_Adapter(spec))


class _Adapter:
    """The adapter of a spec, which many specs share."""

    def __init__(self, spec: TrialSpec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return hash((id(self.spec.adapter), self.spec.budget.epochs))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Adapter) and (
            self.spec.adapter is other.spec.adapter and self.spec.budget.epochs == other.spec.budget.epochs
        )


@cache
def _only_changes_layers(adapter: _Adapter) -> bool:
    spec = adapter.spec
    method = method_of(spec.adapter, spec.relative_to)
    return method.only_changes_layers and len(method.stages(spec.budget.epochs)) == 1


def _alike(spec: TrialSpec) -> str:
    """What the trials of a pack have in common."""
    dump = shared_dump(spec)
    optimizer = {name: value for name, value in dump["optimizer"].items() if name != "learning_rate"}
    own = {"optimizer": optimizer, "tower in the step": tower_in_step(spec)}
    return repr({name: value for name, value in dump.items() if name != "adapter"} | own)
