"""The leaderboard as files for people and programs."""

from __future__ import annotations

from pathlib import Path

from harness.files import write_atomically
from results.export_latex import latex
from results.export_text import markdown, ranking_metrics, table_csv
from results.export_trials import write_trials
from results.published import publish
from results.table import Leaderboard

__all__ = ["markdown", "ranking_metrics", "table_csv", "write_exports"]


def write_exports(board: Leaderboard, folder: Path) -> tuple[Path, ...]:
    """Write leaderboard.md, .csv, .tex and .json, and trials.parquet; returns their paths in this order.

    The same records give the same bytes. Rows that may not be compared are in every file, marked, and never ranked.
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
