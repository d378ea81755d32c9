"""Train and compare adapters.

Exit codes: 0 success, 1 unfinished trials or failed check, 2 invalid input, 3 ended by harness stop, 4 by
budget.gpu_hours, 130 by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from harness.cli import doctor as cli_doctor
from harness.cli import launch as cli_launch
from harness.cli import profile as cli_profile
from harness.cli import prune as cli_prune
from harness.cli import results as cli_results
from harness.cli import trained as cli_trained
from harness.core.errors import UserError
from harness.core.files import DiskFullError
from harness.core.terminal import Terminal

if TYPE_CHECKING:
    from harness.core.record import Parameters
    from harness.sweep.run import Prepared

EXPERIMENTS, RESULTS, COMPONENTS = "Experiments", "Results", "Tasks, adapters, metrics and backbones"
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=__doc__)
backbones_app = typer.Typer(no_args_is_help=True, help="The built-in backbones.")
app.add_typer(cli_results.leaderboard_app, name="leaderboard", rich_help_panel=RESULTS)
app.add_typer(backbones_app, name="backbones", rich_help_panel=COMPONENTS)
console = Terminal()
errors = Terminal(stderr=True)

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="The experiment file.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="PLACE", help="Folder or URL (s3://…) of the run folders; by default ./runs."
    ),
]
Profile = Annotated[
    str, typer.Option("--profile", "-p", metavar="NAME", help="Where to run: a profile's name, or its YAML file.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over in a new run folder next to the old one.")]


def main() -> None:
    """Entry point: run the command; an error of the input or of a plugin becomes a message and exit code 2, a full disk
    one and exit code 1.
    """
    gc.set_threshold(50_000, 20, 20)  # looking at what imports leave, every 700 objects, is a fifth of a command's time
    try:
        app()
    except (UserError, DiskFullError) as error:
        errors.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except Exception as error:
        from harness.core.origin import blamed
        from harness.experiment.options import REGISTRIES

        if (line := blamed(error, REGISTRIES)) is None:
            raise
        errors.print(f"[bold red]error:[/] {_escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_version(wanted: bool) -> None:
    """Print the version, and the commit where the code is of a checkout: ``harness 0.1.0 (6546a66f1c2d)``."""
    if not wanted:
        return
    from importlib.metadata import version

    from harness.core.revisions import git_revision

    revision = git_revision(Path(__file__).parent)
    typer.echo(" ".join(["harness", version("context-peft-harness"), *([f"({revision})"] if revision else [])]))
    raise typer.Exit


@app.callback(help=__doc__)
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version and commit, and exit."),
    ] = False,
) -> None:
    """Options without a command."""


@app.command(rich_help_panel=EXPERIMENTS)
def run(
    file: ExperimentFile,
    output: Output = None,
    fresh: Fresh = False,
    profile: Profile = "local",
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure speed and memory of the methods after the trials.")
    ] = True,
    only: cli_results.Only = "",
    retry: Annotated[
        Literal["auto", "failed", "none"],
        typer.Option(
            help="Which failed trials to try again: all (failed), none, or those that have not failed twice in the "
            "same way (auto)."
        ),
    ] = "auto",
) -> None:
    """Run the trials of an experiment and write the report. Run it again to continue where it stopped."""
    from harness.cli.leaderboard import print_last_screen
    from harness.sweep.run import run_experiment
    from harness.sweep.stopping import EXIT_CODES

    began = time.monotonic()
    results = run_experiment(
        file, output, fresh=fresh, profile=profile, measure=measure, only=only, retry=retry, console=console
    )
    if results.tracking_problem:
        errors.print(
            f"[yellow]MLflow could not be updated:[/] {_escape(results.tracking_problem)}",
            soft_wrap=True,
        )
    print_last_screen(results, time.monotonic() - began, console)
    if results.stopped:
        raise typer.Exit(EXIT_CODES[results.stopped])
    if not results.complete:
        raise typer.Exit(1)


@app.command("plan", rich_help_panel=EXPERIMENTS)
def plan_command(
    file: ExperimentFile,
    output: Output = None,
    fresh: Fresh = False,
    every_row: Annotated[bool, typer.Option("--all", help="Show every row of a plan that has very many.")] = False,
    profile: Profile = "local",
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure 20 training steps of every method, and some of its evaluation.")
    ] = False,
    only: cli_results.Only = "",
) -> None:
    """Show the trials, their trainable parameters, and what they will cost, without training or downloading anything.

    Where the data is on this machine, check that there are enough examples.
    """
    from clusters.profiles import load_profile
    from harness.cli.forecast import show_forecast
    from harness.cli.plan import SHOWN_ROWS, UNBOUNDED, numbered_settings, plan_table
    from harness.experiment.load import Experiment
    from harness.sweep.choice import Choice
    from harness.sweep.counts import PlannedData, check_counts
    from harness.sweep.forecast import LONGEST_S, forecast_of
    from harness.sweep.preflight import check_resources
    from harness.sweep.run import prepare as prepare_run

    whole = prepare_run(Experiment.from_yaml(file), output or "runs", fresh)
    planned = whole.narrowed(Choice(only).selected(whole.plan))
    parameters, notes = _parameters(planned)
    data = PlannedData()
    unchecked = check_counts(planned.specs, data)
    # In a file a row is one line, however wide.
    wide = console if console.is_terminal else Terminal(file=console.file, width=UNBOUNDED)
    names = numbered_settings(planned.plan) if console.is_terminal else {}
    wide.print(plan_table(planned.plan, parameters, planned.states(), None if every_row else SHOWN_ROWS, names))
    for setting, number in names.items():
        console.print(f"# {number}: {_escape(setting)}", highlight=False, soft_wrap=True)
    if only:
        console.print(f"{len(planned.specs)} of {len(whole.specs)} trials selected", highlight=False)
    for note in notes:
        console.print(f"[yellow]parameters unknown:[/] {_escape(note)}", soft_wrap=True)
    if unknown := [model for model, found in planned.plan.fingerprints.items() if found is None]:
        text = f"{', '.join(unknown)}: not on this machine, so trial ids change once their commit can be resolved"
        console.print(f"[yellow]weights without fingerprint:[/] {_escape(text)}", highlight=False, soft_wrap=True)
    try:
        check_resources(planned.experiment.resources, planned.experiment.top / "resources")
    except UserError as error:
        console.print(f"[yellow]not on this machine:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
    for note in unchecked:
        console.print(f"[yellow]number of examples not checked:[/] {_escape(note)}", highlight=False, soft_wrap=True)
    limit_s = None if every_row or probe else LONGEST_S
    forecast = forecast_of(planned, load_profile(profile), console, probe=probe, limit_s=limit_s, data=data)
    show_forecast(forecast, wide, names)
    console.print(f"run folder: {planned.folder}", highlight=False, soft_wrap=True)


def _parameters(planned: Prepared) -> tuple[dict[str, Parameters | None], list[str]]:
    """Parameters by the id of the first trial of every row, and why those that are None are not known."""
    from harness.core.hub import HubUnreachableError
    from harness.experiment.shared import alike
    from harness.model.build import count_parameters

    known: dict[str, Parameters | None] = {}
    parameters: dict[str, Parameters | None] = {}
    notes: dict[str, None] = {}
    specs = {trial.trial_id: spec for trial, spec in zip(planned.plan.trials, planned.specs, strict=True)}
    for trials in planned.plan.rows().values():
        spec = specs[trials[0].trial_id]
        key = alike(spec, "task", "backbone", "adapter")
        if key not in known:
            try:
                known[key] = count_parameters(spec)
            except HubUnreachableError as error:
                known[key] = None
                notes[str(error)] = None
        parameters[trials[0].trial_id] = known[key]
    return parameters, list(notes)


app.command(rich_help_panel=EXPERIMENTS)(cli_launch.launch)
app.command(rich_help_panel=EXPERIMENTS)(cli_results.status)
app.command(rich_help_panel=EXPERIMENTS)(cli_launch.logs)
app.command(rich_help_panel=EXPERIMENTS)(cli_launch.stop)
app.command(rich_help_panel=EXPERIMENTS)(cli_prune.prune)
app.command("profile", rich_help_panel=EXPERIMENTS)(cli_profile.profile)
app.command(rich_help_panel=EXPERIMENTS)(cli_doctor.doctor)
app.command(rich_help_panel=EXPERIMENTS)(cli_results.sync)
for command in (cli_results.recommend, cli_results.report, cli_results.compare, cli_results.attention):
    app.command(rich_help_panel=RESULTS)(command)
app.command(rich_help_panel=RESULTS)(cli_trained.export)
app.command(rich_help_panel=RESULTS)(cli_trained.predict)


@app.command(rich_help_panel=COMPONENTS)
def tasks() -> None:
    """List the tasks and their options."""
    from harness.cli.plugins import list_plugins
    from tasks.registry import TASKS

    list_plugins(TASKS, console, ("contexts", "metrics"))


@app.command(rich_help_panel=COMPONENTS)
def adapters(
    method: Annotated[
        str | None, typer.Argument(help="Show only this method, in detail: lora, or lora+bitfit.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Language model to count trainable parameters in: built-in, folder or hub id."),
    ] = None,
    contexts: Annotated[str, typer.Option(help="Contexts to count with grouping: specific.")] = "image,text",
    options: Annotated[
        list[str] | None, typer.Option("--set", help="OPTION=VALUE to count with, such as rank=64.")
    ] = None,
) -> None:
    """List the adapter methods and their options, or the trainable parameters they add to a language model."""
    from adapters.registry import ADAPTERS
    from harness.cli import plugins

    if options and model is None:
        raise UserError(
            f"--set {options[0]}: options are used to count parameters, which needs --model, such as builtin/tiny-llama"
        )
    counted = plugins.parse_contexts(contexts), plugins.parse_options(options or ())
    count_for = None if model is None else plugins.CountFor(model, *counted)
    if method is not None:
        plugins.show_adapter(method, console, count_for)
    elif count_for is not None:
        plugins.count_adapters(console, count_for)
    else:
        plugins.list_plugins(ADAPTERS, console)


@app.command(rich_help_panel=COMPONENTS)
def prepare(
    target: Annotated[str, typer.Argument(metavar="TASK", help="The name of a task, or an experiment file.")],
    options: Annotated[
        list[str] | None, typer.Option("--set", help="OPTION=VALUE of the task, like root=data/coco.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Read all data and report all problems at once.")] = False,
) -> None:
    """Download or generate the data of a task; with --check, verify all of it."""
    from harness.cli.prepare import prepare as prepare_task

    prepare_task(target, options or (), check, console)


@app.command(rich_help_panel=COMPONENTS)
def check(
    target: Annotated[str, typer.Argument(metavar="PACKAGE", help="An installed package, or a Python file.")],
) -> None:
    """Test the plugins of a package or a file against their contracts. Exit code 1: a check failed."""
    from harness.check.plugins import check_plugins

    if not check_plugins(target, console):
        raise typer.Exit(1)


@app.command(rich_help_panel=COMPONENTS)
def score(
    metric: Annotated[str, typer.Argument(help="The name of a metric, such as captions.")],
    references: Annotated[Path, typer.Option(help="An annotation file in COCO's format.")],
    predictions: Annotated[Path, typer.Option(help="A results file in COCO's format.")],
    output: Annotated[Path | None, typer.Option("--json", help="Write all scores here, per example too.")] = None,
) -> None:
    """Score a file of predictions against a file of references, both in COCO's formats."""
    from harness.cli.score import score as score_files

    score_files(metric, references, predictions, output, console)


@backbones_app.command("list")
def backbones_list() -> None:
    """List the built-in backbones."""
    from harness.core.hub import builtin_names

    for name in builtin_names():
        console.print(name, highlight=False)


@backbones_app.command("build")
def backbones_build(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the weights.")],
    seed: Annotated[int, typer.Option(help="Seed of the training data and the initialisation.")] = 0,
) -> None:
    """Train the built-in backbones from scratch (recipe and training log: docs/backbones.md)."""
    from harness.pretraining.build import build

    build(output, seed=seed)
