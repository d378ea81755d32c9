"""Runs trials in parallel processes with Ray Tune; does not use adapters or tasks.

Whether a trial has finished depends on its record, never on Ray's state: the same command continues a killed sweep.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.profiles import LOCAL, Profile
from harness.core.lease import Lease
from harness.core.record import PlannedTrial, TrialRecord, record_path
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.kept import OF_WORKER
from harness.sweep.choice import attempts
from harness.sweep.cluster import connect, environment
from harness.sweep.events import Display, Events
from harness.sweep.grace import Grace, PreemptedError, Request, StopRequest, save_at_sigterm
from harness.sweep.halving import HalvedRows
from harness.sweep.hangs import Hangs, stack_if_stuck
from harness.sweep.members import Planned, as_one
from harness.sweep.pack_run import attempt_pack
from harness.sweep.packs import makes_packs, packs_of
from harness.sweep.placement import Amounts, at_once, per_worker
from harness.sweep.ranks import nodes_alive, request, run_ranks
from harness.sweep.ray_library import tune, wrap_function
from harness.sweep.rungs import Rungs, run_to_end
from harness.sweep.scheduler import HalveRows
from harness.sweep.stored import Stored, TrialPlace
from harness.tracking.grid import Grid
from harness.tracking.tracker import MlflowTracker
from harness.trial.attempt import run_trial
from harness.trial.log import LOG
from harness.trial.trial import Progress


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
        stored: the run folder's storage, if it is at a URL: ``run`` is the driver's copy.
        halved: the rows whose learning rates are halved, with all trials of the plan; None: there are none.
        lease: of the run folder, which the sweep looks at; None: nothing else can be in it.
        work: what a worker does for a trial of one process; a benchmark of the sweep itself trains nothing.
    """

    trials: Sequence[tuple[TrialSpec, PlannedTrial]]
    experiment: str
    run: Path
    resources: Resources
    grid: Grid
    profile: Profile = LOCAL
    files: Sequence[str] = ()
    stored: Stored | None = None
    halved: HalvedRows | None = None
    lease: Lease | None = None
    work: Callable[..., TrialRecord] = run_trial


class InTurn(tune.search.BasicVariantGenerator):  # type: ignore[misc]
    """Gives each of Tune's trials what it is to do, when Tune makes it.

    A grid would have to be whole in the parameter space, which Tune copies for every trial and pickles into snapshots:
    with 10,000 trials a tenth of a second for each.

    Args:
        packs: what each trial is given.
        at_once: how many may run; None: as many as there is room for.
    """

    def __init__(self, packs: Iterator[Mapping[str, Any]], at_once: int | None) -> None:
        super().__init__(max_concurrent=at_once or 0)
        self._packs = packs

    def next_trial(self) -> Any:
        """The next trial; None: there is none, or not now."""
        trial = super().next_trial()
        if trial is not None:
            trial.config["trial"] = next(self._packs)
        return trial

    def save_to_dir(self, dirpath: str, session_str: str) -> None:
        """Write nothing into Tune's snapshots, which are never read: the records say what is left to do."""

    def __getstate__(self) -> dict[str, Any]:
        """Return no state: Tune pickles its settings into a file that is never read either."""
        return {}


def sweep(wanted: Sweep, display: Display) -> None:
    """Run trials in parallel, within the available resources; returns when all have a record.

    Args:
        wanted: the trials.
        display: receives the events.

    Raises:
        UserError: the workers of a trial need more CPUs or GPUs than there are, or a node cannot run the trials.
        KeyboardInterrupt: Ctrl-C was pressed.
        SweepEndedError: one of Ray's own processes was killed.
    """
    specs = [spec for spec, _ in wanted.trials]
    url = wanted.stored.copy.there.url if wanted.stored else None
    with connect(wanted.profile, specs, url or wanted.run.resolve(), wanted.files, display):
        nodes = nodes_alive()
        asked = per_worker(wanted.resources, nodes)
        packs = _packs(wanted, asked, nodes)
        display.opened(wanted.run, at_once(wanted.resources, asked, nodes, len(packs)))
        if several := [pack for pack in packs if len(pack) > 1]:
            count = f"{len(several)} process{'es' * (len(several) > 1)}"
            display.noted(f"{sum(map(len, several))} trials train in {count} (resources.pack)")
        workers, stored, lease = wanted.resources.workers, wanted.stored, wanted.lease
        to_stop = Request(wanted.run, stored.copy.there if stored else None)
        grace = Grace(wanted.resources.grace_s, to_stop, display.noted)
        hangs = Hangs(wanted.resources.trial_timeout_s)
        events = Events(wanted.run, wanted.experiment, display, asked, workers, stored, lease, grace, hangs)
        with grace.listening():
            _tuner(wanted, packs, asked, events, grace).fit()
        if events.ended < len(wanted.trials):  # ended by `grace`, or trials have stopped at a request
            raise KeyboardInterrupt


def _packs(wanted: Sweep, asked: Amounts, nodes: Sequence[Amounts]) -> list[list[Planned]]:
    """The trials by the process that they share; a trial that failed before has one of its own."""
    resources, gpus = wanted.resources, asked["GPU"]
    if not makes_packs(resources, gpus) or wanted.stored is not None or wanted.work is not run_trial:
        return [[trial] for trial in wanted.trials]
    failed = [planned.trial_id for _, planned in wanted.trials if attempts(wanted.run, planned.trial_id)]
    slots = at_once(resources, asked, nodes, len(wanted.trials))
    halved = wanted.halved or HalvedRows(wanted.run, ())
    return packs_of(wanted.trials, resources, gpus, slots, halved.rungs, failed)


def _tuner(wanted: Sweep, packs: Sequence[Sequence[Planned]], asked: Amounts, events: Events, grace: Grace) -> Any:
    halved = wanted.halved or HalvedRows(wanted.run, ())
    packed = (as_one(pack, halved.rungs) for pack in packs)
    shared = {
        "experiment": wanted.experiment,
        "run": str(wanted.run.resolve()),
        "resources": wanted.resources.model_dump_json(),
        "grid": wanted.grid,
        "variables": environment(wanted.profile),
    }
    if wanted.resources.workers == 1:
        url = wanted.stored.copy.there.url if wanted.stored else None
        trainable = _saves_at_sigterm(tune.with_parameters(_run_one, url=url, work=wanted.work, **shared))
    else:
        trainable = tune.with_parameters(run_ranks, **shared)
    return tune.Tuner(
        tune.with_resources(trainable, request(wanted.resources, asked)),
        tune_config=tune.TuneConfig(
            num_samples=len(packs),
            search_alg=InTurn(packed, wanted.resources.max_concurrent_trials),
            reuse_actors=True,  # the next trial starts in a process that has already loaded torch and Java
            scheduler=HalveRows(halved, lambda: grace.ending),
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


def _saves_at_sigterm(trainable: Callable[..., Any]) -> Any:
    """Tune's class for a function, whose process listens to SIGTERM: only its main thread can, which runs ``setup``."""

    class Trial(wrap_function(trainable)):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            save_at_sigterm()
            super().setup(config)

    return Trial


def _run_one(
    config: dict[str, Any],
    experiment: str,
    run: str,
    url: str | None,
    resources: str,
    grid: Grid,
    variables: Mapping[str, str],
    work: Callable[..., TrialRecord],
) -> None:
    """Run one trial in a Ray worker."""
    os.environ.update(variables)
    if len(config["trial"]["members"]) > 1:
        _run_pack(config["trial"], experiment, Path(run), Resources.model_validate_json(resources), grid)
        return
    spec = TrialSpec.model_validate_json(config["trial"]["spec"])
    planned = PlannedTrial.model_validate_json(config["trial"]["planned"])
    place, asked = TrialPlace(Path(run), url, planned.trial_id), Resources.model_validate_json(resources)
    stop = StopRequest(place.run, url)

    def attempt(rungs: Rungs) -> bool:
        stopped = False
        if not place.begin():
            tracker, log = MlflowTracker(grid, spec, planned, place.folder), place.folder / LOG
            with stop.listening(), stack_if_stuck(log, asked.trial_timeout_s) as progressed:

                def report(progress: Progress) -> None:
                    progressed()
                    place.progressed()
                    tune.report(vars(progress))

                own = rungs[planned.trial_id]
                record = work(spec, experiment, place.run, asked, tracker, report, own, stop, OF_WORKER)
            stopped = record.status == "cancelled"
        place.end()
        if stopped and stop.preempted:
            raise PreemptedError("the worker process got SIGTERM")
        return stopped

    run_to_end(config["trial"], place.run, attempt)


def _run_pack(pack: Mapping[str, Any], experiment: str, run: Path, resources: Resources, grid: Grid) -> None:
    """Run a pack of trials in a Ray worker."""
    stop = StopRequest(run)

    def attempt(rungs: Rungs) -> bool:
        members = [member for member in pack["members"] if member["trial_id"] in rungs]
        members = [member for member in members if not record_path(run, member["trial_id"]).exists()]
        stopped = bool(members) and attempt_pack(members, rungs, experiment, run, resources, grid, stop)
        if stopped and stop.preempted:
            raise PreemptedError("the worker process got SIGTERM")
        return stopped

    run_to_end(pack, run, attempt)
