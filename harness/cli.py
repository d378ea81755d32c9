"""Trains and judges adapters by experiment files. Exit codes: 0 all trials finished, 1 not all did, 2 wrong input."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout
from rich.console import Console

from harness import cli_results
from harness.errors import UserError
from harness.experiment import Experiment
from harness.files import write_atomically
from harness.plan import TrialSpec, describe, expand
from harness.record import Parameters, Plan, TrialRecord, read_record, read_run, record_path

EXPERIMENTS, RESULTS, PARTS = "Experiments", "Results", "Tasks, adapters, metrics and backbones"
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
backbones_app = typer.Typer(no_args_is_help=True, help="The built-in backbones.")
app.add_typer(cli_results.leaderboard_app, name="leaderboard", rich_help_panel=RESULTS)
app.add_typer(backbones_app, name="backbones", rich_help_panel=PARTS)
console = Console()
errors = Console(stderr=True)

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="The experiment.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run folders.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew, in a new run folder beside the old one.")]


def main() -> None:
    """Entry point: runs the command and turns a UserError into exit code 2."""
    try:
        app()
    except UserError as error:
        errors.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@dataclass(frozen=True)
class _Planned:
    """An experiment made ready to run in its run folder."""

    experiment: Experiment
    specs: list[TrialSpec]
    plan: Plan
    folder: Path
    mlflow_uri: str  # may hold a password: never stored or shown

    def records(self) -> dict[str, TrialRecord]:
        """The records that are there, of this experiment's trials, by trial id."""
        paths = {spec.trial_id: record_path(self.folder, spec.trial_id) for spec in self.specs}
        return {trial_id: read_record(path) for trial_id, path in paths.items() if path.exists()}

    def finished(self) -> set[str]:
        """Trial ids with a finished record."""
        return {trial_id for trial_id, record in self.records().items() if record.status == "finished"}


def _prepare(path: Path, output: Path, fresh: bool) -> _Planned:
    from harness.preflight import check_stages, metrics_of
    from harness.tracking import default_uri, redacted

    experiment = Experiment.from_yaml(path)
    specs = expand(experiment)
    check_stages(specs, str(experiment.top / "adapters"))
    uri = experiment.tracking.mlflow_uri or default_uri(output)
    plan = describe(experiment, specs, metrics_of(specs), redacted(uri))
    return _Planned(experiment, specs, plan, _run_folder(output, experiment.name, fresh), uri)


def _run_folder(output: Path, name: str, fresh: bool) -> Path:
    """The latest of ``name``, ``name@2``, ``name@3`` …, or with ``fresh`` the next one; a name itself has no ``@``."""
    number = 1

    def folder(n: int) -> Path:
        return output / (name if n == 1 else f"{name}@{n}")

    while folder(number + 1).exists():
        number += 1
    return folder(number + 1) if fresh and folder(number).exists() else folder(number)


@app.command(rich_help_panel=EXPERIMENTS)
def run(file: ExperimentFile, output: Output = Path("runs"), fresh: Fresh = False) -> None:
    """Run an experiment's trials and write the report. Run again, it does only what is missing."""
    from harness import preflight
    from harness.tracking import check_uri, close_grid, open_grid
    from results.report import write_report

    began = time.monotonic()
    planned = _prepare(file, output, fresh)
    preflight.check_shell()
    preflight.check_folder(planned.folder)
    with _only_one(planned.folder):
        check_uri(planned.mlflow_uri)
        preflight.check_models(planned.specs)
        preflight.check_data(planned.specs, planned.folder, console)
        write_atomically(planned.folder / "plan.json", planned.plan.model_dump_json(indent=1) + "\n")
        write_atomically(planned.folder / "experiment.yaml", file.read_text(encoding="utf-8"))
        grid = open_grid(planned.mlflow_uri, planned.experiment.name, planned.folder)
        try:
            _run_missing(planned, grid)
        except KeyboardInterrupt:
            errors.print("interrupted: what is finished is kept; run the same command again for the rest")
        report = write_report([planned.folder])
        complete = len(planned.finished()) == len(planned.specs)
        if lost := close_grid(grid, complete, list(report.all)):
            errors.print(f"[yellow]MLflow was not told of the end:[/] {_escape(lost)}", soft_wrap=True)
    _last_screen(planned, report.html, time.monotonic() - began)
    if not complete:
        raise typer.Exit(1)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep two sweeps out of one run folder.

    Raises:
        UserError: another one is in it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another harness is running in this folder; wait for it, or use --fresh") from None
    try:
        yield
    finally:
        lock.release()


def _run_missing(planned: _Planned, grid: object) -> None:
    from harness.sweep import sweep
    from harness.terminal import LiveTable
    from harness.tracking import Grid

    assert isinstance(grid, Grid)  # noqa: S101
    finished = planned.finished()
    todo = [
        (spec, trial)
        for spec, trial in zip(planned.specs, planned.plan.trials, strict=True)
        if trial.trial_id not in finished
    ]
    if not todo:
        console.print(f"all {len(planned.specs)} trials were finished before; nothing to compute")
        return
    for _, trial in todo:
        _set_aside(record_path(planned.folder, trial.trial_id))
    specs, trials = [spec for spec, _ in todo], [trial for _, trial in todo]
    with LiveTable(console, trials, len(finished)) as display:
        sweep(specs, trials, planned.experiment.name, planned.folder, planned.experiment.resources, grid, display)


def _set_aside(record: Path) -> None:
    """Keep the record of a trial that failed and is tried again."""
    if record.exists():
        number = len(list(record.parent.glob("attempt-*.json"))) + 1
        record.rename(record.with_name(f"attempt-{number}.json"))


def _last_screen(planned: _Planned, report: Path, seconds: float) -> None:
    from harness.terminal import leaderboard_table, trial_name
    from results.format import duration
    from results.table import build_leaderboard
    from results.words import few_seeds

    board = build_leaderboard(read_run(planned.folder))
    console.print(leaderboard_table(board))
    for sentence in few_seeds(board):
        console.print(sentence, style="dim", highlight=False)
    for item in (*board.failed, *board.missing):
        console.print(
            f"[red]{item.status}[/] {trial_name(item.trial)}: {_escape(item.reason or 'run again to finish it')}"
        )
    done = len(planned.finished())
    console.print(
        f"{done} of {len(planned.specs)} trials finished; this call took {duration(seconds)}", highlight=False
    )
    console.print(f"report:  {report}", highlight=False, soft_wrap=True)
    console.print(f"MLflow:  {_mlflow_command(planned.plan.mlflow_uri or '')}", highlight=False, soft_wrap=True)


def _mlflow_command(uri: str) -> str:
    if uri.startswith(("http://", "https://")):
        return uri
    program = Path(sys.executable).with_name("mlflow")
    return shlex.join([str(program), "ui", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", "5000"])


@app.command("plan", rich_help_panel=EXPERIMENTS)
def plan_command(file: ExperimentFile, output: Output = Path("runs"), fresh: Fresh = False) -> None:
    """Show the trials and the parameters each trains; nothing is trained, downloaded or written."""
    from harness.build import count_parameters
    from harness.hub import HubUnreachableError
    from harness.terminal import plan_table

    planned = _prepare(file, output, fresh)
    parameters: dict[str, Parameters | None] = {}
    known: dict[str, Parameters | None] = {}
    notes: dict[str, None] = {}
    for spec in planned.specs:
        key = spec.model_dump_json(include={"task", "backbone", "adapter"})
        if key not in known:
            try:
                known[key] = count_parameters(spec)
            except HubUnreachableError as error:
                known[key] = None
                notes[str(error)] = None
        parameters[spec.trial_id] = known[key]
    records = planned.records()
    states = {
        spec.trial_id: records[spec.trial_id].status if spec.trial_id in records else "to run" for spec in planned.specs
    }
    console.print(plan_table(planned.plan, parameters, states))
    for note in notes:
        console.print(f"[yellow]parameters unknown:[/] {_escape(note)}", soft_wrap=True)
    console.print(f"run folder: {planned.folder}", highlight=False, soft_wrap=True)


app.command(rich_help_panel=EXPERIMENTS)(cli_results.status)
for command in (cli_results.report, cli_results.compare, cli_results.attention):
    app.command(rich_help_panel=RESULTS)(command)


@app.command(rich_help_panel=PARTS)
def tasks() -> None:
    """List the tasks and their options."""
    from harness.listing import list_plugins
    from tasks.registry import TASKS

    list_plugins(TASKS, console, ("contexts", "metrics"))


@app.command(rich_help_panel=PARTS)
def adapters(
    method: Annotated[str | None, typer.Argument(help="Show this one in detail: lora, or lora+bitfit.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Count trainable parameters in this language model: built in, folder or hub id.")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Their number counts where every context has a group.")] = "image,text",
    options: Annotated[list[str] | None, typer.Option("--set", help="Count with OPTION=VALUE: rank=64.")] = None,
) -> None:
    """List the adapter methods and their options, or the trainable parameters they add to a language model."""
    from adapters.registry import ADAPTERS
    from harness import listing

    if options and model is None:
        raise UserError(
            f"--set {options[0]}: it changes what is counted, which needs --model, such as builtin/tiny-llama"
        )
    counted = listing.parse_contexts(contexts), listing.parse_options(options or ())
    count_for = None if model is None else listing.CountFor(model, *counted)
    if method is not None:
        listing.show_adapter(method, console, count_for)
    elif count_for is not None:
        listing.count_adapters(console, count_for)
    else:
        listing.list_plugins(ADAPTERS, console)


@app.command(rich_help_panel=PARTS)
def prepare(
    target: Annotated[str, typer.Argument(metavar="TASK", help="A task's name, or an experiment file.")],
    options: Annotated[list[str] | None, typer.Option("--set", help="The task's OPTION=VALUE: root=data/coco.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read everything, and report all problems at once.")] = False,
) -> None:
    """Bring a task's data to this machine; with --check, read all of it."""
    from harness.prepare import prepare as prepare_task

    prepare_task(target, options or (), check, console)


@app.command(rich_help_panel=PARTS)
def check(
    target: Annotated[str, typer.Argument(metavar="PACKAGE", help="An installed package, or a Python file.")],
) -> None:
    """Try a package's tasks, modalities and metrics on what our own must pass. Exit code 1: something failed."""
    from harness.contract import check_plugins

    if not check_plugins(target, console):
        raise typer.Exit(1)


@app.command(rich_help_panel=PARTS)
def score(
    metric: Annotated[str, typer.Argument(help="A metric's name, such as captions.")],
    references: Annotated[Path, typer.Option(help="A caption file in COCO's format.")],
    predictions: Annotated[Path, typer.Option(help="A results file in COCO's format.")],
    output: Annotated[Path | None, typer.Option("--json", help="Write the scores there, those by example too.")] = None,
) -> None:
    """Score predictions against references, both in COCO's own file formats; nothing is trained."""
    from harness.scoring import score as score_files

    score_files(metric, references, predictions, output, console)


@backbones_app.command("list")
def backbones_list() -> None:
    """List the built-in backbones."""
    from harness.hub import builtin_names

    for name in builtin_names():
        console.print(name, highlight=False)


@backbones_app.command("build")
def backbones_build(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the weights.")],
    seed: Annotated[int, typer.Option(help="Of the text, the pictures and the initialisation.")] = 0,
) -> None:
    """Train the built-in backbones from nothing (docs/backbones.md has the recipe and its log)."""
    from harness.pretrain import build

    build(output, seed=seed)
