"""The report of one or several runs: index.html, and the leaderboard as Markdown, CSV, LaTeX, JSON and Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.core.errors import UserError
from harness.core.files import remove_abandoned, write_atomically
from harness.core.inside import check_no_links
from results.export.latex import latex
from results.export.text import markdown, table_csv
from results.export.trials import write_trials
from results.leaderboard.join import read_runs
from results.leaderboard.published import publish
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.page.page import html


@dataclass(frozen=True)
class ReportPaths:
    """The files written, and the leaderboard that they show."""

    html: Path
    exports: tuple[Path, ...]
    board: Leaderboard = field(repr=False)

    @property
    def all(self) -> tuple[Path, ...]:
        """The page first."""
        return (self.html, *self.exports)


def write_report(folders: Sequence[Path], output: Path | None = None) -> ReportPaths:
    """Write the report of one run folder, or of several as one leaderboard. The same records give the same bytes.

    Args:
        folders: run folders.
        output: folder for the files; by default ``report/`` in the run folder.

    Raises:
        UserError: a folder holds no run, its plan is invalid, or several folders are given without an output
            folder; the message names the file.
    """
    if output is None and len(folders) > 1:
        raise UserError(f"a report of {len(folders)} run folders needs an output folder: name one (--output)")
    if output is None:
        check_no_links(folders[0])
    board = build_leaderboard(read_runs(folders))
    folder = folders[0] / "report" if output is None else output
    remove_abandoned(folder)
    page = folder / "index.html"
    write_atomically(page, html(board, folder))
    return ReportPaths(page, write_exports(board, folder), board)


def write_exports(board: Leaderboard, folder: Path) -> tuple[Path, ...]:
    """Write leaderboard.md, .csv, .tex and .json, and trials.parquet; returns their paths in this order.

    The same records give the same bytes. Rows that are excluded from ranking are in every file, marked as such.
    """
    texts = {
        "leaderboard.md": markdown(board),
        "leaderboard.csv": table_csv(board),
        "leaderboard.tex": latex(board),
        "leaderboard.json": publish(board).model_dump_json(indent=1) + "\n",
    }
    for name, content in texts.items():
        write_atomically(folder / name, content)
    write_trials(board.run, folder / "trials.parquet")
    return (*(folder / name for name in texts), folder / "trials.parquet")
