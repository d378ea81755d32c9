"""``harness launch``, ``logs`` and ``stop``: runs that go on without this terminal, on this machine or another."""

from __future__ import annotations

import subprocess
import time
from codecs import getincrementaldecoder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.results import RunFolder, is_running, newest_run
from harness.core.errors import UserError, did_you_mean
from harness.core.storage import push_copy
from harness.core.terminal import Terminal

if TYPE_CHECKING:
    from clusters.launch.job import Job
    from clusters.profiles import Profile

console = Terminal()
FOLLOW_S = 0.5  # how often a file is looked at
ASK_S = 5.0  # how often the state of the job is asked for, at Slurm's controller for example


def _print(text: str, end: str = "\n") -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True, end=end)


def launch(
    file: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="The experiment file.")],
    profile: Annotated[
        str, typer.Option("--profile", "-p", metavar="NAME", help="Where to run: a profile's name, or its YAML file.")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Folder of the run folders. [default: the profile's storage, or runs]"),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new run folder next to the old one.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure speed and memory of the methods after the trials.")
    ] = True,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="Print what would be submitted, and write and submit nothing.")
    ] = False,
) -> None:
    """Submit an experiment as a job that needs this terminal no more: to Slurm, Kubernetes, Ray, a cloud."""
    from clusters.launch.job import check_no_secret, write_files, write_launch
    from clusters.launch.launchers import LAUNCHERS
    from clusters.profiles import load_profile

    chosen = load_profile(profile)
    job = _job(file, chosen, output, fresh, () if measure else ("--no-measure",))
    launcher = LAUNCHERS[chosen.kind]
    files = launcher.render(job)
    check_no_secret({**files, job.profile_file.name: chosen.text()}, chosen.secrets)
    if render_only:
        for name, text in files.items():
            if len(files) > 1:
                _print(f"# {name}")
            typer.echo(text, nl=False)
        return
    launcher.check(job)
    run = job.folder.parent
    _check_idle(run)
    write_files(job, files)
    launched = launcher.submit(job)
    write_launch(job.folder, launched)
    _print(f"submitted: {chosen.kind} job {launched.job_id}; run folder: {run}")
    for command in ("status", "logs --follow", "stop"):
        name, *options = command.split()
        _print(f"  harness {' '.join([name, str(run), *options])}")


def _job(file: Path, profile: Profile, output: str | None, fresh: bool, options: tuple[str, ...]) -> Job:
    """The job of an experiment, which is checked as ``harness plan`` does."""
    from clusters.launch.job import FOLDER, Job
    from clusters.profiles import OWN_MACHINES
    from harness.core.paths import locate
    from harness.core.source import read_yaml
    from harness.core.storage import is_url, normalised
    from harness.experiment.load import Experiment
    from harness.sweep.run import prepare

    own_machines = profile.kind in OWN_MACHINES
    content, top = read_yaml(file)
    plugins = content.get("plugins") if isinstance(content, dict) else None
    for number, plugin in enumerate(plugins if own_machines and isinstance(plugins, list) else ()):
        if Path(str(plugin)).expanduser().is_absolute():
            raise UserError(
                f"{top / 'plugins' / number}: found {plugin!r}; for kind {profile.kind} they are brought from the "
                "folder of the experiment, so their paths must be relative to it"
            )
    experiment = Experiment.from_yaml(file)
    given = output or profile.storage or "runs"
    given = normalised(given) if is_url(given) else given
    # Machines of their own have other file systems than this one.
    elsewhere = "://" in given or own_machines
    here = Path("runs") if elsewhere else Path(given)
    run = prepare(experiment, here, fresh).folder
    return Job(
        name=experiment.name,
        experiment=file.absolute(),
        plugins=tuple(locate(plugin, experiment.folder) for plugin in plugins or ()),
        output=given if elsewhere else str(here.absolute()),
        folder=(run / FOLDER).absolute(),
        profile=profile,
        # On another file system it is not known here which run folder is the next one.
        options=(*options, "--fresh") if fresh and elsewhere else options,
    )


def _check_idle(run: Path) -> None:
    """Check that nothing runs or waits in a run folder.

    Raises:
        UserError: something does.
    """
    from clusters.launch.launchers import goes_on, state_of

    launched, state = state_of(run)
    if is_running(run) or goes_on(state):
        what = f"{launched.kind} job {launched.job_id} ({state})" if launched and goes_on(state) else "another sweep"
        raise UserError(f"{run}: in use by {what}; `harness stop {run}`, or launch with --fresh")


def logs(
    folder: RunFolder = None,
    trial: Annotated[str | None, typer.Argument(help="The id of a trial, or its beginning.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing until the run has ended.")] = False,
) -> None:
    """Print the output of a launched run, or the log of a trial, with its earlier attempts."""
    from clusters.launch.job import is_own, read_launch
    from clusters.launch.launchers import LAUNCHERS
    from harness.sweep.choice import attempts

    folder = folder or newest_run()
    if trial is not None:
        log = _trial_log(folder, trial)
        for number, record in enumerate(attempts(folder, log.parent.name), 1):
            _print(f"attempt {number}, from {record.started_at}: {record.status}: {record.reason or 'no reason given'}")
        _print_file(log, folder, follow)
        return
    launched = read_launch(folder)
    if launched is None:
        raise UserError(f"{folder}: not started by harness launch, so its output is where it was started; name a trial")
    if not is_own(launched):
        raise UserError(
            f"{folder}: launched by somebody else, or with another HARNESS_CACHE, so nothing that its record names is "
            "called or read; name a trial"
        )
    command = LAUNCHERS[launched.kind].log_command(launched, follow)
    if command is None:
        _print_file(Path(launched.log), folder, follow)
        return
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _trial_log(folder: Path, trial: str) -> Path:
    from harness.trial.log import LOG

    found = sorted(path.parent.name for path in folder.glob(f"trials/*/{LOG}"))
    matching = [name for name in found if name.startswith(trial)]
    if len(matching) != 1:
        what = f"{len(matching)} trials" if matching else "no trial with a log"
        raise UserError(f"{folder}: {trial!r} is {what}; {did_you_mean(trial, found)}")
    return folder / "trials" / matching[0] / LOG


def _print_file(path: Path, folder: Path, follow: bool) -> None:
    """Print a file; with ``follow``, what is appended too, while something runs or waits in the run folder."""
    from clusters.launch.launchers import goes_on, state_of

    def over() -> bool:
        return not goes_on(state_of(folder)[1]) and not is_running(folder)

    if not path.exists() and not follow:
        raise UserError(f"{path}: not written yet; --follow waits for it")
    at, ended, asked = 0, False, -ASK_S
    decoder = getincrementaldecoder("utf-8")("replace")  # a character may be written in two parts
    while True:
        if time.monotonic() - asked >= ASK_S:
            ended, asked = not follow or over(), time.monotonic()
        if path.exists():
            with path.open("rb") as file:
                file.seek(at)
                content = file.read()
            at += len(content)
            _print(decoder.decode(content), end="")
        if ended:
            return
        time.sleep(FOLLOW_S)


def stop(folder: RunFolder = None) -> None:
    """End a run in order, wherever it runs: finished trials are kept, and the same command goes on."""
    from clusters.launch.job import is_own
    from clusters.launch.launchers import LAUNCHERS, goes_on, state_of
    from harness.sweep.stopping import request_stop

    folder = folder or newest_run()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    launched, state = state_of(folder)
    if not is_running(folder) and (launched is None or (state is not None and not goes_on(state))):
        raise UserError(f"{folder}: nothing runs here")
    request_stop(folder)
    push_copy(folder)
    done = LAUNCHERS[launched.kind].stop(launched) if launched and is_own(launched) else None
    _print(done or f"{folder}: the driver is asked to end, which it sees in some seconds")
