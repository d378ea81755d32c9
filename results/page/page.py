"""The page of the report: one self-contained file with its styles, plots, pictures and scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.core.record import MetricInfo
from results.leaderboard import format as text
from results.leaderboard import summary
from results.leaderboard.coverage import Coverage, coverage, table_coverage
from results.leaderboard.efficiency import build_efficiency
from results.leaderboard.rows import Row
from results.leaderboard.sweeps import build_sweeps
from results.leaderboard.table import Leaderboard
from results.page.attention import build_attention
from results.page.gallery import build_gallery
from results.page.plots.all import all_plots
from results.page.provenance import build_provenance
from results.statistics.intervals import Difference, Estimate

_TEMPLATES = Path(__file__).parent / "templates"
# Run after the page has loaded; theme.js runs before it is drawn.
_PAGE_SCRIPTS = ("table.js", "links.js")


@dataclass(frozen=True)
class Section:
    """A section of the page, ``templates/sections/{id}.html.j2``, and its title in the navigation."""

    id: str
    title: str


@dataclass(frozen=True)
class SettingTables:
    """The leaderboard of one setting, the rows excluded from ranking, and the differences from the reference."""

    name: str
    rows: list[Row]
    apart: list[Row]
    covered: Coverage
    apart_covered: Coverage
    differences_covered: Coverage

    @property
    def compared(self) -> list[Row]:
        """The rows with a difference from the reference."""
        return [row for row in self.rows if row.differences]

    @property
    def noted(self) -> list[Row]:
        """The rows with notes."""
        return [row for row in (*self.rows, *self.apart) if row.notes]


@dataclass(frozen=True)
class SearchLine:
    """One learning rate of one row's search."""

    row: Row
    rate: float | None
    validation: Estimate | None  # perplexity; also None for a rate declared as tried before
    seeds: str
    chosen: bool
    outcome: str


def html(board: Leaderboard) -> str:
    """Render the whole page. All text from records and captions is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["text"] = text
    metrics, settings = board.ranking_metrics, board.settings
    gallery, attention = build_gallery(board), build_attention(board)
    sweeps, efficiency = build_sweeps(board), build_efficiency(board)
    plots = all_plots(board, sweeps, efficiency)
    environment.globals.update(
        board=board,
        run=board.run,
        finished=sum(record.status == "finished" for record in board.run.records.values()),
        metrics=metrics,
        headline=summary.headline(board),
        caveats=summary.caveats(board),
        rank_rule=summary.RANK_RULE,
        labels=list(dict.fromkeys(trial.label for trial in board.run.plan.trials)),
        tables=[_tables(board, setting) for setting in settings],
        several_settings=len(settings) > 1,
        deltas_covered=_differences_covered((delta.differences for delta in board.deltas), metrics),
        search=search_lines(board),
        no_search=_no_search(board),
        provenance=build_provenance(board),
        plots=plots,
        sweeps=sweeps,
        efficiency=efficiency,
        attention=attention,
        gallery=gallery,
        style=_own("style.css"),
        theme_script=_own("theme.js"),
        page_script=Markup("\n").join(_own(name) for name in _PAGE_SCRIPTS),
    )
    shown = {
        "contexts": board.deltas,
        "parameters": plots["parameters"],
        "curves": plots["curves"],
        "input": plots["input"],
        "sweeps": sweeps or plots["options"],
        "efficiency": efficiency.settings,
        "attention": attention.samples or attention.unreadable,
        "samples": gallery.samples or gallery.unreadable,
        "unfinished": (*board.failed, *board.missing, *board.run.broken, *board.run.foreign, *board.unreadable),
    }
    sections = [Section(name, title) for name, title in _SECTIONS.items() if shown.get(name, True)]
    return environment.get_template("report.html.j2").render(sections=sections)


_SECTIONS = {
    "leaderboard": "Leaderboard",
    "contexts": "Agnostic → specific",
    "sweeps": "Budgets and options",
    "parameters": "Parameters",
    "efficiency": "Efficiency",
    "curves": "Curves",
    "input": "Wrong input",
    "cost": "Cost",
    "search": "Learning rates",
    "attention": "Attention",
    "samples": "Samples",
    "unfinished": "Not finished",
    "provenance": "Provenance",
}


def _own(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 -- a file of this package


def _tables(board: Leaderboard, setting: str) -> SettingTables:
    rows, apart = board.of(setting), board.apart(setting)
    return SettingTables(
        setting,
        rows,
        apart,
        table_coverage(board, rows),
        table_coverage(board, apart),
        _differences_covered((row.differences for row in rows), board.ranking_metrics),
    )


def _differences_covered(families: Iterable[Mapping[str, Difference]], metrics: list[MetricInfo]) -> Coverage:
    found = list(families)
    return coverage({info.name: [family.get(info.name) for family in found] for info in metrics})


def search_lines(board: Leaderboard) -> list[SearchLine]:
    """Every learning rate of every row, those declared as tried before last; empty if no row had a choice."""
    if not any(len(row.candidates) > 1 or _declared(row) for row in board.rows):
        return []
    statuses = {one.trial.trial_id: one.status.replace("_", " ") for one in (*board.failed, *board.missing)}
    return [line for row in board.rows for line in _row_lines(row, statuses)]


def _row_lines(row: Row, statuses: Mapping[str, str]) -> list[SearchLine]:
    several = len(row.candidates) > 1
    lines = []
    for candidate in row.candidates:
        unfinished = Counter(statuses[trial.trial_id] for trial in candidate.trials if trial.trial_id in statuses)
        outcome = ", ".join(f"{count} {status}" for status, count in unfinished.items())
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


def _no_search(board: Leaderboard) -> str:
    rates = sorted({trial.learning_rate for trial in board.run.plan.trials if trial.learning_rate is not None})
    if not rates:
        return "The plan has no learning rates."
    values = f"{rates[0]:g}" if len(rates) == 1 else f"from {rates[0]:g} to {rates[-1]:g}"
    return f"No search: every row has one learning rate, {values}, and none is declared as tried before."
