"""Which randomness the intervals of a table cover: a sentence, and a dagger on those that cover less than others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from results.leaderboard.table import Leaderboard, Row
from results.statistics.intervals import CONFIDENCE, Estimate

DAGGER = "†"
PERCENT = f"{CONFIDENCE * 100:.0f} %"
_SEEDS_ALONE = "seeds"  # the value of Estimate.covers


@dataclass(frozen=True)
class Coverage:
    """What to write below a table and next to its numbers.

    ``sentence`` holds for the whole table. A column whose intervals all cover only seeds, in a table where others cover
    more, is marked in its heading; in a column of both kinds the cells are marked.
    """

    sentence: str
    marked_columns: frozenset[str]
    mixed_columns: frozenset[str]

    def head(self, column: str) -> str:
        """The dagger after a heading, or nothing."""
        return f"\N{NO-BREAK SPACE}{DAGGER}" if column in self.marked_columns else ""

    def cell(self, column: str, estimate: Estimate) -> str:
        """The dagger after an interval, or nothing."""
        return f"\N{NO-BREAK SPACE}{DAGGER}" if column in self.mixed_columns and estimate.covers == _SEEDS_ALONE else ""


def coverage(columns: Mapping[str, Iterable[Estimate | None]]) -> Coverage:
    """What the intervals of a table cover, given its estimates by column."""
    kinds = {name: {one.covers for one in column if one is not None and one.covers} for name, column in columns.items()}
    found = set().union(*kinds.values())
    if not found:
        return Coverage("One seed each: there are no intervals.", frozenset(), frozenset())
    start = f"Intervals ({PERCENT}) cover"
    if found == {_SEEDS_ALONE}:
        return Coverage(f"{start} seeds alone, not the choice of test examples.", frozenset(), frozenset())
    if _SEEDS_ALONE not in found:
        return Coverage(f"{start} seeds and test examples.", frozenset(), frozenset())
    return Coverage(
        f"{start} seeds and test examples; {DAGGER} seeds alone.",
        frozenset(name for name, kind in kinds.items() if kind == {_SEEDS_ALONE}),
        frozenset(name for name, kind in kinds.items() if len(kind) > 1),
    )


def table_coverage(board: Leaderboard, rows: Sequence[Row]) -> Coverage:
    """What the intervals of some rows cover; the columns are the metrics, ``difference`` and ``input_use``."""
    columns: dict[str, list[Estimate | None]]
    columns = {info.name: [row.metrics.get(info.name) for row in rows] for info in board.ranking_metrics}
    columns["difference"] = [row.differences.get(board.primary.name) for row in rows]
    columns["input_use"] = [row.input_use for row in rows]
    return coverage(columns)
