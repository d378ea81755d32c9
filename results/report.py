"""The report of one run or of several: index.html and the leaderboard as files for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.files import write_atomically
from results.export import write_exports
from results.join import read_runs
from results.page import html
from results.table import build_leaderboard


@dataclass(frozen=True)
class ReportPaths:
    """The files written."""

    html: Path
    exports: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        """The page first."""
        return (self.html, *self.exports)


def write_report(folders: Sequence[Path], output: Path | None = None) -> ReportPaths:
    """Write the report of one run folder, or of several as one leaderboard. The same records give the same bytes.

    Args:
        folders: run folders.
        output: where the files go; by default ``report/`` in the run folder, where there is one.

    Raises:
        UserError: a folder holds no run, its plan is broken, or several are given without an output folder; the
            message names the file.
    """
    if output is None and len(folders) > 1:
        raise UserError(f"a report of {len(folders)} run folders lies in none of them: name a folder for it (--output)")
    board = build_leaderboard(read_runs(folders))
    folder = folders[0] / "report" if output is None else output
    page = folder / "index.html"
    write_atomically(page, html(board))
    return ReportPaths(page, write_exports(board, folder))
