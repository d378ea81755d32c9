"""Spreads trials over processes with Ray Tune: the only place that imports ray. Knows nothing of adapters or tasks.

What is finished is decided by our records, never by Ray's state: a killed sweep is run again with the same command.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from harness.core.errors import UserError
from harness.core.record import PlannedTrial, TrialRecord, read_record, record_path, write_record
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.tracking.grid import Grid, MlflowTracker
from harness.trial.trial import Progress, run_trial

# Ray reads these when it is imported. Loopback only; no usage statistics; quiet; and no memory monitor, whose kills
# raise an error that Tune does not handle and that ends the whole sweep (the kernel's kill is just a dead worker).
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path in an experiment means the same in a worker
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "60",  # Tune's own snapshots are never read
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
for _key, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_key, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402


class Display(Protocol):
    """What the terminal is told while the sweep runs."""

    def started(self, trial_id: str) -> None:
        """The trial has a process."""

    def progressed(self, trial_id: str, progress: dict[str, Any]) -> None:
        """Fields of ``harness.trial.trial.Progress``."""

    def ended(self, record: TrialRecord) -> None:
        """The trial has a record."""


@dataclass(frozen=True)
class Sweep:
    """Trials to run, and where.

    Attributes:
        trials: those without a finished record.
        experiment: its name.
        run: the run folder, which every worker must see.
        resources: what each trial gets.
        grid: where trials log.
    """

    trials: Sequence[tuple[TrialSpec, PlannedTrial]]
    experiment: str
    run: Path
    resources: Resources
    grid: Grid


def sweep(wanted: Sweep, display: Display) -> None:
    """Run the trials, as many at a time as the resources allow; returns when each has a record or on Ctrl-C.

    Args:
        wanted: the trials.
        display: told of progress.

    Raises:
        UserError: a trial asks for more processors or GPUs than there are.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        _tuner(wanted, per_trial(wanted.resources, ray.cluster_resources()), display).fit()
    finally:
        if started:
            ray.shutdown()


def per_trial(resources: Resources, available: Mapping[str, float]) -> dict[str, float]:
    """What Ray reserves for one trial: ``{"cpu": …, "gpu": …}``.

    Raises:
        UserError: the cluster has not that much; Ray would wait for it for ever.
    """
    gpus = available.get("GPU", 0.0)
    wanted = min(1.0, gpus) if resources.gpus_per_trial == "auto" else resources.gpus_per_trial
    for key, asked, there in (
        ("cpus_per_trial", resources.cpus_per_trial, available.get("CPU", 0.0)),
        ("gpus_per_trial", wanted, gpus),
    ):
        if asked > there:
            raise UserError(f"resources.{key}: asks for {asked:g}, this machine or Ray cluster has {there:g}")
    return {"cpu": resources.cpus_per_trial, "gpu": wanted}


def _tuner(wanted: Sweep, request: dict[str, float], display: Display) -> Any:
    packed = [{"spec": spec.model_dump_json(), "planned": planned.model_dump_json()} for spec, planned in wanted.trials]
    trainable = tune.with_parameters(
        _run_one,
        experiment=wanted.experiment,
        run=str(wanted.run.resolve()),
        resources=wanted.resources.model_dump_json(),
        grid=wanted.grid,
    )
    return tune.Tuner(
        tune.with_resources(trainable, request),
        param_space={"trial": tune.grid_search(packed)},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=wanted.resources.max_concurrent_trials,
            reuse_actors=True,  # the next trial starts in a process that has torch and Java running already
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str((wanted.run / "ray").resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=wanted.resources.max_failures),
            callbacks=[_Events(wanted.run, wanted.experiment, display)],
        ),
    )


def _run_one(config: dict[str, Any], experiment: str, run: str, resources: str, grid: Grid) -> None:
    """One trial in a Ray worker."""
    spec = TrialSpec.model_validate_json(config["trial"]["spec"])
    planned = PlannedTrial.model_validate_json(config["trial"]["planned"])

    def report(progress: Progress) -> None:
        tune.report(vars(progress))

    tracker = MlflowTracker(grid, spec, planned, Path(run) / "trials" / planned.trial_id)
    run_trial(spec, experiment, Path(run), Resources.model_validate_json(resources), tracker, report)
    tune.report({"fraction": 1.0, "phase": "done"})


class _Events(tune.Callback):  # type: ignore[misc]
    """Passes Tune's events to the display, and writes a record for a trial whose process died."""

    def __init__(self, run: Path, experiment: str, display: Display) -> None:
        self.run, self.experiment, self.display = run, experiment, display

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks into a snapshot; a live terminal cannot be, and nobody reads it."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.display.started(_id(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.display.progressed(_id(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.display.ended(read_record(record_path(self.run, _id(trial))))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        path = record_path(self.run, _id(trial))
        if not path.exists():
            write_record(self.run, _died(trial, self.experiment))
        self.display.ended(read_record(path))


def _id(trial: Any) -> str:
    return PlannedTrial.model_validate_json(trial.config["trial"]["planned"]).trial_id


def _died(trial: Any, experiment: str) -> TrialRecord:
    """The record of a trial that could not write its own: its process was killed or crashed."""
    spec = TrialSpec.model_validate_json(trial.config["trial"]["spec"])
    began = trial.run_metadata.start_time or time.time()
    lines = [
        line
        for line in ((trial.get_pickled_error() and str(trial.get_pickled_error())) or "").splitlines()
        if line.strip()
    ]
    return TrialRecord(
        trial_id=spec.trial_id,
        experiment=experiment,
        status="failed",
        reason=f"the worker process died: {lines[0].strip() if lines else 'no reason given by Ray'}"[:500],
        spec=spec.model_dump(mode="json"),
        seed=spec.seed,
        wall_time_s=time.time() - began,
        started_at=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
    )
