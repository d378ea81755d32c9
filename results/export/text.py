"""The leaderboard as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from harness.core.profile import Measured
from results.export.columns import PROFILED, all_columns
from results.leaderboard import format as text
from results.leaderboard import summary
from results.leaderboard.coverage import table_coverage
from results.leaderboard.recommend import recommend
from results.leaderboard.table import Leaderboard, Row
from results.statistics.intervals import Difference, Estimate

Cells = dict[str, str | int | float | None]


def markdown(board: Leaderboard, columns: Sequence[str] = ()) -> str:
    """The leaderboard as GitHub tables, with the headline, the caveats and the failures.

    Args:
        board: the leaderboard.
        columns: names of columns (``results.export.columns``); default: all that an article would discuss.
    """
    lines = [f"# {_cell(board.run.plan.experiment)}", "", *_recommended(board)]
    lines += [
        f"- {_cell(sentence)}" for sentence in (*summary.headline(board), *summary.caveats(board), summary.RANK_RULE)
    ]
    for setting in board.settings:
        if setting:
            lines += ["", f"## {_cell(setting)}"]
        if rows := board.of(setting):
            lines += ["", *markdown_table(board, rows, columns)]
            notes = [f"- {_cell(row.name)}: {_cell(note)}" for row in rows for note in row.notes]
            lines += ["", *notes] if notes else []
        if apart := board.apart(setting):
            lines += ["", "Excluded from ranking, because not trained, scored or searched for like the others:", ""]
            lines += markdown_table(board, apart, columns)
            lines += ["", *(f"- {_cell(row.name)}: {_cell('; '.join((*row.apart, *row.notes)))}" for row in apart)]
    unfinished = (*board.failed, *board.missing)
    if unfinished:
        lines += ["", "## Not finished", ""]
        lines += [
            f"- {_cell(one.trial.trial_id)}: {one.status}. {_cell(one.reason or '')}".rstrip() for one in unfinished
        ]
    return "\n".join(lines) + "\n"


def _recommended(board: Leaderboard) -> list[str]:
    """A paragraph for each recommendation and what is not known; nothing while nothing is ranked."""
    lines: list[str] = []
    for found in recommend(board) if any(row.rank for row in board.rows) else ():
        start = f"{found.setting}: " if found.setting else ""
        lines += [f"**Recommended:** {_cell(f'{start}{found.sentence}')}", ""]
        lines += [*(f"- {_cell(line)}" for line in found.unknown), *([""] if found.unknown else [])]
    return lines


def markdown_table(
    board: Leaderboard, rows: Sequence[Row], columns: Sequence[str] = (), brief: bool = False
) -> list[str]:
    """The lines of one table, and below it what its intervals cover.

    Args:
        board: the leaderboard.
        rows: some of its rows.
        columns: names of columns.
        brief: means without intervals.
    """
    known = all_columns(board, rows)
    chosen = [known[name] for name in columns or _default(board) if name in known]
    lines = [_line([one.head for one in chosen]), _line(["---" if one.is_text else "---:" for one in chosen])]
    lines += [_line([(one.brief if brief else one.read)(row) for one in chosen]) for row in rows]
    return lines if brief else [*lines, "", table_coverage(board, rows).sentence]


def _default(board: Leaderboard) -> list[str]:
    others = [info.name for info in board.ranking_metrics[1:]]
    first = ["rank", "method", board.primary.name, "difference", "verdict", "trainable", "step_time", "memory"]
    return [*first, *others, "input_use", "learning_rate", "seeds", "badges"]


def _cell(value: str) -> str:
    plain = " ".join(value.split()).replace("\\", "\\\\").replace("|", "\\|")
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def table_rows(board: Leaderboard) -> list[Cells]:
    """One mapping per row of the leaderboard, column → value; numbers are unrounded, missing ones None."""
    return [_cells(row, board) for row in board.rows]


def table_csv(board: Leaderboard) -> str:
    """``table_rows`` as CSV; what is missing is empty."""
    records = table_rows(board)
    buffer = io.StringIO()
    columns = list(dict.fromkeys(column for record in records for column in record))
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def _cells(row: Row, board: Leaderboard) -> Cells:
    first, last = row.rank or (None, None)
    cells: Cells = {
        "setting": row.setting,
        "label": row.label,
        "method": row.method,
        "grouping": row.grouping,
        "rank_first": first,
        "rank_last": last,
        "apart": "; ".join(row.apart),
        "learning_rate": row.chosen.learning_rate,
        "learning_rates_tried": row.effort,
        "seeds_finished": len(row.finished),
        "seeds_planned": len(row.trials),
    }
    for info in board.run.plan.metrics:
        cells |= _columns(info.name, row.metrics.get(info.name))
        difference = row.differences.get(info.name)
        cells |= _columns(f"{info.name}_difference", difference)
        cells |= _tests(f"{info.name}_difference", difference)
    cells |= _columns("wrong_to_right_input_perplexity", row.input_use)
    for count in ("trainable", "adapter", "projector", "language_model", "encoder", "total"):
        cells[f"{count}_parameters"] = getattr(row.parameters, count) if row.parameters else None
    cells |= _columns("peak_growth_bytes", row.peak_bytes)
    cells |= _columns("examples_per_s", row.examples_per_s)
    cells |= _columns("tokens_per_s", row.tokens_per_s)
    cells |= _columns("train_time_s", row.train_time_s)
    cells |= _columns("wall_time_s", row.wall_time_s)
    cells |= _profiled(row, board)
    cells["badges"] = "; ".join(badge.label for badge in row.badges)
    cells["notes"] = "; ".join(row.notes)
    return cells


def _columns(name: str, estimate: Estimate | None) -> Cells:
    if estimate is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, f"{name}_covers": None, f"{name}_seeds": 0}
    return {
        name: estimate.mean,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
        f"{name}_covers": estimate.covers,
        f"{name}_seeds": estimate.n,
    }


def _tests(name: str, difference: Difference | None) -> Cells:
    return {
        f"{name}_p_value": difference.p_value if difference else None,
        f"{name}_p_adjusted": difference.p_adjusted if difference else None,
        f"{name}_verdict": text.verdict(difference) or None,
        f"{name}_verdict_examples": text.examples_text(difference) or None,
        f"{name}_more_seeds": difference.more_seeds if difference else None,
    }


def _profiled(row: Row, board: Leaderboard) -> Cells:
    """The profile of the row's method: medians and intervals of what was measured apart from training."""
    entry = board.run.profile.entry_of(row.trials[0].trial_id) if board.run.profile else None
    cells: Cells = {}
    for name in PROFILED:
        value: Measured | None = getattr(entry, name) if entry else None
        for part, key in (("median", name), ("low", f"{name}_low"), ("high", f"{name}_high")):
            cells[f"profile_{key}"] = getattr(value, part) if value else None
    return cells
