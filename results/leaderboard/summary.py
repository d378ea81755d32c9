"""Sentences on what the numbers show and do not show."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

from harness.core.record import TrialRecord
from results.leaderboard.badges import doubts
from results.leaderboard.coverage import DAGGER, PERCENT
from results.leaderboard.format import estimate_text, examples_text, verdict
from results.leaderboard.table import Leaderboard, Row

RANK_RULE = (
    "Ordered by the mean over seeds, of perplexities the geometric one. A rank is a range: behind all rows shown to be "
    "ahead, before all shown to be behind. A row is shown to be ahead if the difference, paired by seed and test "
    "example, is significant at 5 % after Holm's correction over all pairs of rows of the table; how much seeds vary "
    "is learnt from all its rows. The interval of a difference is at the level of its step in that correction, so it "
    "excludes equality exactly where the verdict is better or worse. Two rows tie only if they are shown to be equal "
    "within the margin of the experiment; else they are not separated yet. All this is for models trained with new "
    "seeds; a verdict on these trained models covers the choice of test examples alone."
)
_SETTINGS_IN_WORDS = 4  # for further settings see their tables
_NAMED = 4  # rows named in a sentence
_SEED_REASON = re.compile(r"^seeds? [0-9, ]+ do(?:es)? not match .*?: ")


def headline(board: Leaderboard) -> list[str]:
    """For each setting, a sentence on the ranks and one on the comparison with the reference."""
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
        return f"Nothing is ranked: no finished trial has a test {label} that is comparable."
    best = ranked[0][0]
    mean = f"{best.name} has the best mean test {label}, {estimate_text(best.metrics[metric])}"
    if doubt := doubts(best):
        mean += f", although it {doubt}"
    if len(ranked) == 1:
        return f"{mean}; no other row is ranked."
    if best.metrics[metric].low is None:
        return f"{mean}, from a single seed: without an interval it is not shown to be ahead of any other."
    level = [row for row, (first, _) in ranked[1:] if first == 1]
    behind = [row for row, (first, _) in ranked if first > 1]
    if not level:
        others = "the only other row" if len(behind) == 1 else f"all {len(behind)} others"
        return f"{mean}, and is shown to be ahead of {others}."
    words = [f"{mean}, but {_not_ahead(board, best, level)}"]
    words += [f"Shown to be behind: {_names(behind)}"] if behind else []
    return f"{'. '.join(words)}."


def _not_ahead(board: Leaderboard, best: Row, level: list[Row]) -> str:
    """``ties with A and is not separated yet from B and C (2 more seeds might)``."""
    found = [(row, board.compare(best, row)) for row in level]
    equal = [row for row, difference in found if difference is not None and difference.verdict == "equivalent"]
    left = [(row, difference) for row, difference in found if row not in equal]
    parts = [f"ties with {_names(equal)}"] if equal else []
    if left:
        needed = [difference.more_seeds for _, difference in left if difference is not None]
        several = [seeds for seeds in needed if seeds is not None]
        more = max(several, default=0) if len(several) == len(left) else 0
        might = f" ({more} more seed{'s' * (more > 1)} might)" if more else ""
        parts.append(f"is not separated yet from {_names([row for row, _ in left])}{might}")
    return " and ".join(parts)


def _names(rows: list[Row]) -> str:
    names = list(dict.fromkeys(row.name for row in rows))
    if len(names) > 4:
        names[3:] = [f"{len(names) - 3} others"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _reference(board: Leaderboard, setting: str) -> str:
    rows = board.of(setting)
    reference = next((row for row in rows if row.is_reference), None)
    compared = [row.differences[board.primary.name] for row in rows if board.primary.name in row.differences]
    if reference is None or not compared:
        return f"There is no comparison with {board.run.plan.reference_method!r} on the same data."
    verdicts = [verdict(difference) for difference in compared]
    on_examples = [examples_text(difference) for difference in compared]
    against = f"Against {reference.name} on the same data"
    trained = f"for these trained models, on new test examples: {_counts(on_examples)}" if any(on_examples) else ""
    if not any(verdicts):
        alone = f"{against} there is one seed: no difference can be tested for new seeds"
        return f"{alone}; {trained}." if trained else f"{alone}."
    pairs = f"paired by seed and corrected for all pairs of {len(compared) + 1} rows"
    return f"{against}, {pairs}, the other rows are: {_counts(verdicts)}{'; ' * bool(trained)}{trained}."


def _counts(verdicts: list[str]) -> str:
    """``2 better, 1 worse, 3 not separated yet``."""
    kinds = {
        "better": "better",
        "worse": "worse",
        "tie": "equal within the margin",
        "not separated yet": "not separated yet",
        "": "on one seed only",
    }
    return ", ".join(f"{verdicts.count(kind)} {words}" for kind, words in kinds.items() if kind in verdicts)


def caveats(board: Leaderboard) -> list[str]:
    """What a reader must know before trusting the tables."""
    return [
        *_intervals(board),
        *unseparated(board),
        *_gaps(board),
        *_apart(board),
        *_conditions(board),
        *_files(board),
        *board.run.notes,
        *_input_use(board),
    ]


def _scored(board: Leaderboard) -> list[Row]:
    return [row for row in board.rows if board.primary.name in row.metrics]


def _intervals(board: Leaderboard) -> list[str]:
    found = [row.metrics[board.primary.name] for row in _scored(board)]
    if not found:
        return []
    shown = [estimate for estimate in found if estimate.covers]
    if not shown:
        return [
            "There is one finished seed per row: no intervals, so nothing is shown to be better than anything else."
        ]
    seeds = "the seeds (adapter initialisation, data subset, order of the examples), by Student's t"
    start = f"Intervals are {PERCENT} and cover {seeds}"
    both = [estimate for estimate in shown if estimate.example_se is not None]
    if not both:
        return [
            f"{start}. They do not cover the choice of test examples: no per-example scores reproduce the test score."
        ]
    examples = sorted({estimate.examples for estimate in both if estimate.examples})
    count = f"{examples[0]:,}" if len(examples) == 1 else f"{examples[0]:,} to {examples[-1]:,}"
    texts = sum(one.texts for one in next(iter(_scored(board)[0].finished)).answers.values())
    drawn = f"{count} test examples"
    if texts > examples[-1]:  # some share a picture, a conversation or a speaker
        drawn = f"test examples, by what they share ({count} clusters of the {texts:,} examples)"
    words = f"{start}, and the choice of the {drawn}, by resampling them"
    alone = len(shown) - len(both)
    return [f"{words}; those of {alone} of {len(shown)} rows cover seeds alone ({DAGGER})." if alone else f"{words}."]


def unseparated(board: Leaderboard) -> list[str]:
    """How many pairs of rows are not separated, and with how many seeds."""
    name = board.primary.name
    families = [one.of[name] for one in board.families.values() if name in one.of]
    pairs = sum(one.pairs for one in families)
    left, equal = (
        (sum(counts) for counts in zip(*(one.undecided for one in families), strict=True)) if pairs else (0, 0)
    )
    most = max((row.metrics[name].n for row in _scored(board)), default=0)
    if not left or most < 2:
        return []
    margin = board.run.plan.equivalence_margin
    within = f"{100 * margin:g} %" if board.primary.scale == "log" else f"{margin:g}"
    shown = f"{equal:,} {'is' if equal == 1 else 'are'}" if equal else "none is"
    return [
        f"With {most} seeds {left:,} of {_count(pairs, 'pair')} of rows {'is' if left == 1 else 'are'} not separated: "
        f"this is no sign that they are equal ({shown} shown to be equal within {within})."
    ]


def _gaps(board: Leaderboard) -> list[str]:
    lines = []
    planned = len(board.run.plan.trials)
    gaps = Counter(one.status.replace("_", " ") for one in (*board.failed, *board.missing))
    if gaps:
        parts = ", ".join(f"{count} {status}" for status, count in gaps.items())
        lines.append(f"{planned - gaps.total()} of {planned} trials finished ({parts}). Incomplete rows are marked.")
    if board.pruned:
        counts = Counter(one.trial.trial_id for one in board.pruned).total()
        lines.append(
            f"Halving pruned {counts} of {planned} trials on validation; their epochs count as effort of their rows."
        )
    unscored = [row for row in board.rows if row.finished and row.rank is None and not row.apart]
    if unscored:
        lines.append(f"Not ranked, because the test {board.primary.label} is missing: {_names(unscored)}.")
    return lines


def _apart(board: Leaderboard) -> list[str]:
    rows = [row for row in board.rows if row.apart]
    if not rows:
        return []
    by_reason: dict[str, list[Row]] = {}
    for row in rows:
        for reason in dict.fromkeys(_SEED_REASON.sub("", reason) for reason in row.apart):
            by_reason.setdefault(reason, []).append(row)
    parts = "; ".join(f"{_names(alike)}: {reason}" for reason, alike in by_reason.items())
    verb, pronoun = ("is", "it is") if len(rows) == 1 else ("are", "they are")
    start = f"{_count(len(rows), 'row')} {verb} excluded from ranking, because {pronoun} not comparable with the others"
    return [f"{start}. {parts}."]


def _conditions(board: Leaderboard) -> list[str]:
    """Differences between the trials shown that no fingerprint covers: device, code and package versions."""
    records = [record for row in board.rows for record in row.finished]
    lines = []
    devices = _distinct(records, lambda record: record.device)
    if len(devices) > 1:
        lines.append(
            f"The trials ran on {len(devices)} kinds of device ({'; '.join(devices)}): compare memory, speed and time "
            "only on the same device."
        )
    differing = []
    revisions = _distinct(records, lambda record: record.git_revision)
    if len(revisions) > 1:
        differing.append(f"{len(revisions)} revisions of the code")
    for package in dict.fromkeys(package for record in records for package in record.versions):
        versions = _distinct(records, lambda record, package=package: record.versions.get(package))  # type: ignore[misc]
        if len(versions) > 1:
            differing.append(f"{package} {', '.join(versions)}")
    if differing:
        lines.append(f"The trials ran different software versions: {'; '.join(differing)}.")
    return lines


def _distinct(records: Iterable[TrialRecord], read: Callable[[TrialRecord], str | None]) -> list[str]:
    return sorted({value for value in map(read, records) if value})


def _files(board: Leaderboard) -> list[str]:
    lines = []
    if board.run.broken:
        lines.append(f"{_count(len(board.run.broken), 'record file')} could not be read; listed below.")
    if board.run.foreign:
        lines.append(f"{_count(len(board.run.foreign), 'record')} that the plan does not name left out; listed below.")
    if board.unreadable:
        lines.append(
            f"{_count(len(board.unreadable), 'file')} of per-example scores could not be read, listed below: intervals "
            "and tests of their rows cover only seeds."
        )
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _input_use(board: Leaderboard) -> list[str]:
    tested = [(row, row.input_use) for row in board.rows if row.input_use]
    unproven = [row for row, use in tested if not (use.excludes(1) and use.mean > 1)]
    if not unproven:
        return []
    verb = "is" if len(unproven) == 1 else "are"
    several = len(board.settings) > 1
    named = ", ".join(f"{row.name} at {row.setting}" if several else row.name for row in unproven[:_NAMED])
    more = f" and {len(unproven) - _NAMED} more" if len(unproven) > _NAMED else ""
    return [
        f"{len(unproven)} of {_count(len(tested), 'row')} {verb} not shown to use the input ({named}{more}): with "
        "another example's input the perplexity is not clearly higher."
    ]
