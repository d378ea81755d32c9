"""The leaderboard as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from results.leaderboard import format as text
from results.leaderboard import summary
from results.leaderboard.coverage import Coverage, table_coverage
from results.leaderboard.table import Leaderboard, Row
from results.statistics.intervals import Difference, Estimate

Cells = dict[str, str | int | float | None]


def shows_rates(rows: Iterable[Row]) -> bool:
    """Whether any of the rows has a learning rate."""
    return any(row.chosen.learning_rate is not None for row in rows)


def rate_text(row: Row) -> str:
    """The chosen learning rate and the number tried: ``0.001 (of 3)``."""
    rate = row.chosen.learning_rate
    return text.ABSENT if rate is None else f"{rate:g} (of {row.effort})"


def cell_text(found: Estimate | None, column: str, cover: Coverage, show_sign: bool = False) -> str:
    """Mean and interval, with a dagger if the interval covers less than others in its column."""
    shown = text.estimate_text(found, show_sign)
    return f"{shown}{cover.cell(column, found)}" if found else shown


def difference_text(row: Row, metric: str, cover: Coverage) -> str:
    """The difference from the reference with its interval and adjusted p; ``reference`` for the reference itself."""
    if row.is_reference:
        return "reference"
    found = row.differences.get(metric)
    return " ".join(filter(None, [cell_text(found, "difference", cover, True), text.p_text(found) if found else ""]))


def markdown(board: Leaderboard) -> str:
    """The leaderboard as GitHub tables, with the headline, the caveats and the failures."""
    lines = [f"# {_cell(board.run.plan.experiment)}", ""]
    lines += [
        f"- {_cell(sentence)}" for sentence in (*summary.headline(board), *summary.caveats(board), summary.RANK_RULE)
    ]
    for setting in board.settings:
        if setting:
            lines += ["", f"## {_cell(setting)}"]
        if rows := board.of(setting):
            lines += ["", *_markdown_table(rows, board)]
            notes = [f"- {_cell(row.name)}: {_cell(note)}" for row in rows for note in row.notes]
            lines += ["", *notes] if notes else []
        if apart := board.apart(setting):
            lines += ["", "Excluded from ranking, because not trained, scored or searched for like the others:", ""]
            lines += _markdown_table(apart, board)
            lines += ["", *(f"- {_cell(row.name)}: {_cell('; '.join((*row.apart, *row.notes)))}" for row in apart)]
    unfinished = (*board.failed, *board.missing)
    if unfinished:
        lines += ["", "## Not finished", ""]
        lines += [
            f"- {_cell(one.trial.trial_id)}: {one.status}. {_cell(one.reason or '')}".rstrip() for one in unfinished
        ]
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[Row], board: Leaderboard) -> list[str]:
    rates, primary, metrics = shows_rates(rows), board.primary, board.ranking_metrics
    cover = table_coverage(board, rows)
    heads = ["Rank", "Method", "Seeds", *(["Learning rate"] if rates else [])]
    heads += [info.label + cover.head(info.name) for info in metrics]
    heads += [f"Δ {primary.label} from {board.reference_name}{cover.head('difference')}"]
    heads += [f"Wrong/right input{cover.head('input_use')}", "Trainable"]
    lines = [_line(heads), _line(["---"] * 3 + ["---:"] * (len(heads) - 3))]
    for row in rows:
        cells = [row.rank_text or text.ABSENT, row.name, f"{row.seeds} (incomplete)" if row.incomplete else row.seeds]
        cells += [rate_text(row)] if rates else []
        cells += [cell_text(row.metrics.get(info.name), info.name, cover) for info in metrics]
        cells += [difference_text(row, primary.name, cover), cell_text(row.input_use, "input_use", cover)]
        lines.append(_line([*cells, text.count(row.parameters.trainable if row.parameters else None)]))
    return [*lines, "", cover.sentence]


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
        cells |= _p_values(f"{info.name}_difference", difference)
    cells |= _columns("wrong_to_right_input_perplexity", row.input_use)
    for count in ("trainable", "adapter", "projector", "language_model", "encoder", "total"):
        cells[f"{count}_parameters"] = getattr(row.parameters, count) if row.parameters else None
    cells |= _columns("peak_growth_bytes", row.peak_bytes)
    cells |= _columns("examples_per_s", row.examples_per_s)
    cells |= _columns("tokens_per_s", row.tokens_per_s)
    cells |= _columns("train_time_s", row.train_time_s)
    cells |= _columns("wall_time_s", row.wall_time_s)
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


def _p_values(name: str, difference: Difference | None) -> Cells:
    return {
        f"{name}_p_value": difference.p_value if difference else None,
        f"{name}_p_adjusted": difference.p_adjusted if difference else None,
    }
