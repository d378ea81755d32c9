"""Commands that read run folders and leaderboards: status, report, compare, leaderboard, attention."""

from __future__ import annotations

import gc
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from harness.cli.progress import LARGE
from harness.core.errors import UserError
from harness.core.lease import holder_of
from harness.core.record import Run, read_plan
from harness.core.shared_folder import SharedFolder
from harness.core.storage import Folder, is_url, local_folder, push_copy, url_of
from harness.core.terminal import Terminal

if TYPE_CHECKING:
    from results.leaderboard.published import PublishedLeaderboard

RUNS = Path("runs")  # where `harness run` puts run folders by default
MLFLOW = "mlflow:"
console = Terminal()
leaderboard_app = typer.Typer(no_args_is_help=True, help="Show a leaderboard, or what changed between two.")

_RUN = "A run folder or its URL; by default the newest in ./runs."
_RUNS = "Run folders or their URLs; by default the newest in ./runs."
RunFolder = Annotated[
    Path | None,
    typer.Argument(parser=local_folder, metavar="[RUN]", help=_RUN),
]


Only = Annotated[
    str,
    typer.Option("--only", metavar="TEST", help="Only these trials, such as 'rank=8 and seed<3'.", show_default=False),
]


def _print(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _with_weights(place: str) -> Path:
    return local_folder(place, weights=True)


def newest_run() -> Path:
    """The run folder in ./runs with the newest plan.

    Raises:
        UserError: there is no run folder.
    """
    plans = sorted(RUNS.glob("*/plan.json"), key=lambda path: (path.stat().st_mtime, path))
    if not plans:
        raise UserError(f"{RUNS.resolve()}: no run folder here; name one, such as runs/quickstart")
    return plans[-1].parent


def status(folder: RunFolder = None, only: Only = "") -> None:
    """Show the progress of a run, its failures and the leaderboard so far, without writing anything."""
    from clusters.launch.launchers import launch_line
    from harness.cli.progress import progress_lines
    from harness.core.record import narrowed
    from harness.core.selection import select
    from harness.core.summaries import read_brief
    from harness.sweep.choice import stopped_trying
    from harness.sweep.input_files import changed_files
    from results.leaderboard.progress import progress_of

    folder = folder or newest_run()
    active = is_running(folder)
    launched = launch_line(folder)
    if launched and not (folder / "plan.json").exists():
        _print(f"{folder}: {launched}; nothing has run yet")
        return
    run = read_brief(folder) if _is_large(folder) else _whole(folder)
    _print(f"{url_of(folder) or folder}: {run.plan.experiment}")
    if launched:
        _print(launched)
    if only:
        planned, run = len(run.plan.trials), narrowed(run, select(run.plan, only))
        _print(f"{len(run.plan.trials)} of {planned} trials selected")
    for line in progress_lines(progress_of(run, active), active):
        _print(line)
    if line := stopped_trying(folder, run.records):
        _print(line)
    for message in run.broken:
        _print(f"could not be read: {message}")
    for line in (*run.foreign_lines, *changed_files(folder)):
        _print(line)
    if not any(record.status == "finished" for record in run.records.values()):
        return
    if isinstance(run, Run):
        _print_board(run)
    else:
        _print(f"leaderboard: harness leaderboard show {shlex.quote(str(url_of(folder) or folder))}")


def _whole(folder: Path) -> Run:
    from results.leaderboard.join import read_runs

    return read_runs([folder])


def _print_board(run: Run) -> None:
    from harness.cli.leaderboard import LeaderboardView, recommendation
    from results.leaderboard.table import build_leaderboard

    board = build_leaderboard(run)
    console.print()
    console.print(LeaderboardView(board), recommendation(board), sep="\n")


def _is_large(folder: Path) -> bool:
    """Whether the leaderboard of a run takes long to make and to read; a plan that cannot be read is not large."""
    try:
        return len(read_plan(folder).trials) > LARGE
    except (OSError, ValueError):
        return False


def is_running(folder: Path) -> bool:
    """Whether a harness holds the lease of the folder."""
    place = Folder(url) if (url := url_of(folder)) else SharedFolder(folder)
    return holder_of(place) is not None


def sync(folder: RunFolder = None) -> None:
    """Deliver to MLflow what it lacks of a run, because it was down. The end of every run does the same."""
    from harness.sweep.sync import sync_run

    found = sync_run(folder or newest_run())
    lacked = f"{len(found.delivered)} delivered" if found.delivered else "nothing was missing"
    _print(f"MLflow has {found.trials} trials that have ended ({lacked}): {found.place}")


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders such as runs/quickstart; with --from, run names.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report; by default RUN/report.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="mlflow:URI", help="Fetch the runs from this tracking server first.")
    ] = None,
) -> None:
    """Write the report of a run, or of several as one leaderboard."""
    from results.report import write_report

    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output: {output} is a file; name a folder")
    if output is not None and is_url(output):
        raise UserError("--output: found a URL; the report of a run at a URL is stored there without --output")
    folders = [local_folder(run) for run in runs] if source is None else _fetched(source, runs, output)
    gc.disable()  # a fifth faster: records are many long-lived objects, and this process ends soon
    with console.status("writing the report …"):
        written = write_report(folders, output)
        if output is None:
            push_copy(folders[0])
    for path in written.all:
        _print(str(path))


def _fetched(source: str, runs: list[str], output: Path | None) -> list[Path]:
    """Run folders rebuilt from the artifacts of the tracking server, in the folder of the report."""
    if not source.startswith(MLFLOW) or source == MLFLOW:
        raise UserError(
            f"--from: found {source!r}; allowed: {MLFLOW} followed by a tracking URI, such as {MLFLOW}http://host:5000"
        )
    if output is None:
        raise UserError("--from: name a folder for the report and the fetched runs with --output")
    from harness.tracking.fetch import fetch_run

    return [fetch_run(source.removeprefix(MLFLOW), run, output / "runs") for run in runs]


def compare(
    one: Annotated[str, typer.Argument(metavar="A", help='A row: "LoRA r=4 specific" or a part of it; or a trial id.')],
    other: Annotated[str, typer.Argument(metavar="B", help="The row or trial to compare with.")],
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--run",
            parser=local_folder,
            metavar="RUN",
            help=_RUNS,
        ),
    ] = None,
    setting: Annotated[str | None, typer.Option(help="The setting, if there are several.")] = None,
    metric: Annotated[str | None, typer.Option(help="Show only this metric, such as cider.")] = None,
) -> None:
    """Compare two rows of a leaderboard, or two trials, paired by seed and test example."""
    from harness.cli.terminal import comparison_view
    from results.leaderboard.compare import compare as compare_rows
    from results.leaderboard.join import read_runs

    folders = runs or [newest_run()]
    found = compare_rows(read_runs(folders), one, other, setting, metric)
    _print(", ".join([*map(str, folders), *filter(None, [found.one.row.setting])]))
    console.print(comparison_view(found))


def recommend(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(parser=local_folder, metavar="[RUN...]", help=_RUNS),
    ] = None,
    max_trainable: Annotated[
        str | None, typer.Option(help="Most trainable parameters: 2M, or 1% of the reference method's.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory in training: 24GiB, or 50% of the reference method's.")
    ] = None,
    max_hours: Annotated[
        str | None, typer.Option(help="Longest training of one trial in hours: 2, or 50% of the reference method's.")
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(help="How much worse than the best is good enough; default: the experiment's margin."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Decide by this metric, such as cider.")] = None,
) -> None:
    """Say which method to use: the cheapest that is not shown to be worse than the best, and its price."""
    from results.leaderboard.amounts import parse_margin
    from results.leaderboard.join import read_runs
    from results.leaderboard.recommend import limits_of, recommend_from

    limits = limits_of(max_trainable, max_memory, max_hours, prefix="--")
    margin = None if within is None else parse_margin(within, "--within")
    for found in recommend_from(read_runs(runs or [newest_run()]), limits, margin, metric):
        _print(found.text)


@leaderboard_app.command("show")
def leaderboard_show(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(parser=local_folder, metavar="RUN...", help=_RUNS),
    ] = None,
    style: Annotated[
        Literal["table", "markdown", "latex", "csv"], typer.Option("--format", "-f", help="How to print it.")
    ] = "table",
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME…", help="Only these columns, in this order, such as rank,method,cider,trainable."
        ),
    ] = None,
) -> None:
    """Print the leaderboard of a run, or of several as one, with the columns of your choice."""
    from harness.cli.leaderboard import LeaderboardView
    from results.export.columns import choose_columns
    from results.export.latex import latex
    from results.export.text import markdown, table_csv
    from results.leaderboard.join import read_runs
    from results.leaderboard.table import build_leaderboard

    if style == "csv" and columns is not None:
        raise UserError("--columns: not for csv, which has every column; allowed with: table, markdown, latex")
    board = build_leaderboard(read_runs(runs or [newest_run()]))
    names = [name.strip() for name in columns.split(",") if name.strip()] if columns is not None else None
    chosen = () if names is None else choose_columns(board, names)
    if style == "table":
        console.print(LeaderboardView(board, chosen))
        return
    written = {"markdown": lambda: markdown(board, chosen), "latex": lambda: latex(board, chosen)}
    typer.echo(written.get(style, lambda: table_csv(board))(), nl=False)


@leaderboard_app.command("diff")
def leaderboard_diff(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="The leaderboard.json of a report.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="A later leaderboard.json.")],
    metric: Annotated[str | None, typer.Option(help="Metric to compare; by default the primary one.")] = None,
) -> None:
    """Show what changed between two leaderboards, and whether it is more than noise."""
    from harness.cli.terminal import diff_view
    from results.leaderboard.diff import diff

    console.print(diff_view(diff(_published(old), _published(new), metric)))


def _published(path: Path) -> PublishedLeaderboard:
    from results.leaderboard.published import read_published

    try:
        return read_published(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `harness report` writes leaderboard.json") from None
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def attention(
    folder: Annotated[
        Path,
        typer.Argument(parser=_with_weights, metavar="RUN", help="A run folder, such as runs/quickstart, or its URL."),
    ],
    trials: Annotated[
        list[str] | None, typer.Option("--trial", metavar="ID", help="Only this trial; may be repeated.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Number of test examples per trial.")] = 4,
) -> None:
    """Record which parts of the input finished trials attend to, and add it to the report."""
    from harness.cli.attention import record_attention
    from results.report import write_report

    record_attention(folder, trials or (), examples, console)
    _print(str(write_report([folder]).html))
    push_copy(folder)
