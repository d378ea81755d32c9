"""The columns of the leaderboard's tables, in the terminal, in Markdown and in LaTeX, by the names that choose them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harness.core.errors import UserError, did_you_mean
from harness.core.profile import Measured, ProfileEntry
from harness.core.record import MetricInfo
from results.leaderboard import format as text
from results.leaderboard.coverage import Coverage, table_coverage
from results.leaderboard.table import Leaderboard, Row
from results.statistics.intervals import Difference, Estimate

Read = Callable[[Row], str]
# What a profile measures, in the order of exports.
PROFILED = ("step_time_ratio", "step_time_s", "examples_per_s", "tokens_per_s", "memory_ratio", "peak_memory_bytes",
            "energy_ratio", "energy_j_per_step")  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One column: what it is called where columns are chosen, its heading, and its cells."""

    name: str
    head: str
    read: Read  # ABSENT where a row has no value
    brief: Read  # the same without an interval
    is_text: bool = False  # aligned to the left
    metric: str | None = None  # the name of the metric whose score it is


def all_columns(board: Leaderboard, rows: Sequence[Row]) -> dict[str, Column]:
    """Every column that a table of these rows can have, by name, in the order of the tables.

    A column in which no row has a value is left out.

    Args:
        board: the leaderboard.
        rows: some of its rows, usually those of one setting.
    """
    columns = _columns(board, table_coverage(board, rows))
    return {one.name: one for one in columns if any(one.read(row) != text.ABSENT for row in rows)}


def choose_columns(board: Leaderboard, names: Sequence[str]) -> tuple[str, ...]:
    """Check names of columns as a user gives them.

    Raises:
        UserError: no table of this leaderboard can have one of these columns, or one is given twice.
    """
    known = [one.name for one in _columns(board, table_coverage(board, board.rows))]
    for name in names:
        if name not in known:
            raise UserError(f"--columns: no column {name!r}; {did_you_mean(name, known)}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--columns: {twice!r} is given twice")
    if not names:
        raise UserError(f"--columns: no column is named; allowed: {', '.join(sorted(known))}")
    return tuple(names)


def _columns(board: Leaderboard, cover: Coverage) -> Iterator[Column]:
    primary, others = board.primary, board.ranking_metrics[1:]
    yield _plain("rank", "Rank", lambda row: row.rank_text or text.ABSENT)
    yield _plain("method", "Method", lambda row: row.name, is_text=True)
    yield _score(primary, cover)
    yield _difference("difference", primary, board, cover)
    yield Column(
        "verdict", "Verdict", lambda row: _verdict(row, primary), lambda row: _word(row, primary), is_text=True
    )
    yield _count("trainable", "Trainable")
    yield _profiled("step_time", "Step time", board, lambda e: e.step_time_ratio, text.ratio)
    yield _profiled("memory", "Peak memory", board, lambda e: e.peak_memory_bytes, text.size_text)
    for info in others:
        yield _score(info, cover)
    estimate = _interval(lambda row: row.input_use, "input_use", cover)
    yield Column("input_use", f"Wrong/right input{cover.head('input_use')}", estimate, _mean(lambda r: r.input_use))
    yield _plain("learning_rate", "Learning rate", rate_text)
    yield _plain("seeds", "Seeds", lambda row: f"{row.seeds} (incomplete)" if row.incomplete else row.seeds)
    yield _plain(
        "badges", "Doubts", lambda row: "; ".join(one.label for one in row.badges) or text.ABSENT, is_text=True
    )
    for info in others:
        yield _difference(f"{info.name}_difference", info, board, cover)
    for kind in ("adapter", "projector", "total"):
        yield _count(kind, f"{kind.capitalize()} parameters")
    yield _profiled("memory_ratio", "Memory ratio", board, lambda e: e.memory_ratio, text.ratio)
    yield _profiled("examples_per_s", "Examples/s", board, lambda e: e.examples_per_s, text.number)
    yield _profiled("tokens_per_s", "Tokens/s", board, lambda e: e.tokens_per_s, text.number)
    yield _profiled("energy", "Energy ratio", board, lambda e: e.energy_ratio, text.ratio)


def rate_text(row: Row) -> str:
    """The chosen learning rate and the number tried: ``0.001 (of 3)``."""
    rate = row.chosen.learning_rate
    return text.ABSENT if rate is None else f"{rate:g} (of {row.effort})"


def _plain(name: str, head: str, read: Read, is_text: bool = False) -> Column:
    return Column(name, head, read, read, is_text)


def _count(name: str, head: str) -> Column:
    return _plain(name, head, lambda row: text.count(getattr(row.parameters, name) if row.parameters else None))


def _score(info: MetricInfo, cover: Coverage) -> Column:
    def found(row: Row) -> Estimate | None:
        return row.metrics.get(info.name)

    read = _interval(found, info.name, cover)
    return Column(info.name, info.label + cover.head(info.name), read, _mean(found), metric=info.name)


def _interval(found: Callable[[Row], Estimate | None], column: str, cover: Coverage) -> Read:
    """Mean and interval, with a dagger if the interval covers less than others in its column."""

    def read(row: Row) -> str:
        estimate = found(row)
        return text.estimate_text(estimate) + (cover.cell(column, estimate) if estimate else "")

    return read


def _mean(found: Callable[[Row], Estimate | None]) -> Read:
    def read(row: Row) -> str:
        estimate = found(row)
        if isinstance(estimate, Difference):
            return text.change(estimate)
        return text.number(estimate.mean) if estimate else text.ABSENT

    return read


def _difference(name: str, info: MetricInfo, board: Leaderboard, cover: Coverage) -> Column:
    """The difference from the reference with its interval and adjusted p; a ratio where the metric has that scale."""

    def found(row: Row) -> Difference | None:
        return row.differences.get(info.name)

    def read(row: Row) -> str:
        if row.is_reference:
            return "reference"
        difference = found(row)
        if difference is None:
            return text.ABSENT
        shown = _interval(found, "difference", cover)(row)
        return " ".join(filter(None, [shown, text.p_text(difference)]))

    def brief(row: Row) -> str:
        return "1" if row.is_reference and _is_ratio(info) else _mean(found)(row)

    sign = (
        f"{info.label} ÷ {board.reference_name}" if _is_ratio(info) else f"Δ {info.label} from {board.reference_name}"
    )
    return Column(name, sign + cover.head("difference"), read, brief)


def _is_ratio(info: MetricInfo) -> bool:
    return info.scale == "log"


def _verdict(row: Row, primary: MetricInfo) -> str:
    """Against the reference, for models trained with new seeds, and what would separate the two."""
    return _special(row) or text.verdict_text(row.differences.get(primary.name)) or text.ABSENT


def _word(row: Row, primary: MetricInfo) -> str:
    """The verdict in at most 14 characters."""
    return _special(row) or text.verdict(row.differences.get(primary.name)).removesuffix(" yet") or text.ABSENT


def _special(row: Row) -> str:
    return "reference" if row.is_reference else "not comparable" if row.apart else ""


def _profiled(
    name: str,
    head: str,
    board: Leaderboard,
    measured: Callable[[ProfileEntry], Measured | None],
    show: Callable[[float], str],
) -> Column:
    """A value of the profile: the median, and its interval."""
    profile = board.run.profile

    def found(row: Row) -> Measured | None:
        entry = profile.entry_of(row.trials[0].trial_id) if profile else None
        return measured(entry) if entry else None

    def brief(row: Row) -> str:
        value = found(row)
        return text.ABSENT if value is None else show(value.median)

    def read(row: Row) -> str:
        value = found(row)
        if value is None or value.low is None or value.high is None:
            return brief(row)
        return f"{show(value.median)} [{show(value.low)}, {show(value.high)}]"

    return Column(name, head, read, brief)
