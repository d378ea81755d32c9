"""What the scripts of the page know: each row with its trials, for the interactive plot and the drawer.

Numbers that the table shows are read from the table; here is what it does not hold: intervals, curves and links.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.core.record import PlannedTrial, TrialRecord
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard
from results.page.columns import Column, options_of, row_id
from results.page.gallery import Gallery, Sample, outputs_elsewhere
from results.page.plots.style import INK, Look

_MOST_POINTS = 100_000  # of all curves together: about a megabyte
_DIGITS = 6  # of a number: more cannot be seen in a plot
# Of a trial's folder, with what a link to it says.
FILES = {
    "record.json": "record",
    "log.txt": "log",
    "examples.parquet": "scores by example",
    "best.safetensors": "weights",
}


def embedded(
    board: Leaderboard,
    tables: Sequence[tuple[Sequence[Row], Sequence[Column]]],
    gallery: Gallery,
    looks: Mapping[str, Look],
    folder: Path,
) -> dict[str, Any]:
    """The data of the page as JSON.

    Args:
        board: the leaderboard.
        tables: for each setting its rows in the order shown, and its columns.
        gallery: of one setting; the outputs of other settings are added.
        looks: colour and marker by label.
        folder: where the page will be, for relative links to the files of trials.
    """
    points = sum(len(record.history) for row in board.rows for record in row.finished)
    curves = points <= _MOST_POINTS
    costs = [one for _, columns in tables for one in columns if one.group in ("Cost", "Memory", "Parameters")]
    rows = [
        _row(board, row, {one.key: one for one in columns if one.group != "Scores"}, looks, folder, curves)
        for shown, columns in tables
        for row in shown
    ]
    return {
        "primary": board.primary.name,
        "metrics": [
            {"key": info.name, "title": info.label, "higher": info.higher_is_better} for info in board.ranking_metrics
        ],
        "costs": list({one.key: {"key": one.key, "title": one.title} for one in costs}.values()),
        "curves": curves,
        "mlflow": board.run.plan.mlflow_uri or "",
        "files": list(FILES.items()),  # a list: the order counts
        "samples": _samples((*gallery.samples, *outputs_elsewhere(board, gallery))),
        "rows": rows,
    }


def _row(
    board: Leaderboard, row: Row, columns: Mapping[str, Column], looks: Mapping[str, Look], folder: Path, curves: bool
) -> dict[str, Any]:
    look = looks[row.label]
    read = {key: column.read(row).value for key, column in columns.items() if not column.words}
    return {
        "id": row_id(row),
        "name": row.name,
        "label": row.label,
        "setting": row.setting,
        "rank": row.rank_text,
        "apart": list(row.apart),
        "notes": list(row.notes),
        "colour": "currentColor" if look.colour == INK else look.colour,
        "marker": look.marker,
        "hollow": row.grouping == "agnostic",
        "scores": {
            name: [_short(value) for value in (one.mean, one.low, one.high)] for name, one in row.metrics.items()
        },
        "costs": {key: _short(value) for key, value in read.items() if isinstance(value, int | float)},
        "options": {key: _plain(value) for key, value in options_of(row).items()},
        "trials": [_trial(board, trial, board.run.records.get(trial.trial_id), folder, curves) for trial in row.trials],
    }


def _trial(
    board: Leaderboard, trial: PlannedTrial, record: TrialRecord | None, folder: Path, curves: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {"id": trial.trial_id, "seed": trial.seed, "status": "not run"}
    if record is None:
        return found
    own = board.run.trial_folder(trial.trial_id)
    there = _names_in(own)
    found |= {
        "status": record.status.replace("_", " "),
        "score": _short(record.metrics.get("test", {}).get(board.primary.name)),
        "epoch": record.best_epoch,
        "folder": f"{_relative(own.parent, folder)}/{own.name}",
        "files": [number for number, name in enumerate(FILES) if name in there],
    }
    if record.mlflow_run_id:
        found["mlflow"] = record.mlflow_run_id
    if curves and record.history:
        found["curve"] = [[one.epoch, _short(one.validation_perplexity)] for one in record.history]
    return found


def _names_in(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(folder)}
    except (FileNotFoundError, NotADirectoryError):
        return set()


@lru_cache(maxsize=64)  # once for each run folder, not for each of 10,000 trials
def _relative(trials: Path, folder: Path) -> str:
    return Path(os.path.relpath(trials, folder)).as_posix()


def _samples(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The outputs by row; the inputs stand in the gallery already, where other settings have the same examples."""
    return [
        {
            "id": sample.example_id,
            "reference": sample.references[0] if sample.references else "",
            "outputs": {row_id(output.row): output.text for output in sample.outputs},
        }
        for sample in samples
    ]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
