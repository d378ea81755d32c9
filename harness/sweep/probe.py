"""Probes the shapes of a plan on this machine, for ``harness plan --probe``: what was probed before is not repeated."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clusters.profiles import Profile
from harness.core import probed as probes
from harness.core.errors import UserError
from harness.experiment.sections import Resources
from harness.price.shapes import PlannedRun, Shape, fingerprint, shapes_of
from harness.sweep import preflight
from harness.sweep.profile import ProfileProgress
from harness.sweep.profile_worker import Worker
from harness.trial.measure import this_device
from harness.trial.profile import Job


def probe_plan(prepared: PlannedRun, profile: Profile, console: Console) -> None:
    """Measure every shape of a plan that was not measured on this device, and keep it in the cache.

    Args:
        prepared: the plan.
        profile: where it runs, which must be this machine.
        console: for progress, and for what could not be measured.

    Raises:
        UserError: the profile is of other machines, or the models or the data cannot be used.
    """
    if profile.kind != "local":
        raise UserError(
            f"--probe: measures on this machine, and profile {profile.name} (kind {profile.kind}) runs on others; "
            "allowed: a profile of kind local, on a machine like those"
        )
    resources, device = prepared.experiment.resources, this_device()
    shapes = shapes_of(prepared.specs, prepared.plan.trials)
    todo = [shape for shape in shapes if probes.known(fingerprint(shape.spec, resources), device) is None]
    if not todo:
        return
    specs = [shape.spec for shape in todo]
    preflight.check_models(specs)
    with tempfile.TemporaryDirectory() as folder:
        preflight.check_data(specs, Path(folder), console)
        with Worker(Path(folder) / "probe.log") as worker, ProfileProgress(console, len(todo)) as progress:
            for group in _by_data(todo):
                _probe(group, resources, worker, progress, console)


def _by_data(shapes: Sequence[Shape]) -> list[list[Shape]]:
    """The shapes whose data is the same, so that it is read once."""
    groups: dict[str, list[Shape]] = {}
    for shape in shapes:
        key = shape.spec.model_dump_json(include={"task", "backbone", "budget", "eval", "seed"})
        groups.setdefault(key, []).append(shape)
    return list(groups.values())


def _probe(
    shapes: Sequence[Shape], resources: Resources, worker: Worker, progress: ProfileProgress, console: Console
) -> None:
    specs = tuple(shape.spec for shape in shapes)
    answered: set[int] = set()
    encoding = resources.model_copy(update={"feature_cache_gib": 0.0})  # its time is measured
    for answer in worker.ask(Job(specs=specs, resources=encoding, probe=tuple(range(len(specs))))):
        shape = shapes[answer.index]
        if answer.begun:
            progress.now(shape.name)
            continue
        progress.told(answer)
        answered.add(answer.index)
        if answer.probed:
            probes.keep(fingerprint(shape.spec, resources), answer.probed)
        elif answer.reason:
            console.print(f"not probed: {shape.name}: {answer.reason}", highlight=False, markup=False, soft_wrap=True)
    for number in set(range(len(shapes))) - answered:
        console.print(f"not probed: {shapes[number].name}: its process ended", highlight=False, markup=False)
