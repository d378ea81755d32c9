"""The search for a learning rate: every rate of every row, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from results.leaderboard import format as text
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard
from results.statistics.intervals import Estimate


@dataclass(frozen=True)
class SearchLine:
    """One learning rate of one row's search."""

    row: Row
    rate: float | None
    validation: Estimate | None  # perplexity; also None for a rate declared as tried before
    seeds: str
    chosen: bool
    outcome: str


def search_lines(board: Leaderboard) -> list[SearchLine]:
    """Every learning rate of every row, those declared as tried before last; empty if no row had a choice."""
    if not any(len(row.candidates) > 1 or _declared(row) for row in board.rows):
        return []
    statuses = {
        one.trial.trial_id: one.status.replace("_", " ") for one in (*board.failed, *board.missing, *board.pruned)
    }
    return [line for row in board.rows for line in _row_lines(row, statuses)]


def _row_lines(row: Row, statuses: Mapping[str, str]) -> list[SearchLine]:
    several = len(row.candidates) > 1
    lines = []
    for candidate in row.candidates:
        unfinished = Counter(statuses[trial.trial_id] for trial in candidate.trials if trial.trial_id in statuses)
        outcome = ", ".join(f"{count} {status}" for status, count in unfinished.items())
        outcome += f" at epoch {candidate.pruned_at}" if candidate.pruned_at is not None else ""
        lines.append(
            SearchLine(
                row,
                candidate.learning_rate,
                candidate.validation,
                f"{len(candidate.finished)}/{len(candidate.trials)}",
                several and candidate is row.chosen and candidate.validation is not None,
                outcome or ("" if several else "only candidate"),
            )
        )
    return lines + [
        SearchLine(row, rate, None, text.ABSENT, False, "declared as tried before") for rate in _declared(row)
    ]


def _declared(row: Row) -> list[float]:
    before = {rate for one in row.candidates for trial in one.trials for rate in trial.tried_learning_rates}
    return sorted(before - {candidate.learning_rate for candidate in row.candidates})


def no_search(board: Leaderboard) -> str:
    """A sentence for a run in which no row had a choice."""
    rates = sorted({trial.learning_rate for trial in board.run.plan.trials if trial.learning_rate is not None})
    if not rates:
        return "The plan has no learning rates."
    values = f"{rates[0]:g}" if len(rates) == 1 else f"from {rates[0]:g} to {rates[-1]:g}"
    return f"No search: every row has one learning rate, {values}, and none is declared as tried before."
