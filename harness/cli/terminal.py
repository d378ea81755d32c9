"""Terminal output: comparisons and diffs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from results.leaderboard.compare import Comparison, Side
from results.leaderboard.diff import RULE, BoardDiff, Change
from results.leaderboard.format import ABSENT, estimate_text, number, p_text, rank_text

_REASON_LENGTH = 240  # characters of the reason why a row is excluded from ranking: three lines


def _table(title: str | None = None) -> Table:
    return Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title=title, title_justify="left"
    )


def comparison_view(comparison: Comparison) -> Group:
    """The paired difference in each metric with its interval, and a sentence that interprets it."""
    one, other = comparison.one, comparison.other
    head = [Text(f"{letter} = {_side(side)}", style="bold") for letter, side in (("A", one), ("B", other))]
    if comparison.refusal:
        return Group(*head, Text(comparison.refusal))
    table = _table()
    table.add_column("metric")
    for heading in ("A", "B", "A − B [95 % interval]"):
        table.add_column(heading, justify="right")
    table.add_column("covers")
    for heading in ("p", "seeds"):
        table.add_column(heading, justify="right")
    for info in comparison.metrics:
        found = comparison.differences[info.name]
        cells = [
            info.label,
            *map(number, comparison.means(info.name)),
            estimate_text(found, True),
            found.covers or ABSENT,
        ]
        table.add_row(*cells, p_text(found).removeprefix("p = ").removeprefix("p ") or ABSENT, str(found.n))
    lines = [comparison.sentence(info) for info in comparison.metrics]
    lines += [comparison.rule] if comparison.rule else []
    return Group(*head, table, *(Text(line) for line in (*lines, *comparison.notes)))


def _side(side: Side) -> str:
    rate = side.row.chosen.learning_rate
    tried = f", best of {side.row.effort}" if side.row.effort > 1 and side.name == side.row.name else ""
    return side.name + ("" if rate is None else f" (learning rate {rate:g}{tried})")


def diff_view(found: BoardDiff) -> Group:
    """Old and new mean of each row, the change and its significance; rows of one leaderboard only are so called."""
    direction = "higher" if found.metric.higher_is_better else "lower"
    parts: list[RenderableType] = [Text(f"{found.metric.label}, {direction} is better; rows old → new", style="italic")]
    for setting in dict.fromkeys(change.setting for change in found.changes):
        parts += [Text(f"\n{setting}", style="bold")] if setting else []
        parts.append(_diff_table([change for change in found.changes if change.setting == setting]))
    lines = [
        ": ".join(filter(None, (change.setting, change.name, "; ".join(change.notes))))
        for change in found.changes
        if change.notes
    ]
    tested = any(change.difference for change in found.changes)
    return Group(*parts, *(Text(line) for line in lines), *([Text(RULE, style="dim")] if tested else []))


def _diff_table(changes: Sequence[Change]) -> Table:
    table = _table()
    table.add_column("method")
    for heading in ("old", "new"):
        table.add_column(heading, justify="right", no_wrap=True)
    tested = any(change.difference for change in changes)
    if tested:
        table.add_column("change [95 % interval]", justify="right", no_wrap=True)
    for heading in ("verdict", "rank"):
        table.add_column(heading)
    for change in changes:
        cells = [
            change.name,
            *(ABSENT if mean is None else number(mean) for mean in (change.old_mean, change.new_mean)),
        ]
        if tested:
            cells.append(estimate_text(change.difference, True) if change.difference else "")
        ranks = dict.fromkeys(rank_text(rank) or ABSENT for rank in (change.old_rank, change.new_rank))
        table.add_row(*(Text(cell) for cell in (*cells, _verdict(change), " → ".join(ranks))))
    return table


def _verdict(change: Change) -> str:
    if change.verdict == "not comparable":
        return f"not comparable: {change.reason}"
    if change.verdict == "untested":
        return "one seed: not tested"
    if change.difference is None:
        return change.verdict
    return f"{change.verdict} ({p_text(change.difference)}, {'paired' if change.paired else 'unpaired'})"
