"""What the numbers show and do not show, in sentences."""

from __future__ import annotations

from results.format import estimate_text, verdict
from results.stats import t_quantile
from results.table import Leaderboard, Row

RANK_RULE = (
    "Ranked by the mean over seeds. A method is ahead of another only when their 95 % intervals do not overlap; "
    "otherwise they tie and share a range of ranks. A row with one seed has no interval and ties with all."
)
_SETTINGS_IN_WORDS = 4  # more are left to their tables


def headline(board: Leaderboard) -> list[str]:
    """For each setting, one sentence on the ranks and one on the comparison with the reference."""
    if not any(row.finished for row in board.rows):
        return ["No trial has finished: there is nothing to compare yet."]
    several = len(board.settings) > 1
    sentences = []
    for setting in board.settings[:_SETTINGS_IN_WORDS]:
        start = f"{setting}: " if several else ""
        sentences += [f"{start}{_leader(board, setting)}", f"{start}{_reference(board, setting)}"]
    left = len(board.settings) - _SETTINGS_IN_WORDS
    return sentences + ([f"{left} more settings: see their tables."] if left > 0 else [])


def _leader(board: Leaderboard, setting: str) -> str:
    label, metric = board.primary.label, board.primary.name
    ranked = [(row, row.rank) for row in board.of(setting) if row.rank]
    if not ranked:
        return f"Nothing is ranked: no finished trial has a test {label} that may be compared."
    best = ranked[0][0]
    mean = f"{best.name} has the best mean test {label}, {estimate_text(best.metrics[metric])}"
    if len(ranked) == 1:
        return f"{mean}; no other row is ranked."
    if best.metrics[metric].low is None:
        return f"{mean}, from a single seed: without an interval it is not shown to be ahead of any other."
    tied = [row for row, (first, _) in ranked[1:] if first == 1]
    behind = [row for row, (first, _) in ranked if first > 1]
    if not tied:
        return f"{mean}, and its interval lies clear of all {len(behind)} others."
    if not behind:
        return f"{mean}, but all {len(ranked)} rows tie: none is shown to be ahead."
    return f"{mean}, and ties for the first rank with {_names(tied)}. Shown to be behind: {_names(behind)}."


def _names(rows: list[Row]) -> str:
    names = [row.name for row in rows]
    if len(names) > 4:
        names[3:] = [f"{len(names) - 3} others"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _reference(board: Leaderboard, setting: str) -> str:
    rows = board.of(setting)
    reference = next((row for row in rows if row.is_reference), None)
    compared = [row.differences[board.primary.name] for row in rows if board.primary.name in row.differences]
    if reference is None or not compared:
        return f"There is no comparison with {board.run.plan.reference_method!r} on the same data."
    verdicts = [verdict(difference, board.primary.higher_is_better) for difference in compared]
    against = f"Against {reference.name} on the same data, paired by seed,"
    if not any(verdicts):
        return f"{against} there is one seed: no difference has an interval."
    kinds = {"better": "better", "worse": "worse", "tie": "not told apart", "": "on one seed only"}
    counts = ", ".join(f"{verdicts.count(kind)} {words}" for kind, words in kinds.items() if kind in verdicts)
    return f"{against} the {len(compared)} other rows are: {counts}."


def caveats(board: Leaderboard) -> list[str]:
    """What a reader must know before believing the tables."""
    return [_coverage(board), *_gaps(board), *_input_use(board)]


def _coverage(board: Leaderboard) -> str:
    most = max((len(row.finished) for row in board.rows), default=0)
    if most == 1:
        return (
            "There is one finished seed per method: no intervals, so nothing is shown to be better than anything else."
        )
    cover = (
        "Intervals are 95 % t intervals over seeds (adapter initialisation, data subset, order of the examples). They "
        "do not cover the choice of test examples and are not corrected for the number of comparisons."
    )
    if 2 <= most <= 3:
        reach = f"{t_quantile(most):.1f} standard errors to either side (with 5 seeds {t_quantile(5):.1f})"
        return f"{cover} With {most} seeds they reach {reach}: a tie may only mean too few seeds."
    return cover


def _gaps(board: Leaderboard) -> list[str]:
    lines = []
    finished, planned = sum(len(row.finished) for row in board.rows), len(board.run.plan.trials)
    if finished < planned:
        gaps = {"failed": len(board.failed), "not run": len(board.missing)}
        parts = ", ".join(f"{count} {words}" for words, count in gaps.items() if count)
        lines.append(f"{finished} of {planned} trials finished ({parts}). Incomplete rows are marked.")
    unranked = [row.name for row in board.rows if row.finished and row.rank is None]
    if unranked:
        lines.append(f"Not ranked, for the reasons in the notes: {', '.join(unranked)}.")
    if board.run.broken:
        lines.append(f"{len(board.run.broken)} record file(s) could not be read; they are named below.")
    if board.run.foreign:
        lines.append(f"{len(board.run.foreign)} record(s) that the plan does not name are left out.")
    return lines


def _input_use(board: Leaderboard) -> list[str]:
    tested = [(row, row.input_use) for row in board.rows if row.input_use]
    unproven = [row for row, use in tested if not (use.excludes(1) and use.mean > 1)]
    if not unproven:
        return []
    return [
        f"{len(unproven)} of {len(tested)} rows are not shown to use their input ({_names(unproven)}): with another "
        "example's input their perplexity is not clearly higher."
    ]
