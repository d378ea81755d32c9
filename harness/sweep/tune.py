"""Runs trials in parallel processes with Ray Tune. The only module that imports ray; does not use adapters or tasks.

Whether a trial has finished depends on its record, never on Ray's state: the same command continues a killed sweep.
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

from harness.core.errors import SweepEndedError, UserError
from harness.core.origin import shown
from harness.core.record import PlannedTrial, TrialRecord, read_record, record_path, write_record
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.tracking.grid import Grid, MlflowTracker
from harness.trial.trial import LOG, Progress, run_trial

# Ray reads these when it is imported: loopback only, no usage statistics, quiet, and no memory monitor. If the monitor
# kills a worker, Tune does not handle the error and the whole sweep ends; if the kernel does, only that trial fails.
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in an experiment must also work in a worker
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "60",  # Tune's snapshots are never read
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
for _key, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_key, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import FIFOScheduler  # noqa: E402


class Display(Protocol):
    """Receives the events of a sweep while it runs."""

    def opened(self, run: Path, at_once: int) -> None:
        """The sweep starts, in this run folder and with so many trials at once."""

    def started(self, trial_id: str) -> None:
        """A trial was started in a worker process."""

    def progressed(self, trial_id: str, progress: dict[str, Any]) -> None:
        """A trial reported progress: the fields of ``harness.trial.trial.Progress``."""

    def ended(self, record: TrialRecord) -> None:
        """A trial has ended; its record is written."""


@dataclass(frozen=True)
class Sweep:
    """Trials to run, and where.

    Attributes:
        trials: the trials without a finished record.
        experiment: name of the experiment.
        run: the run folder, which must be accessible to all workers.
        resources: of each trial.
        grid: where trials are logged.
    """

    trials: Sequence[tuple[TrialSpec, PlannedTrial]]
    experiment: str
    run: Path
    resources: Resources
    grid: Grid


def sweep(wanted: Sweep, display: Display) -> None:
    """Run trials in parallel, within the available resources; returns when all have a record.

    Args:
        wanted: the trials.
        display: receives the events.

    Raises:
        UserError: a trial requires more CPUs or GPUs than there are.
        KeyboardInterrupt: Ctrl-C was pressed.
        SweepEndedError: one of Ray's own processes was killed.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        available = ray.cluster_resources()
        request = per_trial(wanted.resources, available)
        display.opened(wanted.run, at_once(wanted, request, available))
        events = _Events(wanted.run, wanted.experiment, display)
        _tuner(wanted, request, events).fit()
        if events.ended < len(wanted.trials):  # Tune handles Ctrl-C itself: it stops all trials and returns
            raise KeyboardInterrupt
    finally:
        if started:
            ray.shutdown()


def per_trial(resources: Resources, available: Mapping[str, float]) -> dict[str, float]:
    """The resources that Ray reserves for one trial: ``{"cpu": …, "gpu": …}``.

    Raises:
        UserError: the cluster has fewer; Ray would wait for them forever.
    """
    gpus = available.get("GPU", 0.0)
    wanted = min(1.0, gpus) if resources.gpus_per_trial == "auto" else resources.gpus_per_trial
    for key, asked, there in (
        ("cpus_per_trial", resources.cpus_per_trial, available.get("CPU", 0.0)),
        ("gpus_per_trial", wanted, gpus),
    ):
        if asked > there:
            raise UserError(f"resources.{key}: found {asked:g}, but this machine or Ray cluster has {there:g}")
    return {"cpu": resources.cpus_per_trial, "gpu": wanted}


def at_once(wanted: Sweep, request: Mapping[str, float], available: Mapping[str, float]) -> int:
    """How many trials run at once.

    Args:
        wanted: the trials and ``max_concurrent_trials``.
        request: of one trial, from ``per_trial``.
        available: of the cluster.
    """
    fit = [int(available.get(key.upper(), 0.0) / share + 1e-9) for key, share in request.items() if share > 0]
    return min(*fit, len(wanted.trials), wanted.resources.max_concurrent_trials or len(wanted.trials))


def _tuner(wanted: Sweep, request: dict[str, float], events: _Events) -> Any:
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
            reuse_actors=True,  # the next trial starts in a process that has already loaded torch and Java
            scheduler=_KeepStartingWorkers(),
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


def _run_one(config: dict[str, Any], experiment: str, run: str, resources: str, grid: Grid) -> None:
    """Run one trial in a Ray worker."""
    spec = TrialSpec.model_validate_json(config["trial"]["spec"])
    planned = PlannedTrial.model_validate_json(config["trial"]["planned"])

    def report(progress: Progress) -> None:
        tune.report(vars(progress))

    tracker = MlflowTracker(grid, spec, planned, Path(run) / "trials" / planned.trial_id)
    run_trial(spec, experiment, Path(run), Resources.model_validate_json(resources), tracker, report)
    tune.report({"fraction": 1.0, "phase": "done"})


class _KeepStartingWorkers(FIFOScheduler):  # type: ignore[misc]
    """Starts trials in order, but prefers those for which no worker process is starting.

    Tune requests a worker for each waiting trial, and gives a worker that is free to the trial chosen here, whose own
    request it cancels. A worker that replaces a killed one takes seconds to import its libraries. Were its trial chosen
    meanwhile, which is the first in FIFO order, the worker would be stopped while it starts; with trials shorter than
    its start, this would repeat, and its slot would stay empty to the end of the sweep.
    """

    _watched: Any = None  # the controller whose failures are watched

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Watch the failures of a controller, from its first trial on."""
        controller = getattr(tune_controller.get_trials, "__self__", tune_controller)  # given is a wrapper of it
        if self._watched is controller:
            return
        self._watched, fail = controller, controller._trial_task_failure

        def fail_once(trial: Any, exception: Exception) -> None:
            # A worker that dies while Tune resets it fails its next trial twice: as the actor, after which the trial
            # waits again, and as the task `reset`, which would end it for good whatever `max_failures` is.
            if trial.status == "PENDING" and trial in controller._resetting_trials:
                controller._resetting_trials.discard(trial)
            else:
                fail(trial, exception)

        controller._trial_task_failure = fail_once

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """The first waiting trial without a worker; only if there is none, one whose worker is starting."""
        waiting = [trial for trial in tune_controller.get_trials() if trial.status == "PENDING"]
        # A trial that already has a reused worker would leave the choice to Tune, which might stop one that starts.
        waiting = [trial for trial in waiting if trial not in tune_controller._resetting_trials]
        workers, manager = tune_controller._trial_to_actor, tune_controller._actor_manager
        unserved = (t for t in waiting if t not in workers or not manager.is_actor_started(workers[t]))
        return next(unserved, next(iter(waiting), None))


_NODES_S = 5.0  # how often Ray is asked for its nodes


class _Events(tune.Callback):  # type: ignore[misc]
    """Forwards Tune's events to the display, and writes the record of a trial whose process died.

    Ray's node process dies with its agents (``DashboardAgent``, ``RuntimeEnvAgent``), and Tune then waits forever for a
    node that can run the next trial. So it asks for the nodes, and ends the sweep if none is alive.
    """

    def __init__(self, run: Path, experiment: str, display: Display) -> None:
        self.run, self.experiment, self.display = run, experiment, display
        self.ended = 0  # trials with a record
        self.asked = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Return no state: Tune pickles callbacks into a snapshot that is never read, and displays are unpicklable."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Check that a node is alive.

        Raises:
            SweepEndedError: none is.
        """
        if time.monotonic() - self.asked < _NODES_S:
            return
        self.asked = time.monotonic()
        if not any(node["Alive"] for node in ray.nodes()):
            raise SweepEndedError(
                "Ray has died: one of its processes (raylet, DashboardAgent, RuntimeEnvAgent) was killed"
            )

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.display.started(_id(trial))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        self.display.progressed(_id(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(record_path(self.run, _id(trial)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        path = record_path(self.run, _id(trial))
        if not path.exists():
            write_record(self.run, _died(trial, self.experiment, path.with_name(LOG)))
        self._end(path)

    def _end(self, path: Path) -> None:
        self.ended += 1
        self.display.ended(read_record(path))


def _id(trial: Any) -> str:
    return PlannedTrial.model_validate_json(trial.config["trial"]["planned"]).trial_id


def _died(trial: Any, experiment: str, log: Path) -> TrialRecord:
    """The record of a trial whose process was killed or crashed before it could write one."""
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
        reason=f"the worker process died: {lines[0].strip() if lines else 'Ray gave no reason'}"[:500]
        + f" (log: {shown(log)})",
        spec=spec.model_dump(mode="json"),
        seed=spec.seed,
        wall_time_s=time.time() - began,
        started_at=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
    )
