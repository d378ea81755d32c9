"""Runs an experiment: makes the plan, checks inputs, runs the trials that are missing, writes the report.

``run_experiment`` is called by ``harness run``, by scripts and in notebooks.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from clusters.profiles import Profile, load_profile
from harness.core.errors import SweepEndedError, UserError
from harness.core.files import DiskFullError, write_atomically
from harness.core.lease import Lease
from harness.core.record import Plan, PlannedTrial, Run, read_run, record_path
from harness.core.samples import PREVIEWS
from harness.core.search import ADAPTIVE
from harness.core.storage import Copy, StorageError, is_url
from harness.core.summaries import read_summaries
from harness.core.terminal import Terminal
from harness.experiment.load import Experiment
from harness.experiment.plan import Earlier, TrialSpec, describe, expand
from harness.sweep.changed_data import changes, state_of_data
from harness.sweep.choice import Choice, Retry, archive
from harness.sweep.folders import run_folder, stored_run
from harness.sweep.halving import HalvedRows
from harness.sweep.input_files import keep_files, see_files
from harness.sweep.lock import exclusive
from harness.sweep.settled import read_settled, settle
from harness.sweep.stopping import Stopping, stoppable
from harness.sweep.stored import PATIENCE_S, Stored
from results.loaded import Results

if TYPE_CHECKING:
    from harness.tracking.grid import Grid
    from results.report import ReportPaths


_LATER = "the trials run without it, and what it lacks is delivered at the end"
_LAST_PATIENCE_S = 60.0  # how long a lost connection is tried again when only the report is to be pushed


@dataclass(frozen=True)
class Prepared:
    """An experiment with its plan and run folder; nothing is written yet."""

    experiment: Experiment
    specs: list[TrialSpec]
    plan: Plan
    folder: Path
    mlflow_uri: str  # may contain a password: never stored or shown
    storage: Copy | None = None  # of the run folder, if it is at a URL: ``folder`` is its copy

    def states(self) -> dict[str, str]:
        """By trial id the status of its record, or "to run".

        Raises:
            UserError: a record cannot be read.
        """
        found, ids = read_summaries(self.folder), [trial.trial_id for trial in self.plan.trials]
        if broken := next((found.broken[trial_id] for trial_id in ids if trial_id in found.broken), None):
            raise UserError(f"{broken}; without it, the trial is run again")
        return {trial_id: found.known[trial_id].status if trial_id in found.known else "to run" for trial_id in ids}

    def finished(self) -> set[str]:
        """The ids of trials with a finished record."""
        return {trial_id for trial_id, status in self.states().items() if status == "finished"}

    @property
    def place(self) -> str:
        """The run folder, or its URL."""
        return self.storage.there.url if self.storage else str(self.folder)

    def push(self) -> None:
        """Push what has changed, if the run folder is at a URL.

        Raises:
            StorageError: the storage cannot be written to.
        """
        if self.storage:
            self.storage.push()

    def pull_previews(self) -> None:
        """Fetch what the report shows of inputs, if the run folder is at a URL; without a connection, it shows less."""
        if self.storage:
            with suppress(StorageError):
                self.storage.pull(PREVIEWS)

    def unfinished(self) -> list[tuple[TrialSpec, PlannedTrial]]:
        """The trials without a finished record, except those of learning rates that halving has pruned."""
        finished, halved = self.finished(), self.halved()
        pairs = zip(self.specs, self.plan.trials, strict=True)
        return [(s, t) for s, t in pairs if t.trial_id not in finished and not halved.is_out(t.trial_id)]

    def narrowed(self, selected: Collection[str]) -> Prepared:
        """Of these trials alone, for showing them."""
        plan = self.plan.model_copy(update={"trials": tuple(t for t in self.plan.trials if t.trial_id in selected)})
        pairs = zip(self.specs, self.plan.trials, strict=True)
        return replace(self, specs=[spec for spec, trial in pairs if trial.trial_id in selected], plan=plan)

    def halved(self) -> HalvedRows:
        """The rows whose learning rates are halved."""
        return HalvedRows(self.folder, self.plan.trials)


def prepare(experiment: Experiment, output: str | Path = "runs", fresh: bool = False) -> Prepared:
    """Plan an experiment.

    Args:
        experiment: the experiment.
        output: parent of the run folders; a folder or a URL.
        fresh: use a new run folder instead of the latest one.

    Raises:
        UserError: two entries describe the same trial, a metric is unknown, a method's stages do not fit the budget, or
            a storage cannot be used.
    """
    from harness.sweep.declared import check_stages, metrics_of
    from harness.tracking.store import default_uri, located, redacted

    storage = stored_run(str(output), experiment.name, fresh) if is_url(output) else None
    folder = storage.here if storage else run_folder(Path(output), experiment.name, fresh)
    specs = expand(experiment, _earlier(experiment, folder))
    check_stages(specs, str(experiment.top / "adapters"))
    given = experiment.tracking.mlflow_uri
    try:
        uri = located(given, experiment.folder) if given else default_uri(folder.parent)
    except ValueError as error:
        raise UserError(f"{experiment.top / 'tracking' / 'mlflow_uri'}: {error}") from None
    plan = describe(experiment, specs, metrics_of(specs), redacted(uri))
    return Prepared(experiment, specs, plan, folder, uri, storage)


def _earlier(experiment: Experiment, folder: Path) -> Earlier:
    """What the run folder knows, if a sampler of the experiment learns from it."""
    choices = (choice for own in experiment.adapters for choice in own)
    learns = any(choice.search is not None and choice.search.sampler in ADAPTIVE for choice in choices)
    if not learns or not (folder / "plan.json").exists():
        return Earlier()
    run = read_run(folder)
    return Earlier(
        {trial.trial_id: trial for trial in run.plan.trials},
        {
            trial_id: record.metrics["validation"]["perplexity"] if record.status == "finished" else None
            for trial_id, record in run.records.items()
        },
    )


def _extended(prepared: Prepared) -> Prepared | None:
    """The experiment with the trials that follow from the results so far; None if there are no more."""
    experiment, folder = prepared.experiment, prepared.folder
    specs = expand(experiment, _earlier(experiment, folder))
    if len(specs) == len(prepared.specs):
        return None
    plan = describe(experiment, specs, prepared.plan.metrics, prepared.plan.mlflow_uri or "")
    return replace(prepared, specs=specs, plan=plan)


def run_experiment(
    experiment: Experiment | str | Path,
    output: str | Path | None = None,
    *,
    fresh: bool = False,
    profile: str | Path = "local",
    measure: bool = True,
    only: str = "",
    retry: Retry = "auto",
    console: Console | None = None,
) -> Results:
    """Run the trials of an experiment and write the report; a second call runs only the trials that are missing.

    Ctrl-C, SIGTERM and ``harness stop`` end it early: running trials save where they are, within
    ``resources.grace_s``; finished trials are kept and reported, ``Results.complete`` is False, and
    ``Results.stopped`` says what it was.

    Args:
        experiment: built in Python, or the path of a YAML file.
        output: parent of the run folders, a folder or a URL such as ``s3://bucket/runs``; the results are in
            ``output/NAME``. Default: the profile's ``storage``, else ``runs``.
        fresh: start again in a new run folder, and keep the old one.
        profile: where to run: the name of a profile such as ``ray``, or the path of its YAML file.
        measure: after the trials, measure speed and memory of the methods, unless the experiment's
            ``resources.profile`` is false; ``profile_run`` does it later.
        only: run only these trials: ``rank=8 and seed<3``, by the columns of ``trials.parquet``; empty: all.
        retry: failed trials to try again: ``auto`` (not what failed twice in the same way), ``failed`` (all), ``none``.
        console: for progress; default: standard output, or the cell's output in a notebook. ``Console(quiet=True)``
            shows nothing.

    Returns:
        The trials, leaderboard and report of the run folder, as ``load_results`` gives them.

    Raises:
        UserError: before any compute: the experiment, its data, a backbone or the tracking server cannot be used.
        DiskFullError: the report could not be written; the records are there.
    """
    console = console or Terminal()
    cluster = load_profile(profile)
    experiment = experiment if isinstance(experiment, Experiment) else Experiment.from_yaml(experiment)
    _check_shared(experiment, output := output or cluster.storage or "runs")
    prepared, choice = prepare(experiment, output, fresh), Choice(only, retry)
    folder, asked = prepared.folder, prepared.narrowed(choice.selected(prepared.plan))
    if known := _known(prepared, measure):
        _say(console, *choice.nothing_to_compute(prepared.plan, prepared.states()))
        return known
    from harness.sweep import preflight
    from harness.tracking.grid import check_grid, open_grid

    left = bool(prepared.unfinished())
    _check(asked, cluster, left)
    with _run_folder_for(prepared, fresh, console) as lease, stoppable(folder) as stopping:
        check_grid(prepared.mlflow_uri, experiment.name, folder)
        seen = see_files(prepared.specs, experiment.plugins, folder)
        preflight.check_inputs(asked.specs, folder, console, experiment, cluster.cluster_address())
        _write_plan(prepared)
        keep_files(folder, seen, changed := _tell(prepared, choice, console))
        prepared.push()
        grid = open_grid(prepared.mlflow_uri, experiment.name, folder)
        if grid.problem:
            console.print(f"{grid.problem}; {_LATER}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        whole = False  # whether all that was asked for has been done
        try:
            _run_unfinished(prepared, choice, cluster, grid, lease, console, stopping)
            while (extended := _extended(prepared)) is not None:
                prepared = extended
                _write_plan(prepared)
                _run_unfinished(prepared, choice, cluster, grid, lease, console, stopping)
            _keep_forecast(prepared, cluster, console, left)
            whole = not (measure and experiment.resources.profile) or _profile(prepared, console)
        except KeyboardInterrupt:
            stopping.reason = stopping.reason or "interrupt"
            console.print(f"{stopping.text}: {stopping.advice}", highlight=False, markup=False, soft_wrap=True)
        except SweepEndedError as error:
            console.print(f"{error}; {stopping.advice}", style="red", highlight=False, markup=False, soft_wrap=True)
        report, problem = _conclude(prepared, grid, console)
        if whole and not (problem or changed):  # what changed is told again by the next run
            _settle(prepared, measure, report.board.run, grid)
    ended: dict[str, Any] = {"stopped": stopping.reason, "selected": choice.selected(prepared.plan)}
    return Results((folder,), report.html, problem, grid.trials_link, known_board=report.board, **ended)


def _known(prepared: Prepared, measure: bool) -> Results | None:
    """The results of a run that has nothing left to do."""
    folder = prepared.folder
    found = None if prepared.storage else read_settled(folder, _said(prepared, measure))
    if found is None:
        return None
    return Results((folder,), folder / "report" / "index.html", None, found.tracking_link, settled=True)


def _settle(prepared: Prepared, measure: bool, run: Run, grid: Grid) -> None:
    """Write down that nothing is left to do, unless something is to be told again by the next run."""
    if not (run.broken or run.foreign or prepared.storage or prepared.unfinished()):
        settle(prepared.folder, _said(prepared, measure), grid.trials_link)


def _tell(prepared: Prepared, choice: Choice, console: Console) -> list[str]:
    """Say what the run folder has and what is left to run; returns what was said of data that changed."""
    found = read_run(prepared.folder)
    changed = changes(prepared.specs, found.records, prepared.folder)
    _say(console, *found.foreign_lines, *changed)
    _say(console, *choice.lines(prepared.unfinished(), prepared.plan, prepared.folder))
    return changed


def _said(prepared: Prepared, measure: bool) -> tuple[str, ...]:
    """What a run was asked for, without what cannot change a finished one."""
    from harness.tracking.store import redacted, sqlite_path

    uri, experiment = prepared.mlflow_uri, prepared.experiment
    database = sqlite_path(uri)
    there = database is None or database.exists()
    profiled = measure and experiment.resources.profile
    data = state_of_data(prepared.specs, prepared.folder.parent)
    return prepared.plan.model_dump_json(), experiment.text, redacted(uri), f"{there} {profiled}", *data


def _conclude(prepared: Prepared, grid: Grid, console: Console) -> tuple[ReportPaths, str | None]:
    """Write the report, and bring MLflow and the storage up to date; returns why MLflow is not.

    Raises:
        DiskFullError: the report could not be written; everything else has been done.
    """
    from harness.tracking.grid import close_grid
    from results.report import write_report

    prepared.pull_previews()
    report, full = None, None
    try:
        report = write_report([prepared.folder])
    except DiskFullError as error:
        full = error
    files, board = (list(report.all), report.board) if report else ([], None)
    problem = close_grid(grid, not prepared.unfinished(), files, board).problem
    _push_all(prepared, console)
    if report is None:
        raise full or RuntimeError("no report")
    if problem:
        problem += f"; `harness sync {prepared.place}` delivers what is missing, and so does the next run"
    return report, problem


def _check(prepared: Prepared, cluster: Profile, left: bool) -> None:
    """Check what can fail before the run folder is made.

    Args:
        prepared: the run.
        cluster: where it runs.
        left: whether there are trials to run.

    Raises:
        UserError: something fails.
    """
    from harness.sweep import preflight
    from harness.sweep.fits import check_weights, device_bytes

    experiment = prepared.experiment
    preflight.check_shell()
    preflight.check_ray(cluster.cluster_address())
    if left:
        preflight.check_resources(experiment.resources, experiment.top / "resources", cluster.cluster_address())
    preflight.check_models(prepared.specs, experiment.resources)
    check_weights(prepared.specs, experiment.resources, device_bytes(cluster), experiment.top)
    preflight.check_fingerprints(prepared.specs, str(experiment.top / "backbone"))


def _check_shared(experiment: Experiment, output: str | Path) -> None:
    """Check that nothing in an experiment needs a run folder on a shared file system.

    Raises:
        UserError: something does.
    """
    if is_url(output) and experiment.resources.workers > 1:
        raise UserError(
            f"{experiment.top / 'resources' / 'workers'}: found {experiment.resources.workers}, with a run folder at a "
            "URL; allowed: 1, or a run folder on a file system that all nodes share, because the workers of a trial "
            "write its checkpoints together"
        )
    if is_url(output) and experiment.halving is not None:
        raise UserError(
            f"{experiment.top / 'search' / 'halving'}: found with a run folder at a URL; allowed: one on a "
            "file system that all nodes share, because trials wait there for one another"
        )


def _push_all(prepared: Prepared, console: Console) -> None:
    """Push what the driver has made; without a connection, the next run does it."""
    if prepared.storage is None:
        return
    from harness.tracking.journal import JOURNAL

    prepared.storage.there.patience_s = _LAST_PATIENCE_S
    try:
        prepared.push()
        prepared.storage.remove_gone(JOURNAL)
        line = f"stored:  {prepared.storage.there.url}"
    except StorageError as error:
        line = f"{error}; the results are in {prepared.folder}; run the same experiment again to store them"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _write_plan(prepared: Prepared) -> None:
    from harness.tracking.store import without_password

    text = without_password(prepared.experiment.text, prepared.mlflow_uri)
    write_atomically(prepared.folder / "experiment.yaml", text)
    write_atomically(prepared.folder / "plan.json", prepared.plan.model_dump_json(indent=1) + "\n")


@contextmanager
def _run_folder_for(prepared: Prepared, fresh: bool, console: Console) -> Iterator[Lease]:
    """Create and lock the run folder; a fresh one is removed again if the experiment is refused before its plan.

    Otherwise the next run would continue in an empty folder instead of the latest one.

    Raises:
        UserError: it is not writable, or another sweep is running in it.
    """
    from harness.sweep import preflight

    folder, new = prepared.folder, not prepared.folder.exists()
    preflight.check_folder(folder)

    def note(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with exclusive(folder, note) as lease:
        try:
            if prepared.storage:
                prepared.storage.pull()  # what another holder may have made since the first pull
                prepared.storage.there.patience_s = PATIENCE_S
            yield lease
        except BaseException:
            if fresh and new and not (folder / "plan.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _run_unfinished(
    prepared: Prepared,
    choice: Choice,
    profile: Profile,
    grid: Grid,
    lease: Lease,
    console: Console,
    stopping: Stopping,
) -> None:
    from harness.sweep.live import LiveTable
    from harness.sweep.preflight import files_read
    from harness.sweep.spending import Metered
    from harness.sweep.tune import Sweep, sweep
    from harness.tracking.store import sqlite_path

    prepared.halved().read()  # a kill may have come between a decision and its records
    todo = choice.todo(prepared.unfinished(), prepared.plan, prepared.folder)
    if not todo:
        _say(console, *choice.nothing_to_compute(prepared.plan, prepared.states()))
        return
    if (limit_h := prepared.experiment.gpu_hours) is not None:
        _check_budget(prepared, limit_h, stopping, console)
    for spec, _ in todo:
        archive(record_path(prepared.folder, spec.trial_id), prepared.storage)
    halved = prepared.halved()
    halved.read()
    prepared.push()
    files = files_read([spec for spec, _ in todo], prepared.folder) if profile.cluster_address() else []
    if database := sqlite_path(grid.uri):
        files.append(str(database.resolve()))
    stored = Stored(prepared.storage) if prepared.storage else None
    resources = prepared.experiment.resources
    trials = Sweep(
        todo, prepared.experiment.name, prepared.folder, resources, grid, profile, files, stored, halved, lease
    )
    finished = len(prepared.finished())
    with LiveTable(console, [planned for _, planned in todo], finished) as display:
        if limit_h is None:
            sweep(trials, display)
            return
        metered = Metered(display, prepared.folder, limit_h, resources)
        with metered.watching():
            sweep(trials, metered)


def _check_budget(prepared: Prepared, limit_h: float, stopping: Stopping, console: Console) -> None:
    """End the run if ``budget.gpu_hours`` was reached before; a trial counts as at least what one of its workers has.

    Raises:
        KeyboardInterrupt: it was.
    """
    from harness.sweep.spending import HOUR_S, devices_of, spent_s

    gpus = prepared.experiment.resources.gpus_per_worker
    spent_h = (
        spent_s(prepared.folder, devices_of(prepared.experiment.resources, 0 if gpus == "auto" else gpus)) / HOUR_S
    )
    if spent_h >= limit_h:
        stopping.reason = "budget"
        console.print(f"{spent_h:.3g} of {limit_h:g} device-hours were spent before", highlight=False)
        raise KeyboardInterrupt


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _keep_forecast(prepared: Prepared, profile: Profile, console: Console, ran: bool) -> None:
    """Keep what the trials were predicted to cost, if there were any, without a look at what they cost."""
    from harness.sweep.forecast import keep_forecast

    if not ran:
        return
    try:
        keep_forecast(prepared, profile)
    except (UserError, OSError, ValueError) as error:  # the trials are what matters, so it is shown and no more
        console.print(f"no forecast: {error}", highlight=False, markup=False, soft_wrap=True)


def _profile(prepared: Prepared, console: Console) -> bool:
    """Measure what the profile lacks; returns whether it is whole. An error is shown: the trials are what matters."""
    from harness.sweep.profile import measure_run

    if not prepared.finished():
        return False
    try:
        measure_run(prepared.folder, prepared.experiment.resources, console)
    except KeyboardInterrupt:
        again = f"harness profile {prepared.folder}"
        console.print(f"profile interrupted: `{again}` continues it", highlight=False, markup=False, soft_wrap=True)
    except (UserError, OSError, ValueError) as error:
        console.print(f"no profile: {error}", highlight=False, markup=False, soft_wrap=True)
    else:
        return True
    return False
