"""The page of the report: one self-contained file with its styles, plots, pictures and scripts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.core.record import MetricInfo
from results.leaderboard import format as text
from results.leaderboard import summary
from results.leaderboard.coverage import Coverage, coverage
from results.leaderboard.efficiency import build_efficiency
from results.leaderboard.predicted import build_predicted
from results.leaderboard.sweeps import build_sweeps
from results.leaderboard.table import Leaderboard
from results.page.answer import first_card
from results.page.attention import build_attention
from results.page.board import BoardTable, build_overview, build_tables, chooser, marks_of
from results.page.columns import row_id
from results.page.embedded import embedded
from results.page.gallery import build_gallery
from results.page.main_effects import build_effects
from results.page.plots.all import all_plots
from results.page.plots.style import looks_of
from results.page.provenance import build_provenance
from results.page.search import no_search, search_lines
from results.statistics.intervals import Difference

_TEMPLATES = Path(__file__).parent / "templates"
_VENDOR = Path(__file__).parent / "vendor"
# Run after the page has loaded; theme.js runs before it is drawn.
_PAGE_SCRIPTS = ("table.js", "columns.js", "links.js", "drawer.js", "plot.js")
_LIBRARIES = ("d3", "plot")  # of the interactive plots, in this order: see vendor/README.md
DOWNLOADS = {
    "leaderboard.csv": "one line per row",
    "leaderboard.md": "for a README",
    "leaderboard.tex": "for a paper",
    "leaderboard.json": "everything",
    "trials.parquet": "one line per trial",
}


@dataclass(frozen=True)
class Section:
    """A section of the page, ``templates/sections/{id}.html.j2``: its title, and a line on what is in it."""

    id: str
    title: str
    gist: str
    open: bool = False


_SECTIONS = (
    Section("settings", "Settings", "the leaderboard of each", True),
    Section("effects", "Main effects", "what each axis of the grid changes with all else equal"),
    Section("rules", "Rules and caveats", "how ranks are made, what the intervals cover, what to know before trusting"),
    Section("samples", "Samples", "what the methods write, on the same examples"),
    Section("contexts", "Agnostic → specific", "the effect of one adapter group per context"),
    Section("sweeps", "Budgets and options", "curves over the budget, and where full fine-tuning gets ahead"),
    Section("curves", "Curves", "validation perplexity by epoch"),
    Section("input", "Wrong input", "does the model use its input?"),
    Section("efficiency", "Efficiency", "Pareto fronts, and what a point costs"),
    Section("predicted", "Predicted and actual", "what the plan said that trials would cost, and what they cost"),
    Section("search", "Learning rates", "how each row's was chosen"),
    Section("attention", "Attention", "what the captions attend to"),
    Section("unfinished", "Not finished", "failed, pruned, missing and unreadable trials", True),
    Section("provenance", "Provenance", "software, devices, and every trial"),
)


def html(board: Leaderboard, folder: Path) -> str:
    """Render the whole page. All text from records and captions is escaped.

    Args:
        board: what it shows.
        folder: where the page will be, for its links to the files of trials.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    gallery, attention = build_gallery(board), build_attention(board)
    sweeps, efficiency = build_sweeps(board), build_efficiency(board)
    predicted = build_predicted(board.run)
    plots = all_plots(board, sweeps, efficiency)
    tables = build_tables(board)
    columns = chooser(tables)
    card, effects = first_card(board), build_effects(board)
    plotted = any(board.primary.name in row.metrics for row in board.rows)
    shown = {
        "settings": len(tables) > 1,
        "effects": effects,
        "contexts": board.deltas,
        "curves": plots["curves"],
        "input": plots["input"],
        "sweeps": sweeps or plots["options"],
        "efficiency": efficiency.settings,
        "predicted": predicted.lines or predicted.problems,
        "attention": attention.samples or attention.unreadable,
        "samples": gallery.samples or gallery.unreadable,
        "unfinished": _unfinished(board),
    }
    values: dict[str, Any] = {
        "text": text,
        "row_id": row_id,
        "badges": marks_of,
        "board": board,
        "run": board.run,
        "finished": sum(record.status == "finished" for record in board.run.records.values()),
        "metrics": board.ranking_metrics,
        "card": card,
        "caveats": summary.caveats(board),
        "rank_rule": summary.RANK_RULE,
        "labels": list(dict.fromkeys(trial.label for trial in board.run.plan.trials)),
        "tables": tables,
        "chooser": columns,
        "hidden": [one.css for group in columns.values() for one in group if not one.shown],
        "several_settings": len(tables) > 1,
        "overview": build_overview(board) if len(tables) > 1 else None,
        "downloads": DOWNLOADS,
        "deltas_covered": _differences_covered((delta.differences for delta in board.deltas), board.ranking_metrics),
        "search": search_lines(board),
        "no_search": no_search(board),
        "provenance": build_provenance(board),
        "plots": plots,
        "plot_data": plotted,
        # The first stands beside the leaderboard where there are no scripts.
        "other_fronts": replace(plots["parameters"], plots=plots["parameters"].plots[1:]),
        "effects": effects,
        "sweeps": sweeps,
        "efficiency": efficiency,
        "predicted": predicted,
        "attention": attention,
        "gallery": gallery,
        "data": embedded(board, _shown(tables), gallery, looks_of(board), folder),
        "libraries": [library(name) for name in _LIBRARIES] if plotted else [],
        "style": _own("style.css"),
        "theme_script": _own("theme.js"),
        "page_script": Markup("\n").join(_own(name) for name in _PAGE_SCRIPTS),
    }
    environment.globals.update(values)
    sections = [section for section in _SECTIONS if shown.get(section.id, True)]
    return environment.get_template("report.html.j2").render(sections=sections)


def _unfinished(board: Leaderboard) -> tuple[object, ...]:
    """What the section of trials that did not finish is about."""
    run = board.run
    return (*board.failed, *board.missing, *board.pruned, *run.broken, *run.foreign, *board.unreadable)


def _shown(tables: Sequence[BoardTable]) -> list[tuple[Any, Any]]:
    return [(table.rows, table.columns) for table in tables]


@cache
def library(name: str) -> Markup:
    """A vendored library with its licence as a comment before it, as the licence asks."""
    licence = (_VENDOR / f"LICENSE-{name}").read_text(encoding="utf-8").strip()
    code = (_VENDOR / f"{name}.min.js").read_text(encoding="utf-8")
    if re.search(r"</script", code, re.IGNORECASE):
        raise ValueError(f"vendor/{name}.min.js: ends a script inside of it, so it cannot stand in a page")
    return Markup(f"/*\n{licence}\n*/\n{code}")  # noqa: S704 -- files of this package


def _own(name: str) -> Markup:
    return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704 -- a file of this package


def _differences_covered(families: Iterable[Mapping[str, Difference]], metrics: list[MetricInfo]) -> Coverage:
    found = list(families)
    return coverage({info.name: [family.get(info.name) for family in found] for info in metrics})
