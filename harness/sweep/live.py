"""Progress of a sweep: a live table on a terminal, lines in a file or a CI log, each with the estimated time left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.core.durations import duration
from harness.core.record import PlannedTrial, Status, TrialRecord
from harness.sweep.grace import STOPPED

SHOWN_TRIALS = 12  # rows of the live table: running trials, and those that ended most recently
PAUSED = "paused"  # the phase of a trial that waits at a rung of halving
QUIET_S = 60.0  # without a terminal, a line at most this often while no trial ends
_NAME_WIDTH, _NUMBERS_WIDTH = 10, 67  # characters of the live table: at least for names, for everything else
_MIN_FRACTION = 0.02  # fraction of the grid that must be done before the remaining time is estimated


@dataclass
class _Row:
    trial: PlannedTrial
    phase: str = "waiting"
    fraction: float = 0.0
    epoch: int = 0
    train_loss: float | None = None
    validation_perplexity: float | None = None
    started: float | None = None
    ended: Status | None = None  # of its record; the record itself is not kept: there may be ten thousand
    outcome: str = ""

    @property
    def runs(self) -> bool:
        """Whether it has a worker."""
        return self.started is not None and self.ended is None and self.phase not in (PAUSED, STOPPED)


class LiveTable:
    """Progress of a running sweep: a table with progress and ETA on a terminal or in a notebook, else a line per trial.

    Args:
        console: where to draw.
        trials: the trials of this sweep, in order.
        already: number of trials of the plan that had finished before.
    """

    def __init__(self, console: Console, trials: Sequence[PlannedTrial], already: int) -> None:
        self.console, self.already = console, already
        self._rows = {trial.trial_id: _Row(trial) for trial in trials}
        self._names = trial_names(trials)
        # Counted, not summed over all rows: there may be ten thousand, and each event asks.
        self._done, self._fractions = 0, 0.0
        self._began = self._printed = time.monotonic()
        self._live = Live(self, console=console, refresh_per_second=4, transient=True)
        # In a notebook rich draws with ipywidgets, which not every notebook has.
        self._shows_live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)

    def __enter__(self) -> LiveTable:
        if self._shows_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shows_live:
            self._live.stop()

    def opened(self, run: Path, at_once: int) -> None:
        """Without a terminal, print what is run."""
        if not self._shows_live:
            before = f", {self.already} finished before" if self.already else ""
            self._print(f"{_trials(len(self._rows))} to run{before}; {at_once} at a time; run folder: {run}")

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def noted(self, line: str) -> None:
        """Print a line, above the table if there is one."""
        self._print(line)

    def abandoned(self, line: str) -> None:
        """Print the last line, without the table."""
        self._live.stop()
        self._print(line)

    def started(self, trial_id: str, place: str) -> None:
        """Mark the trial as started."""
        row = self._rows[trial_id]
        row.started, row.phase = time.monotonic(), "starting"

    def progressed(self, trial_id: str, progress: Mapping[str, Any]) -> None:
        """Update the trial with the fields of ``harness.trial.trial.Progress``."""
        row = self._rows[trial_id]
        self._came_to(row, progress["fraction"])
        row.phase = progress["phase"]
        row.epoch = progress.get("epoch") or row.epoch
        row.train_loss = progress.get("train_loss") or row.train_loss
        row.validation_perplexity = progress.get("validation_perplexity") or row.validation_perplexity
        if not self._shows_live and time.monotonic() - self._printed >= QUIET_S:
            running = [row for row in self._rows.values() if row.runs]
            states = ", ".join(f"{self._names[r.trial.trial_id]}: {_where(r)}" for r in running)
            self._print(f"[{self._done}/{len(self._rows)}] {self._left()}; running: {states}")

    def ended(self, record: TrialRecord) -> None:
        """Mark the trial as ended, with its record."""
        row = self._rows[record.trial_id]
        self._came_to(row, 1.0)
        self._done += row.ended is None
        row.ended, row.phase, row.outcome = record.status, record.status, _outcome(record)
        if not self._shows_live:
            left = f"; {self._left()}" if self._done < len(self._rows) else ""
            name = f"{record.trial_id} {self._names[record.trial_id]}"
            self._print(f"[{self._done}/{len(self._rows)}] {name}: {row.outcome}{left}")

    def _came_to(self, row: _Row, fraction: float) -> None:
        self._fractions += fraction - row.fraction
        row.fraction = fraction

    @property
    def _fraction(self) -> float:
        return self._fractions / len(self._rows)

    def _left(self) -> str:
        elapsed, fraction = time.monotonic() - self._began, self._fraction
        if fraction <= _MIN_FRACTION:
            return "estimating remaining time"
        return f"about {duration(max(0.0, elapsed / fraction - elapsed))} left"  # fractions are rounded

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = list(self._rows.values())
        done = [row for row in rows if row.ended]
        counts = Counter(row.ended for row in done)
        pruned = f", {counts['pruned']} pruned" if counts["pruned"] else ""
        failed = len(done) - counts["finished"] - counts["pruned"]
        paused = sum(row.phase == PAUSED for row in rows)
        waiting = f", {paused} paused" if paused else ""
        total = len(rows)
        elapsed = time.monotonic() - self._began
        before = f", {self.already} finished earlier" if self.already else ""
        states = f"{len(done)} of {total} trials{before}, {failed} failed{pruned}{waiting}"
        summary = f"{states} · {duration(elapsed)} · {self._left()}"
        head = Table.grid()
        head.add_row(Text(summary, style="bold"))
        head.add_row(ProgressBar(total=1.0, completed=self._fraction, width=min(80, options.max_width)))
        yield head
        yield self._table([row for row in rows if row.runs], done, options.max_width)

    def _table(self, running: list[_Row], done: list[_Row], width: int) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        left_aligned = ("trial", "phase", "progress")
        # A long name or reason is cut, numbers are not; where there is room, reasons get half of what is left.
        name_width = max(_NAME_WIDTH, min(width - _NUMBERS_WIDTH, (width - 30) // 2))
        for heading in ("trial", "seed", "phase", "epoch", "train loss", "val. ppl", "progress"):
            table.add_column(
                heading,
                justify="left" if heading in left_aligned else "right",
                no_wrap=True,
                max_width=name_width if heading == "trial" else None,
            )
        recent = done[max(0, len(done) - max(0, SHOWN_TRIALS - len(running))) :]
        for row in [*recent, *running[:SHOWN_TRIALS]]:
            style = "" if row.ended is None else ("dim" if row.ended in ("finished", "pruned") else "red")
            cells: list[Any] = [
                Text(self._names[row.trial.trial_id].rpartition(" seed ")[0]),
                str(row.trial.seed),
                row.phase,
                str(row.epoch or ""),
                "" if row.train_loss is None else f"{row.train_loss:.3f}",
                "" if row.validation_perplexity is None else f"{row.validation_perplexity:.3f}",
                ProgressBar(total=1.0, completed=row.fraction, width=20)
                if row.ended is None
                else Text(row.outcome.replace("test perplexity", "test")),
            ]
            table.add_row(*cells, style=style)
        return table


def trial_name(trial: PlannedTrial, with_rate: bool = False) -> str:
    """``LoRA r=4 specific seed 0``, or ``LoRA r=4 specific learning rate 0.006 seed 0``."""
    rate = f"learning rate {trial.learning_rate:g}" if with_rate and trial.learning_rate is not None else ""
    return " ".join([*filter(None, (trial.label, trial.grouping, trial.setting, rate)), f"seed {trial.seed}"])


def trial_names(trials: Sequence[PlannedTrial]) -> dict[str, str]:
    """Names by trial id, with the learning rate where several trials would otherwise have the same name."""
    counts = Counter(trial_name(trial) for trial in trials)
    return {trial.trial_id: trial_name(trial, counts[trial_name(trial)] > 1) for trial in trials}


def _trials(count: int) -> str:
    return f"{count} trial{'s' * (count != 1)}"


def _where(row: _Row) -> str:
    """How far a trial is; encoding says that itself, and no step has been taken then."""
    return row.phase if "%" in row.phase else f"{row.phase} {row.fraction:.0%}"


def _outcome(record: TrialRecord) -> str:
    if record.status == "pruned":
        return str(record.reason)
    if record.status != "finished":
        return f"{record.status}: {record.reason}"
    return f"test perplexity {record.metrics['test']['perplexity']:.3f} in {duration(record.wall_time_s)}"
