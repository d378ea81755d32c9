"""The leaderboard in the terminal: the last screen of a run, ``harness status`` and ``harness leaderboard show``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from harness.cli.progress import LARGE, SHOWN_FAILURES
from harness.core.durations import duration
from harness.core.record import read_plan
from harness.sweep.live import trial_names
from results.export.columns import Column, all_columns
from results.leaderboard.recommend import recommend
from results.leaderboard.table import Leaderboard, Row
from results.loaded import Results

PAGE = "http://127.0.0.1:5000"  # of the server that the printed command starts
_UNBOUNDED = 10_000  # characters: wider than any table
_REASON_LENGTH = 240  # characters of the reason why a row is excluded from ranking: three lines
# Headings that fit into 80 characters; "÷" and "Δ": see _heads.
_HEADS = {"trainable": "trainable", "step_time": "step", "memory": "memory", "input_use": "wrong / right"}
_UNBROKEN = ("rank", "difference", "trainable", "step_time", "memory", "verdict")


class LeaderboardView:
    """A table for each setting, below it the rows excluded from ranking with the reason, and doubts about rows.

    In 80 characters it has ranks, means, ratios to the reference, sizes and verdicts; where there is room, intervals,
    the first score of generated text, the wrong-input test and the seeds too. What was not measured has no column.

    Args:
        board: the leaderboard.
        columns: names of columns, instead of these.
    """

    def __init__(self, board: Leaderboard, columns: Sequence[str] = ()) -> None:
        self.board, self.columns = board, tuple(columns)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        board = self.board
        yield Text(f"{board.run.plan.experiment}: scores on the test split, means over seeds", style="italic")
        for setting in board.settings:
            if setting:
                yield Text(f"\n{setting}", style="bold")
            if rows := board.of(setting):
                yield self._table(rows, console, options)
            yield from self._notes(setting)
        if legend := self._legend():
            yield Text(legend, style="dim")

    def _table(self, rows: Sequence[Row], console: Console, options: ConsoleOptions) -> RenderableType:
        """The widest table that fits: with everything, with intervals, or with means alone."""
        known = all_columns(self.board, rows)
        chosen = self.columns or _default(self.board)
        shapes = [(chosen, False), (chosen, True)]
        if not self.columns:
            everything = (*chosen, *_more(self.board))
            shapes = [(everything, False), ((*chosen, "seeds"), False), (everything, True), (chosen, True)]
        tables = [self._drawn(rows, [known[n] for n in names if n in known], brief) for names, brief in shapes]
        unbounded = options.update(max_width=_UNBOUNDED)
        widths = [Measurement.get(console, unbounded, table).maximum for table in tables]
        fitting = (t for t, width in zip(tables, widths, strict=True) if width <= options.max_width)
        return next(fitting, tables[-1])

    def _drawn(self, rows: Sequence[Row], columns: Sequence[Column], brief: bool) -> Table:
        heads = _heads(self.board)
        table = Table(box=None, pad_edge=False, padding=(0, 1 if brief else 2, 0, 0), header_style="bold")
        for one in columns:
            head = heads.get(one.name, one.head)
            unbroken = one.name in _UNBROKEN or one.metric is not None
            table.add_column(head, justify="left" if one.is_text else "right", no_wrap=unbroken)
        for row in rows:
            table.add_row(*(Text((one.brief if brief else one.read)(row)) for one in columns))
        return table

    def _notes(self, setting: str) -> Iterator[Text]:
        """Below the table of a setting: mixed versions, doubts, and what is excluded from ranking."""
        rows, apart = self.board.of(setting), self.board.apart(setting)
        by_code: dict[str, list[str]] = {}
        for row in (*rows, *apart):
            if row.mixed_versions:
                by_code.setdefault(row.mixed_versions, []).append(row.name)
        yield from (Text(f"{', '.join(names)}: {code}", style="yellow") for code, names in by_code.items())
        yield from self._more_seeds(rows)
        labels = dict.fromkeys(badge.label for row in rows for badge in row.badges)
        for label in labels:
            names = [row.name for row in rows if label in {badge.label for badge in row.badges}]
            yield Text(f"{label}: {', '.join(names)}", style="yellow")
        by_reason: dict[str, list[str]] = {}
        for row in apart:
            by_reason.setdefault(shorten("; ".join(row.apart), _REASON_LENGTH, placeholder=" …"), []).append(row.name)
        yield from (Text(f"excluded from ranking: {', '.join(names)}: {reason}") for reason, names in by_reason.items())

    def _more_seeds(self, rows: Sequence[Row]) -> Iterator[Text]:
        """What would separate rows that are not: in a narrow table the verdict does not say it."""
        if self.columns and "verdict" not in self.columns:
            return
        found = [(row.name, row.differences.get(self.board.primary.name)) for row in rows]
        needed = [f"{name} {one.more_seeds}" for name, one in found if one is not None and one.more_seeds is not None]
        if needed:
            yield Text(f"more seeds that might separate a row from {self.board.reference_name}: {', '.join(needed)}")

    def _legend(self) -> str:
        """What the columns are relative to."""
        board, names = self.board, self.columns or _default(self.board)
        compared = any(board.primary.name in row.differences for row in board.rows)
        profiled = board.run.profile is not None and {"step_time", "memory"} & set(names)
        parts = []
        if compared and "difference" in names:
            heads = f"{_heads(board)['difference']}{', step' if profiled else ''}"
            parts.append(f"{heads}: relative to {board.reference_name}")
        if compared and "verdict" in names:
            parts.append(f"verdict: against {board.reference_name}, for models trained with new seeds")
        if profiled:
            parts.append("step time and memory: of training, each method alone on the device")
        return "; ".join(parts)


def _default(board: Leaderboard) -> tuple[str, ...]:
    return ("rank", "method", board.primary.name, "difference", "trainable", "step_time", "memory", "verdict")


def _more(board: Leaderboard) -> tuple[str, ...]:
    """Where there is room: the first score of generated text (in a mixture, that of its first task), and more."""
    others = board.ranking_metrics[1:]
    second = next((info.name for info in others if "perplexity" not in info.name), None)
    return (*([second] if second else []), "input_use", "seeds")


def _heads(board: Leaderboard) -> Mapping[str, str]:
    sign = "÷" if board.primary.scale == "log" else "Δ"
    return {"rank": "rank", "method": "method", "verdict": "verdict", "seeds": "seeds"} | _HEADS | {
        "difference": f"{sign} {board.run.plan.reference_method}"
    }  # fmt: skip


def recommendation(board: Leaderboard) -> Text:
    """What to use, over all settings where there are several; empty while nothing is ranked."""
    if not any(row.rank for row in board.rows):
        return Text()
    return Text.assemble(("recommended: ", "bold"), recommend(board)[0].sentence)


def print_last_screen(results: Results, seconds: float, console: Console) -> None:
    """What a run ends with: the leaderboard, what failed, how long it took, and where report and MLflow are."""

    def whole(line: str | Text) -> None:  # paths and commands are copied: they are not broken into lines
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    if results.settled and len((plan := read_plan(results.folder)).trials) > LARGE:
        whole(f"leaderboard: harness leaderboard show {shlex.quote(str(results.folder))}")
        whole(f"report:  {results.report}")
        for line in _mlflow_lines(plan.mlflow_uri or "", results.tracking_link):
            whole(line)
        return
    board = results.board
    console.print(LeaderboardView(board), recommendation(board), sep="\n")
    names = trial_names(board.run.plan.trials)
    for item in board.failed[:SHOWN_FAILURES]:
        name = f"{item.trial.trial_id} {names[item.trial.trial_id]}"
        whole(Text.assemble((item.status, "red"), f" {name}: {item.reason or 'no reason given'}"))
    if (rest := len(board.failed) - SHOWN_FAILURES) > 0:
        whole(f"… and {rest} more that failed: see the report")
    done = len(board.run.plan.trials) - len(board.failed) - len(board.missing) - len(board.pruned)
    groups = ((board.pruned, "pruned"), (board.failed, "failed"), (board.missing, "not run"))
    counts = [f"{len(items)} {word}" for items, word in groups if items]
    again = "" if results.complete else "; run the same command again for the rest"
    summary = ", ".join([f"{done} of {len(board.run.plan.trials)} trials finished", *counts])
    whole(f"{summary}; this run took {duration(seconds)}{again}")
    whole(f"report:  {results.report}")
    for line in _mlflow_lines(board.run.plan.mlflow_uri or "", results.tracking_link):
        whole(line)


def _mlflow_lines(uri: str, link: str | None) -> Iterator[str]:
    """The address of the trials on MLflow's page; for a database the command that serves it on this machine, too."""
    served = uri.startswith(("http://", "https://"))
    page = f"{(uri if served else PAGE).rstrip('/')}/{link or ''}"
    if served:
        yield f"MLflow:  {page}"
        return
    program = Path(sys.executable).with_name("mlflow")
    host, port = PAGE.removeprefix("http://").split(":")
    command = [str(program), "ui", "--backend-store-uri", uri, "--host", host, "--port", port]
    yield f"MLflow:  {shlex.join(command)}"
    yield f"         then {page}"
