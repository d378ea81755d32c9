"""The report of a run folder: index.html (one file, no network), leaderboard.md and leaderboard.csv."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.errors import UserError
from harness.record import MetricInfo, Run, read_run, write_atomically
from results import format as text
from results import words
from results.gallery import build_gallery
from results.plots import all_plots
from results.stats import Estimate
from results.table import WRONG, Leaderboard, Row, build_leaderboard

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ReportPaths:
    """The files written."""

    html: Path
    markdown: Path
    csv: Path


def write_report(run_folder: Path) -> ReportPaths:
    """Write ``report/`` in the run folder. The same records give the same bytes.

    Raises:
        UserError: the folder holds no run, or its plan is broken; the message names the file.
    """
    board = build_leaderboard(_read(run_folder))
    folder = run_folder / "report"
    paths = ReportPaths(folder / "index.html", folder / "leaderboard.md", folder / "leaderboard.csv")
    write_atomically(paths.html, html(board))
    write_atomically(paths.markdown, markdown(board))
    write_atomically(paths.csv, table_csv(board))
    return paths


def _read(run_folder: Path) -> Run:
    try:
        return read_run(run_folder)
    except FileNotFoundError as error:
        raise UserError(f"{run_folder}: no plan.json here; a run folder is what `harness run` wrote") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def ranking_metrics(board: Leaderboard) -> list[MetricInfo]:
    """The metrics of the leaderboard, the primary one first; the wrong-input perplexity has a section of its own."""
    others = [info for info in board.run.plan.metrics if info is not board.primary and info.name != WRONG]
    return [board.primary, *others]


def html(board: Leaderboard) -> str:
    """The whole page. Everything from a record or a caption is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["text"] = text
    return environment.get_template("report.html.j2").render(
        board=board,
        run=board.run,
        metrics=ranking_metrics(board),
        headline=words.headline(board),
        caveats=words.caveats(board),
        rank_rule=words.RANK_RULE,
        plots=all_plots(board),
        gallery=build_gallery(board),
        versions=_versions(board.run),
        style=Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),  # noqa: S704 -- our own file
        script=Markup((_TEMPLATES / "sort.js").read_text(encoding="utf-8")),  # noqa: S704 -- our own file
    )


def _versions(run: Run) -> dict[str, str]:
    """Every version of each package that a record names: more than one where the trials differ."""
    found: dict[str, set[str]] = {}
    for record in run.records.values():
        for package, version in record.versions.items():
            found.setdefault(package, set()).add(version)
    return {package: ", ".join(sorted(versions)) for package, versions in sorted(found.items())}


def markdown(board: Leaderboard) -> str:
    """The leaderboard as GitHub tables, with the headline, the caveats and the failures."""
    lines = [f"# {_cell(board.run.plan.experiment)}", ""]
    lines += [f"- {_cell(sentence)}" for sentence in (*words.headline(board), *words.caveats(board), words.RANK_RULE)]
    metrics = ranking_metrics(board)
    heads = ["Rank", "Method", "Seeds", *(info.label for info in metrics)]
    heads += [f"Δ {board.primary.label} from {board.reference_name}", "Wrong/right input", "Trainable"]
    for setting in board.settings:
        if setting:
            lines += ["", f"## {_cell(setting)}"]
        lines += ["", _line(heads), _line(["---"] * 3 + ["---:"] * (len(heads) - 3))]
        lines += [_line(_markdown_row(row, metrics, board)) for row in board.of(setting)]
        lines += [f"- {_cell(row.name)}: {_cell(note)}" for row in board.of(setting) for note in row.notes]
    unfinished = (*board.failed, *board.missing)
    if unfinished:
        lines += ["", "## Not finished", ""]
        lines += [
            f"- {_cell(one.trial.trial_id)}: {one.status}. {_cell(one.reason or '')}".rstrip() for one in unfinished
        ]
    return "\n".join(lines) + "\n"


def _markdown_row(row: Row, metrics: list[MetricInfo], board: Leaderboard) -> list[str]:
    return [
        row.rank_text or text.ABSENT,
        row.name,
        f"{row.seeds} (incomplete)" if row.incomplete else row.seeds,
        *(text.estimate_text(row.metrics.get(info.name)) for info in metrics),
        "reference" if row.is_reference else text.estimate_text(row.differences.get(board.primary.name), True),
        text.estimate_text(row.input_use),
        text.count(row.parameters.trainable if row.parameters else None),
    ]


def _cell(value: str) -> str:
    plain = " ".join(value.split()).replace("\\", "\\\\").replace("|", "\\|")
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def table_csv(board: Leaderboard) -> str:
    """One line per row of the leaderboard; numbers unrounded, empty where absent."""
    records = [_csv_row(row, board) for row in board.rows]
    buffer = io.StringIO()
    columns = list(dict.fromkeys(column for record in records for column in record))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def _csv_row(row: Row, board: Leaderboard) -> dict[str, str | int | float | None]:
    first, last = row.rank or (None, None)
    cells: dict[str, str | int | float | None] = {
        "setting": row.setting,
        "label": row.label,
        "method": row.method,
        "grouping": row.grouping,
        "rank_first": first,
        "rank_last": last,
        "seeds_finished": len(row.finished),
        "seeds_planned": len(row.trials),
    }
    for info in board.run.plan.metrics:
        cells |= _columns(info.name, row.metrics.get(info.name))
        cells |= _columns(f"{info.name}_difference", row.differences.get(info.name))
    cells |= _columns("wrong_to_right_input_perplexity", row.input_use)
    for count in ("trainable", "adapter", "projector", "language_model", "encoder", "total"):
        cells[f"{count}_parameters"] = getattr(row.parameters, count) if row.parameters else None
    cells |= _columns("peak_growth_bytes", row.peak_bytes)
    cells |= _columns("examples_per_s", row.examples_per_s)
    cells |= _columns("tokens_per_s", row.tokens_per_s)
    cells |= _columns("wall_time_s", row.wall_time_s)
    cells["notes"] = "; ".join(row.notes)
    return cells


def _columns(name: str, estimate: Estimate | None) -> dict[str, str | int | float | None]:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_seeds": 0}
    return {
        name: estimate.mean,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
        f"{name}_seeds": estimate.n,
    }
