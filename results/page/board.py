"""The tables of the first screen: the leaderboard of each setting, and methods × settings where there are several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.core.record import MetricInfo
from results.leaderboard.coverage import Coverage, table_coverage
from results.leaderboard.effects import MeanRanks, Spread, mean_ranks
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard
from results.page.columns import Column, columns_of, row_id


@dataclass(frozen=True)
class BoardTable:
    """The leaderboard of one setting: its rows best first, those that are not ranked at the place of their score."""

    id: str
    name: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    covered: Coverage

    @property
    def noted(self) -> list[Row]:
        """The rows with notes."""
        return [row for row in self.rows if row.notes]


@dataclass(frozen=True)
class Mark:
    """A badge beside a method's name; ``text`` says more than fits."""

    short: str
    text: str
    doubts_answer: bool = False


@dataclass(frozen=True)
class OverviewCell:
    """One row of the leaderboard in the table of methods × settings."""

    row_id: str
    mean: float
    rank: str
    goodness: float  # 0 to 1 within the setting, by rank of the mean


@dataclass(frozen=True)
class OverviewLine:
    """One method with one grouping over the settings, in their order; None where it has no score."""

    label: str
    grouping: str
    rank: Spread | None  # the mean rank
    cells: tuple[OverviewCell | None, ...]


@dataclass(frozen=True)
class Overview:
    """Methods × settings."""

    settings: tuple[str, ...]
    lines: tuple[OverviewLine, ...]
    ranks: MeanRanks | None


def build_tables(board: Leaderboard) -> list[BoardTable]:
    """One table for each setting; all have the same columns in the same order, less those without any value."""
    key = _best_first(board.primary)
    found = []
    for number, setting in enumerate(board.settings):
        rows = sorted((row for row in board.rows if row.setting == setting), key=key)
        covered = table_coverage(board, rows)
        columns = columns_of(board, rows, covered)
        found.append(BoardTable(f"board-{number}", setting, tuple(rows), tuple(columns), covered))
    return found


def _best_first(primary: MetricInfo) -> Callable[[Row], tuple[bool, float]]:
    sign = -1 if primary.higher_is_better else 1

    def key(row: Row) -> tuple[bool, float]:
        one = row.metrics.get(primary.name)
        return one is None, sign * one.mean if one else 0.0

    return key


def chooser(tables: Sequence[BoardTable]) -> dict[str, list[Column]]:
    """The columns of all tables by group, each once."""
    found = {column.key: column for column in itertools.chain.from_iterable(table.columns for table in tables)}
    groups: dict[str, list[Column]] = {}
    for column in found.values():
        groups.setdefault(column.group, []).append(column)
    return groups


def marks_of(row: Row) -> list[Mark]:
    """The badges of a row."""
    found = [Mark(badge.label, f"{row.name} {badge.text}", badge.doubts_answer) for badge in row.badges]
    if row.incomplete:
        found.append(Mark(f"{row.seeds} seeds", "incomplete: not every planned seed has finished"))
    if row.mixed_versions:
        found.append(Mark("mixed versions", row.mixed_versions))
    return found


def build_overview(board: Leaderboard) -> Overview:
    """Methods by their mean rank; those without one after them, by their mean place within the settings they are in."""
    metric, ranks = board.primary.name, mean_ranks(board)
    mean = {(one.label, one.grouping): one.rank for one in ranks.rows} if ranks else {}
    places: dict[tuple[str, str], dict[str, OverviewCell]] = {}
    key = _best_first(board.primary)
    for setting in board.settings:
        rows = sorted((row for row in board.rows if row.setting == setting and metric in row.metrics), key=key)
        for place, row in enumerate(rows):
            goodness = 1 - place / max(1, len(rows) - 1)
            cell = OverviewCell(row_id(row), row.metrics[metric].mean, row.rank_text, goodness)
            places.setdefault((row.label, row.grouping), {})[setting] = cell

    def order(name: tuple[str, str]) -> tuple[float, int, float]:
        cells = places[name]
        rank = mean[name].mean if name in mean else math.inf
        return rank, -len(cells), -sum(one.goodness for one in cells.values()) / len(cells)

    return Overview(
        board.settings,
        tuple(
            OverviewLine(*name, mean.get(name), tuple(places[name].get(setting) for setting in board.settings))
            for name in sorted(places, key=order)
        ),
        ranks,
    )
