"""Runs trials in parallel processes with Ray Tune; does not use adapters or tasks.

Whether a trial has finished depends on its record, never on Ray's state: the same command continues a killed sweep.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.profiles import LOCAL, Profile
from harness.core.errors import UserError
from harness.core.record import PlannedTrial
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.sweep.cluster import connect, environment
from harness.sweep.events import Display, Events
from harness.sweep.ray_library import ray, tune
from harness.sweep.scheduler import KeepStartingWorkers
from harness.tracking.grid import Grid, MlflowTracker
from harness.trial.trial import Progress, run_trial


@dataclass(frozen=True)
class Sweep:
    """Trials to run, and where.

    Attributes:
        trials: the trials without a finished record.
        experiment: name of the experiment.
        run: the run folder, which must be accessible to all workers.
        resources: of each trial.
        grid: where trials are logged.
        profile: the Ray cluster; default: one of its own on this machine.
        files: files and folders that the trials read.
    """

    trials: Sequence[tuple[TrialSpec, PlannedTrial]]
    experiment: str
    run: Path
    resources: Resources
    grid: Grid
    profile: Profile = LOCAL
    files: Sequence[str] = ()


def sweep(wanted: Sweep, display: Display) -> None:
    """Run trials in parallel, within the available resources; returns when all have a record.

    Args:
        wanted: the trials.
        display: receives the events.

    Raises:
        UserError: a trial requires more CPUs or GPUs than there are, or a node cannot run the trials.
        KeyboardInterrupt: Ctrl-C was pressed.
        SweepEndedError: one of Ray's own processes was killed.
    """
    specs = [spec for spec, _ in wanted.trials]
    with connect(wanted.profile, specs, wanted.run.resolve(), wanted.files, display):
        available = ray.cluster_resources()
        request = per_trial(wanted.resources, available)
        display.opened(wanted.run, at_once(wanted, request, available))
        events = Events(wanted.run, wanted.experiment, display)
        _tuner(wanted, request, events).fit()
        if events.ended < len(wanted.trials):  # Tune handles Ctrl-C itself: it stops all trials and returns
            raise KeyboardInterrupt


def per_trial(resources: Resources, available: Mapping[str, float]) -> dict[str, float]:
    """The resources that Ray reserves for one trial: ``{"cpu": …, "gpu": …}``.

    Raises:
        UserError: the cluster has fewer; Ray would wait for them forever.
    """
    gpus = available.get("GPU", 0.0)
    wanted = min(1.0, gpus) if resources.gpus_per_worker == "auto" else resources.gpus_per_worker
    for key, asked, there in (
        ("cpus_per_worker", resources.cpus_per_worker, available.get("CPU", 0.0)),
        ("gpus_per_worker", wanted, gpus),
    ):
        if asked > there:
            raise UserError(f"resources.{key}: found {asked:g}, but this machine or Ray cluster has {there:g}")
    return {"cpu": resources.cpus_per_worker, "gpu": wanted}


def at_once(wanted: Sweep, request: Mapping[str, float], available: Mapping[str, float]) -> int:
    """How many trials run at once.

    Args:
        wanted: the trials and ``max_concurrent_trials``.
        request: of one trial, from ``per_trial``.
        available: of the cluster.
    """
    fit = [int(available.get(key.upper(), 0.0) / share + 1e-9) for key, share in request.items() if share > 0]
    return min(*fit, len(wanted.trials), wanted.resources.max_concurrent_trials or len(wanted.trials))


def _tuner(wanted: Sweep, request: dict[str, float], events: Events) -> Any:
    packed = [{"spec": spec.model_dump_json(), "planned": planned.model_dump_json()} for spec, planned in wanted.trials]
    trainable = tune.with_parameters(
        _run_one,
        experiment=wanted.experiment,
        run=str(wanted.run.resolve()),
        resources=wanted.resources.model_dump_json(),
        grid=wanted.grid,
        variables=environment(wanted.profile),
    )
    return tune.Tuner(
        tune.with_resources(trainable, request),
        param_space={"trial": tune.grid_search(packed)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=wanted.resources.max_concurrent_trials,
            reuse_actors=True,  # the next trial starts in a process that has already loaded torch and Java
            scheduler=KeepStartingWorkers(),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str((wanted.run / "ray").resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=wanted.resources.max_failures),
            callbacks=[events],
        ),
    )


def _run_one(
    config: dict[str, Any], experiment: str, run: str, resources: str, grid: Grid, variables: Mapping[str, str]
) -> None:
    """Run one trial in a Ray worker."""
    os.environ.update(variables)
    spec = TrialSpec.model_validate_json(config["trial"]["spec"])
    planned = PlannedTrial.model_validate_json(config["trial"]["planned"])

    def report(progress: Progress) -> None:
        tune.report(vars(progress))

    tracker = MlflowTracker(grid, spec, planned, Path(run) / "trials" / planned.trial_id)
    run_trial(spec, experiment, Path(run), Resources.model_validate_json(resources), tracker, report)
    tune.report({"fraction": 1.0, "phase": "done"})
