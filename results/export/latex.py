"""The leaderboard as LaTeX: a booktabs table for each setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.core.record import MetricInfo
from results.export.columns import Column, all_columns
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
        "÷": r"$\div$",
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


def latex(board: Leaderboard, columns: Sequence[str] = ()) -> str:
    """A table for each setting: ranked rows first, then those excluded from ranking, with the reasons.

    Args:
        board: the leaderboard.
        columns: names of columns (``results.export.columns``), in their order in the table.
    """
    plan = board.run.plan
    tables = [_table(setting, number, board, columns) for number, setting in enumerate(board.settings, start=1)]
    lines = [
        f"% {' '.join(plan.experiment.split())}: written by `harness report` from {len(board.run.records)} records.",
        r"% Needs \usepackage{booktabs}, and \usepackage[T1]{fontenc} for quotation marks in names.",
        "% Every number, with its seeds, standard errors and trial ids, is in leaderboard.json in the same folder.",
    ]
    return "\n".join([*lines, *(line for table in tables for line in ("", *table))]) + "\n"


def _table(setting: str, number: int, board: Leaderboard, names: Sequence[str]) -> list[str]:
    ranked, apart = board.of(setting), board.apart(setting)
    rows = [*ranked, *apart]
    cover, known = table_coverage(board, rows), all_columns(board, rows)
    chosen = [known[name] for name in names or _default(board) if name in known]
    best = {info.name: _best(ranked, info) for info in board.ranking_metrics}
    columns = "".join("l" if one.is_text else "r" for one in chosen)
    body = [_row(row, chosen, best) for row in ranked]
    if apart:
        body += [r"\midrule"] * bool(body) + [_row(row, chosen, {}) for row in apart]
    reasons = [f"{row.name} is not ranked: {'; '.join(row.apart)}." for row in apart]
    return [
        r"\begin{table}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{_caption(setting, board, cover, chosen)}}}",
        rf"\label{{tab:leaderboard-{number}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _cells([escape(one.head) for one in chosen]),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *[rf"\par\smallskip\footnotesize {escape(reason)}" for reason in reasons],
        r"\end{table}",
    ]


def _default(board: Leaderboard) -> list[str]:
    scores = [info.name for info in board.ranking_metrics]
    return ["rank", "method", "learning_rate", *scores, "difference", "trainable", "step_time", "memory", "seeds"]


def _caption(setting: str, board: Leaderboard, cover: Coverage, columns: Sequence[Column]) -> str:
    """What the columns of the table are: sentences on columns that it does not have are left out."""
    title = f"{board.run.plan.experiment}: {setting}" if setting else board.run.plan.experiment
    names = {one.name for one in columns}
    sentences = [f"{title}."]
    if any(one.metric for one in columns):
        sentences += ["Test split, mean over seeds [interval]; the best mean of each column is bold.", cover.sentence]
    if any(name.endswith("difference") for name in names):
        sentences.append(f"Compared with {board.reference_name} in pairs, p after Holm's correction.")
    if names & {"step_time", "memory", "memory_ratio", "examples_per_s", "tokens_per_s", "energy"}:
        sentences.append("Speed and memory of training: medians, each method alone on its device.")
    if "rank" in names:
        sentences.append("Ranks are ranges where differences are not significant.")
    return escape(" ".join(sentences))


def _best(rows: Sequence[Row], info: MetricInfo) -> float | None:
    means = [row.metrics[info.name].mean for row in rows if info.name in row.metrics]
    if not means:
        return None
    return max(means) if info.higher_is_better else min(means)


def _row(row: Row, columns: Sequence[Column], best: Mapping[str, float | None]) -> str:
    shown = []
    for one in columns:
        cell = escape(one.read(row))
        found = row.metrics.get(one.metric) if one.metric else None
        if found is not None and found.mean == best.get(str(one.metric)):
            mean, _, interval = cell.partition(" ")
            cell = rf"\textbf{{{mean}}} {interval}".rstrip()
        shown.append(cell)
    return _cells(shown)


def _cells(cells: Sequence[str]) -> str:
    return rf"{' & '.join(cells)} \\"
