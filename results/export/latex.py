"""The leaderboard as LaTeX: a booktabs table for each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.core.record import MetricInfo
from results.export.text import cell_text, difference_text, rate_text, shows_rates
from results.leaderboard import format as text
from results.leaderboard.coverage import Coverage, table_coverage
from results.leaderboard.table import Leaderboard, Row

_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "%": r"\%",
        "#": r"\#",
        "_": r"\_",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "−": "$-$",
        "–": "--",
        "×": r"$\times$",
        "Δ": r"$\Delta$",
        "≤": r"$\leq$",
        "≥": r"$\geq$",
        "→": r"$\rightarrow$",
        "†": r"$\dagger$",
    }
)


def escape(plain: str) -> str:
    """Escape text so that LaTeX prints it literally, on one line."""
    return " ".join(plain.split()).translate(_ESCAPES)


def latex(board: Leaderboard) -> str:
    """A table for each setting: ranked rows first, then those excluded from ranking, with the reasons."""
    plan = board.run.plan
    tables = [_table(setting, number, board) for number, setting in enumerate(board.settings, start=1)]
    lines = [
        f"% {' '.join(plan.experiment.split())}: written by `harness report` from {len(board.run.records)} records.",
        r"% Needs \usepackage{booktabs}, and \usepackage[T1]{fontenc} for quotation marks in names.",
        "% Every number, with its seeds, standard errors and trial ids, is in leaderboard.json in the same folder.",
    ]
    return "\n".join([*lines, *(line for table in tables for line in ("", *table))]) + "\n"


def _table(setting: str, number: int, board: Leaderboard) -> list[str]:
    ranked, apart = board.of(setting), board.apart(setting)
    rows = [*ranked, *apart]
    metrics = [info for info in board.ranking_metrics if any(info.name in row.metrics for row in rows)]
    rates, cover = shows_rates(rows), table_coverage(board, rows)
    heads = ["Rank", "Method", *(["Learning rate"] if rates else [])]
    heads += [info.label + cover.head(info.name) for info in metrics]
    heads += [f"Δ {board.primary.label}{cover.head('difference')}", "Trainable", "Seeds"]
    columns = "rl" + "r" * (len(heads) - 2)
    best = {info.name: _best(ranked, info) for info in metrics}
    body = [_row(row, best, board, rates, cover) for row in ranked]
    if apart:
        body += [r"\midrule"] * bool(body) + [_row(row, dict.fromkeys(best), board, rates, cover) for row in apart]
    reasons = [f"{row.name} is not ranked: {'; '.join(row.apart)}." for row in apart]
    return [
        r"\begin{table}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{_caption(setting, board, cover)}}}",
        rf"\label{{tab:leaderboard-{number}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _cells([escape(head) for head in heads]),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *[rf"\par\smallskip\footnotesize {escape(reason)}" for reason in reasons],
        r"\end{table}",
    ]


def _caption(setting: str, board: Leaderboard, cover: Coverage) -> str:
    title = f"{board.run.plan.experiment}: {setting}" if setting else board.run.plan.experiment
    sentences = [
        f"{title}.",
        "Test split, mean over seeds [interval]; the best mean of each column is bold.",
        cover.sentence,
        f"Δ: paired difference from {board.reference_name}, p after Holm's correction.",
        "Ranks are ranges where differences are not significant.",
    ]
    return escape(" ".join(sentences))


def _best(rows: Sequence[Row], info: MetricInfo) -> float | None:
    means = [row.metrics[info.name].mean for row in rows if info.name in row.metrics]
    if not means:
        return None
    return max(means) if info.higher_is_better else min(means)


def _row(row: Row, best: Mapping[str, float | None], board: Leaderboard, rates: bool, cover: Coverage) -> str:
    cells = [row.rank_text or text.ABSENT, row.name, *([rate_text(row)] if rates else [])]
    shown = [escape(cell) for cell in cells]
    for metric, highest in best.items():
        found = row.metrics.get(metric)
        mean, _, interval = escape(cell_text(found, metric, cover)).partition(" ")
        if found is not None and found.mean == highest:
            mean = rf"\textbf{{{mean}}}"
        shown.append(f"{mean} {interval}".rstrip())
    trainable = text.count(row.parameters.trainable if row.parameters else None)
    rest = [difference_text(row, board.primary.name, cover), trainable, row.seeds]
    return _cells([*shown, *(escape(cell) for cell in rest)])


def _cells(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"
