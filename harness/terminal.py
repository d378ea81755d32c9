"""What a person sees in the terminal: the plan, the live table, the last screen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.record import Parameters, Plan, PlannedTrial, TrialRecord
from results.format import ABSENT, duration, estimate_text, number
from results.table import Leaderboard

SHOWN_TRIALS = 12  # rows of the live table: running ones first, then those that ended last
_MIN_FRACTION = 0.02  # of the grid done before its remaining time is worth guessing


@dataclass
class _Row:
    trial: PlannedTrial
    phase: str = "waiting"
    fraction: float = 0.0
    epoch: int = 0
    train_loss: float | None = None
    validation_perplexity: float | None = None
    started: float | None = None
    ended: TrialRecord | None = None


class LiveTable:
    """The sweep as it runs. On a terminal a table with progress and ETA; elsewhere a line per ended trial.

    Args:
        console: where to draw.
        trials: the trials of this sweep, in order.
        already: how many of the plan were finished before.
    """

    def __init__(self, console: Console, trials: Sequence[PlannedTrial], already: int) -> None:
        self.console, self.already = console, already
        self._rows = {trial.trial_id: _Row(trial) for trial in trials}
        self._began = time.monotonic()
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def started(self, trial_id: str) -> None:
        """The trial has a process."""
        row = self._rows[trial_id]
        row.started, row.phase = time.monotonic(), "starting"

    def progressed(self, trial_id: str, progress: Mapping[str, Any]) -> None:
        """Fields of ``harness.trial.Progress``."""
        row = self._rows[trial_id]
        row.phase, row.fraction = progress["phase"], progress["fraction"]
        row.epoch = progress.get("epoch") or row.epoch
        row.train_loss = progress.get("train_loss") or row.train_loss
        row.validation_perplexity = progress.get("validation_perplexity") or row.validation_perplexity

    def ended(self, record: TrialRecord) -> None:
        """The trial has a record."""
        row = self._rows[record.trial_id]
        row.ended, row.fraction, row.phase = record, 1.0, record.status
        if not self.console.is_terminal:
            done = sum(r.ended is not None for r in self._rows.values())
            line = f"[{done}/{len(self._rows)}] {trial_name(row.trial)}: {_outcome(record)}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = list(self._rows.values())
        done = [row for row in rows if row.ended]
        failed = sum(row.ended.status != "finished" for row in done if row.ended)
        total = len(rows)
        fraction = sum(row.fraction for row in rows) / total
        elapsed = time.monotonic() - self._began
        left = (
            f"about {duration(elapsed / fraction - elapsed)} left"
            if fraction > _MIN_FRACTION
            else "estimating the time left"
        )
        before = f", {self.already} from before" if self.already else ""
        summary = f"{len(done)} of {total} trials{before}, {failed} failed · {duration(elapsed)} · {left}"
        head = Table.grid()
        head.add_row(Text(summary, style="bold"))
        head.add_row(ProgressBar(total=1.0, completed=fraction, width=min(80, options.max_width)))
        yield head
        yield self._table([row for row in rows if row.started and not row.ended], done)

    def _table(self, running: list[_Row], done: list[_Row]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        words = ("trial", "phase", "progress")
        for heading in ("trial", "seed", "phase", "epoch", "train loss", "val. ppl", "progress"):
            table.add_column(heading, justify="left" if heading in words else "right", no_wrap=heading in words)
        recent = done[max(0, len(done) - max(0, SHOWN_TRIALS - len(running))) :]
        for row in [*recent, *running[:SHOWN_TRIALS]]:
            style = "" if row.ended is None else ("dim" if row.ended.status == "finished" else "red")
            cells: list[Any] = [
                Text(_name(row.trial)),
                str(row.trial.seed),
                row.phase,
                str(row.epoch or ""),
                "" if row.train_loss is None else f"{row.train_loss:.3f}",
                "" if row.validation_perplexity is None else f"{row.validation_perplexity:.3f}",
                ProgressBar(total=1.0, completed=row.fraction, width=20)
                if row.ended is None
                else Text(_outcome(row.ended).replace("test perplexity", "test")),
            ]
            table.add_row(*cells, style=style)
        return table


def _name(trial: PlannedTrial) -> str:
    return " ".join(filter(None, (trial.label, trial.grouping, trial.setting)))


def trial_name(trial: PlannedTrial) -> str:
    """``LoRA r=4 specific seed 0``."""
    return f"{_name(trial)} seed {trial.seed}"


def _outcome(record: TrialRecord) -> str:
    if record.status != "finished":
        return f"{record.status}: {record.reason}"
    return f"test perplexity {record.metrics['test']['perplexity']:.3f} in {duration(record.wall_time_s)}"


def plan_table(plan: Plan, parameters: Mapping[str, Parameters | None], states: Mapping[str, str]) -> Table:
    """The trials, seeds of one row joined, with the parameters each will train.

    Args:
        plan: all trials.
        parameters: by trial id; None where a backbone's configuration is not to be had.
        states: by trial id: "finished", "failed", "to run".
    """
    table = _table(f"{plan.experiment}: {len(plan.trials)} trials")
    rows: dict[tuple[str, str], list[PlannedTrial]] = {}
    for trial in plan.trials:
        rows.setdefault((f"{trial.label} {trial.grouping}".rstrip(), trial.setting), []).append(trial)
    with_setting = any(setting for _, setting in rows)
    for heading in ("method", "setting", "seeds") if with_setting else ("method", "seeds"):
        table.add_column(heading)
    for heading in ("trainable", "adapter", "projector", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state")
    for (name, setting), trials in rows.items():
        counts = parameters[trials[0].trial_id]
        numbers = (counts.trainable, counts.adapter, counts.projector, counts.total) if counts else ()
        cells = [f"{n:,}" for n in numbers] or ["unknown"] * 4
        seeds = ", ".join(str(trial.seed) for trial in trials)
        state = ", ".join(_counted([states[trial.trial_id] for trial in trials]))
        table.add_row(name, *([setting] if with_setting else []), seeds, *cells, state)
    return table


def _table(title: str) -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", title=title, title_justify="left")


def _counted(words: Iterable[str]) -> list[str]:
    all_words = list(words)
    return [f"{all_words.count(word)} {word}" for word in dict.fromkeys(all_words)]


def leaderboard_table(board: Leaderboard) -> Table:
    """The leaderboard as the last screen shows it: as many columns as fit 80 characters; the report has them all."""
    table = _table(f"{board.run.plan.experiment}: scores on the test split, mean [95 % interval] over seeds")
    with_setting = any(row.setting for row in board.rows)
    shown = [info for info in board.run.plan.metrics if any(info.name in row.metrics for row in board.rows)]
    # The first score of a generated text that the task's metrics name, of a mixture its first task's.
    second = next((i for i in shown if "perplexity" not in i.name and i != board.primary), None)
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("method")
    if with_setting:
        table.add_column("setting")
    numbers = (board.primary.label, second.label if second else "", "wrong/right input", "trainable", "seeds")
    for heading in filter(None, numbers):
        table.add_column(heading, justify="right")
    for row in board.rows:
        other = row.metrics.get(second.name) if second else None
        cells = [row.rank_text, row.name, *([row.setting] if with_setting else [])]
        cells += [estimate_text(row.metrics.get(board.primary.name))]
        cells += [number(other.mean) if other else ABSENT] if second else []
        cells += [number(row.input_use.mean) if row.input_use else ABSENT]
        cells += [f"{row.parameters.trainable:,}" if row.parameters else ABSENT, row.seeds]
        table.add_row(*cells)
    return table
