"""The columns of the leaderboard: what each shows, how it sorts, and whether it is shown before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

from harness.core.durations import duration
from harness.core.naming import method_options
from harness.core.profile import Measured, ProfileEntry
from harness.core.record import MetricInfo
from results.leaderboard import format as text
from results.leaderboard.coverage import Coverage
from results.leaderboard.efficiency import memory_bytes
from results.leaderboard.efficiency import trainable as trainable_parameters
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard
from results.statistics.intervals import Difference, Estimate

Best = Literal["low", "high", ""]  # which end is the better one; "" where neither is
_MEMORY = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
_MOST_OPTIONS = 12  # columns of adapter options; a comparison of many methods has more than a table can hold


@dataclass(frozen=True)
class Cell:
    """One cell: its text, the value by which it sorts (None: last), what stands beneath, and more on demand."""

    text: str
    value: float | str | None = None
    small: str = ""
    kind: str = ""  # a class of the style sheet: better, worse, tie, open
    hint: str = ""  # more of it, where the pointer rests and in the drawer

    def html(self, css: str) -> Markup:
        """The cell of a table. In Python, because a macro takes five times as long and a grid has 60,000 cells.

        Args:
            css: class of its column.
        """
        value = f"{self.value:.9g}" if isinstance(self.value, int | float) else self.value
        return Markup(  # noqa: S704 -- all that is put in is escaped
            f'<td class="c-{escape(css)}"'
            + (f' data-value="{escape(value)}"' if value is not None else "")
            + (f' title="{escape(self.hint)}"' if self.hint else "")
            + f">{escape(self.text)}"
            + (f"<small{_class(self.kind)}>{escape(self.small)}</small>" if self.small else "")
            + "</td>\n"
        )


def _class(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""


@dataclass(frozen=True)
class Column:
    """A column; ``key`` names it in links, ``group`` in the chooser."""

    key: str
    title: str
    group: str
    read: Callable[[Row], Cell]
    best: Best = ""
    shown: bool = False
    words: bool = False  # sorted as text, not as numbers

    @property
    def css(self) -> str:
        """The key as a class name."""
        return re.sub(r"[^A-Za-z0-9_-]", "_", self.key)

    @property
    def note(self) -> str:
        """Which end is better, in words; of costs everyone knows."""
        if self.group != "Scores":
            return ""
        return {"low": "lower is better", "high": "higher is better", "": ""}[self.best]

    @property
    def first(self) -> str:
        """The direction of the first click: best first; text from A, other numbers from the smallest."""
        return "descending" if self.best == "high" else "ascending"


NOTHING = Cell(text.ABSENT)
REFERENCE = Cell("reference", 0.0)
_EMPTY = (NOTHING, REFERENCE)  # a column of these alone is left out


def columns_of(board: Leaderboard, rows: Sequence[Row], covered: Coverage) -> list[Column]:
    """The columns of a table of rows, without rank and method, which every table has.

    Columns in which no row has a value are left out.
    """
    found = [*_scores(board, covered), *_price(board), *_other_scores(board, covered), *_costs(), *_options(rows)]
    return [one for one in found if any(one.read(row) not in _EMPTY for row in rows)]


def short_count(value: float) -> str:
    """``9.3k``, ``80.7k``, ``1.24M``: three digits, for a column that is read at a glance."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:g}"


def _best(info: MetricInfo) -> Best:
    return "high" if info.higher_is_better else "low"


def _scores(board: Leaderboard, covered: Coverage) -> list[Column]:
    info = board.primary
    return [
        Column(info.name, f"{info.label}{covered.head(info.name)}", "Scores", _score(info, covered), _best(info), True),
        Column(
            "difference",
            f"Against {board.reference_name}{covered.head('difference')}",
            "Scores",
            lambda row: _difference(row, info, covered, "difference"),
            _best(info),
            True,
        ),
    ]


def _score(info: MetricInfo, covered: Coverage) -> Callable[[Row], Cell]:
    return lambda row: _estimate(row.metrics.get(info.name), row, covered, info.name)


def _estimate(one: Estimate | None, row: Row, covered: Coverage, key: str, unit: str = "") -> Cell:
    if one is None:
        return NOTHING
    seeds = f"{one.n} of {len(row.finished)} seeds" if one.n < len(row.finished) else ""
    bounds = f"{text.interval(one)}{covered.cell(key, one)}" if one.low is not None else ""
    return Cell(f"{text.number(one.mean)}{unit}", one.mean, " ".join(filter(None, [bounds, seeds])))


def _difference(row: Row, info: MetricInfo, covered: Coverage, key: str) -> Cell:
    one: Difference | None = row.differences.get(info.name)
    if one is None:
        return REFERENCE if row.is_reference and not row.apart else NOTHING
    kind = {"equivalent": "tie", "unresolved": "open"}.get(one.verdict, one.verdict) if text.verdict(one) else ""
    small = f"{text.verdict(one) or 'one seed'}{covered.cell(key, one)}"
    return Cell(text.change(one), one.mean, small, kind, _more(one))


def _more(one: Difference) -> str:
    """The interval, p, both verdicts, and what would separate the two."""
    examples = text.examples_text(one)
    parts = [
        text.change_interval(one),
        text.p_text(one),
        text.verdict_text(one) and f"new seeds: {text.verdict_text(one)}",
    ]
    return "; ".join(filter(None, [*parts, examples and f"these trained models: {examples}"]))


def _price(board: Leaderboard) -> list[Column]:
    """What a row costs: the columns that are shown at first. Speed and memory as profiled, or else as trained."""
    full = {row.setting: row for row in board.rows if row.is_reference and not row.apart}

    def of_full(row: Row, read: Callable[[Row], float | None]) -> str:
        own, other = read(row), full.get(row.setting)
        whole = read(other) if other is not None and other is not row else None
        return f"{text.share(own / whole)} of full" if own is not None and whole else ""

    def trainable(row: Row) -> Cell:
        own = trainable_parameters(row)
        return NOTHING if own is None else Cell(short_count(own), own, of_full(row, trainable_parameters))

    def memory(row: Row) -> Cell:
        own = memory_bytes(row)
        return NOTHING if own is None else Cell(text.size_text(own), own, of_full(row, memory_bytes))

    def seconds(row: Row) -> Cell:
        one = row.train_time_s
        return NOTHING if one is None else Cell(duration(one.mean), one.mean)

    profiled = board.run.profile is not None
    return [
        Column("trainable", "Trainable", "Cost", trainable, "low", True),
        *(_profiled(board) if profiled else ()),
        Column("memory", "Memory of the model", "Cost", memory, "low", not profiled),
        Column("train_time", "Training time", "Cost", seconds, "low", not profiled),
    ]


def _profiled(board: Leaderboard) -> list[Column]:
    """Step time and memory as ``harness profile`` measured them, apart from training."""

    def entry_of(row: Row) -> ProfileEntry | None:
        return board.run.profile.entry_of(row_id(row)) if board.run.profile else None

    def step_time(row: Row) -> Cell:
        entry = entry_of(row)
        one = entry.step_time_ratio if entry else None
        return NOTHING if one is None else Cell(text.ratio(one.median), one.median, _bounds(one, text.ratio))

    def peak(row: Row) -> Cell:
        entry = entry_of(row)
        if entry is None or entry.peak_memory_bytes is None:
            return NOTHING
        ratio = entry.memory_ratio
        return Cell(
            text.size_text(entry.peak_memory_bytes.median),
            entry.peak_memory_bytes.median,
            f"{text.share(ratio.median)} of {board.reference_name}" if ratio and not entry.is_reference else "",
        )

    def measured(name: str) -> Callable[[Row], Cell]:
        def read(row: Row) -> Cell:
            one: Measured | None = getattr(entry_of(row), name, None)
            return NOTHING if one is None else Cell(text.number(one.median), one.median, _bounds(one))

        return read

    return [
        Column("step_time", "Step time", "Cost", step_time, "low", True),
        Column("peak_memory", "Peak memory", "Cost", peak, "low", True),
        Column("profile.examples_per_s", "Examples/s, profiled", "Cost", measured("examples_per_s"), "high"),
        Column("profile.tokens_per_s", "Tokens/s, profiled", "Cost", measured("tokens_per_s"), "high"),
        Column("profile.energy", "Energy of a step (J)", "Cost", measured("energy_j_per_step"), "low"),
    ]


def _bounds(one: Measured, show: Callable[[float], str] = text.number) -> str:
    return "" if one.low is None or one.high is None else f"[{show(one.low)}, {show(one.high)}]"


def _other_scores(board: Leaderboard, covered: Coverage) -> list[Column]:
    found = []
    for info in board.ranking_metrics[1:]:
        title = f"{info.label}{covered.head(info.name)}"
        found.append(Column(info.name, title, "Scores", _score(info, covered), _best(info)))
        found.append(
            Column(
                f"difference.{info.name}",
                f"{info.label} against {board.reference_name}",
                "Scores",
                lambda row, info=info: _difference(row, info, covered, f"difference.{info.name}"),  # type: ignore[misc]
                _best(info),
            )
        )
    use = f"Uses the input{covered.head('input_use')}"
    found.append(
        Column("input_use", use, "Scores", lambda row: _estimate(row.input_use, row, covered, "input_use", "×"), "high")
    )
    return found


def _costs() -> list[Column]:
    def count(kind: str) -> Callable[[Row], Cell]:
        return lambda row: NOTHING if row.parameters is None else _count(getattr(row.parameters, kind))

    def size(kind: str) -> Callable[[Row], Cell]:
        def read(row: Row) -> Cell:
            memory = row.finished[0].memory if row.finished else None
            value = None if memory is None else getattr(memory, kind)
            return NOTHING if value is None else Cell(text.size_text(value), value)

        return read

    def mean(name: str, show: Callable[[float], str]) -> Callable[[Row], Cell]:
        def read(row: Row) -> Cell:
            one: Estimate | None = getattr(row, name)
            return NOTHING if one is None else Cell(show(one.mean), one.mean)

        return read

    titles = ("Weights", "Gradients", "Optimizer state", "Activations")
    return [
        Column("examples_per_s", "Examples/s", "Cost", mean("examples_per_s", text.number), "high"),
        Column("tokens_per_s", "Tokens/s", "Cost", mean("tokens_per_s", text.number), "high"),
        Column("wall_time", "Wall time", "Cost", mean("wall_time_s", duration), "low"),
        *(Column(kind, title, "Memory", size(kind), "low") for kind, title in zip(_MEMORY, titles, strict=True)),
        Column("peak", "Peak of the process", "Memory", mean("peak_bytes", text.size_text), "low"),
        *(
            Column(f"parameters.{kind}", title, "Parameters", count(kind))
            for kind, title in (("adapter", "In adapters"), ("projector", "In the projector"), ("total", "In total"))
        ),
        Column("seeds", "Seeds", "Trials", lambda row: Cell(row.seeds, len(row.finished))),
        Column("learning_rate", "Learning rate", "Trials", _learning_rate),
    ]


def _count(value: int | None) -> Cell:
    return NOTHING if value is None else Cell(text.count(value), value)


def _learning_rate(row: Row) -> Cell:
    rate = row.chosen.learning_rate
    return NOTHING if rate is None else Cell(f"{rate:g}", rate, f"of {row.effort}" if row.effort > 1 else "")


def row_id(row: Row) -> str:
    """What a link to a row ends with: the id of its first trial."""
    return row.trials[0].trial_id


def options_of(row: Row) -> dict[str, Any]:
    """The options of a row's adapter, as its records resolved them; empty without a finished trial."""
    return method_options(row.finished[0].spec.get("adapter", {})) if row.finished else {}


def _options(rows: Sequence[Row]) -> list[Column]:
    """A column for every adapter option that differs between rows which have it."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in options_of(row).items():
            values.setdefault(key, set()).add(_plain(value))
    varying = [key for key, found in values.items() if len(found) > 1][:_MOST_OPTIONS]

    def reader(key: str) -> Callable[[Row], Cell]:
        def read(row: Row) -> Cell:
            value = options_of(row).get(key)
            if value is None:
                return NOTHING
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return Cell(_plain(value), value if number else _plain(value))

        return read

    return [Column(f"option.{key}", key, "Options", reader(key), words=not _numeric(rows, key)) for key in varying]


def _numeric(rows: Sequence[Row], key: str) -> bool:
    found = [options_of(row).get(key) for row in rows]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in found if one is not None)


def _plain(value: Any) -> str:
    """An option as text: ``q, v`` for a list."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
