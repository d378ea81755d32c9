"""One row or trial compared with another: the paired differences, and a sentence on each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from harness.core.errors import UserError, did_you_mean
from harness.core.record import MetricInfo, PlannedTrial, Run
from results.leaderboard.families import families_of
from results.leaderboard.format import change, number, verdict, verdict_text
from results.leaderboard.matched import Pairs, pairs
from results.leaderboard.rows import WRONG, Row, Search, candidates_of, choose, make_row
from results.leaderboard.table import build_leaderboard
from results.statistics.intervals import Difference
from results.statistics.resample import Resampled, examples_of, score_on_test


@dataclass(frozen=True)
class Side:
    """One of the two sides of a comparison: its name, and its trials as a row of the leaderboard."""

    name: str
    row: Row


@dataclass(frozen=True)
class _Named:
    """What a name refers to: one trial, or all trials of a row (at first in every setting)."""

    name: str
    trials: Sequence[PlannedTrial]
    by_id: bool


@dataclass(frozen=True)
class Comparison:
    """``one`` less ``other``; p-values are corrected over the pairs of rows of their setting, for each metric."""

    one: Side
    other: Side
    metrics: tuple[MetricInfo, ...]  # those shown, the primary one first
    differences: dict[str, Difference]  # by metric name; empty if the two are not comparable
    pairs: Pairs  # the trials compared
    notes: tuple[str, ...]  # seeds left out, or why nothing is compared
    corrected: int  # over how many pairs of rows p-values are corrected

    @property
    def rule(self) -> str:
        """A sentence on the p-values; empty where nothing is tested."""
        if all(found.p_value is None for found in self.differences.values()):
            return ""
        family = f"Holm-corrected over the {self.corrected} pairs of rows" if self.corrected > 1 else "one pair"
        return f"p: paired by seed and, where covered, by test example; {family}, for each metric."

    def means(self, metric: str) -> tuple[float, float]:
        """The means of both sides over the compared seeds."""
        scores = [(score_on_test(one, metric), score_on_test(other, metric)) for one, other in self.pairs]
        both = [(a, b) for a, b in scores if a is not None and b is not None]
        return statistics.fmean(a for a, _ in both), statistics.fmean(b for _, b in both)

    @property
    def refusal(self) -> str:
        """A sentence on why nothing is compared; empty if something is."""
        if self.differences:
            return ""
        start = f"not compared with {self.other.row.name}: "
        reason = "; ".join(note.removeprefix(start) for note in self.notes) or "they have no metric in common"
        return f"{self.one.name} and {self.other.name} are not comparable: {reason}."

    def sentence(self, info: MetricInfo) -> str:
        """A sentence on what the difference in one metric shows."""
        one, other, found = self.one.name, self.other.name, self.differences[info.name]
        kind = verdict(found)
        if not kind:
            return f"{info.label}: one seed gives no interval, so neither is shown to be better."
        if found.verdict == "equivalent":
            return f"{info.label}: {one} and {other} tie: they are equal within the margin."
        if found.verdict == "unresolved":
            return f"{info.label}: {one} and {other} are {verdict_text(found)}."
        size = change(found) if found.null == 1 else number(abs(found.mean))
        return (
            f"{info.label}: {one} is {kind} than {other}, {size}."
            if found.null == 1
            else (f"{info.label}: {one} is {kind} than {other} by {size}.")
        )


def compare(run: Run, one: str, other: str, setting: str | None = None, metric: str | None = None) -> Comparison:
    """Compare two rows, or two trials, on the seeds in which they were trained and scored in the same way.

    Args:
        run: the run that has their records.
        one: the name of a row in the leaderboard or a unique part of it, ignoring case; or a trial id.
        other: what it is compared with, in the same form.
        setting: which of several settings; a unique part of its name suffices.
        metric: show only this one.

    Raises:
        UserError: a name is unknown or ambiguous, or there are several settings to choose from.
    """
    shown = _shown(run, metric)
    trials = _of_setting(run.plan.trials, setting)
    sides = _in_one_setting(_named(one, trials), _named(other, trials))
    searches = [_search(side, by, run) for side, by in (sides, sides[::-1])]
    first, second = (
        Side(side.name, make_row(search, run.plan.reference_method))
        for side, search in zip(sides, searches, strict=True)
    )
    matched, notes = _pairs(first, second)
    found, corrected = _differences(run, first, second, shown) if matched else (_Found({}, ()), 1)
    if found.differences and found.unreadable:
        count = f"{len(found.unreadable)} files of per-example scores could not be read"
        notes += (f"{count}: {found.unreadable[0]}",)
    metrics = tuple(info for info in shown if info.name in found.differences)
    return Comparison(first, second, metrics, found.differences, matched, notes, corrected)


@dataclass(frozen=True)
class _Found:
    """Differences by metric, and the files of per-example scores that could not be read."""

    differences: dict[str, Difference]
    unreadable: tuple[str, ...]


def _differences(run: Run, first: Side, second: Side, shown: Sequence[MetricInfo]) -> tuple[_Found, int]:
    """The differences, and over how many pairs of rows each is corrected.

    Two ranked rows are compared as on the leaderboard, where all rows of their setting inform the variance; two trials,
    or rows that are excluded from ranking, on their own.
    """
    trials = tuple(trial for trial in run.plan.trials if trial.setting == first.row.setting)
    board = build_leaderboard(replace(run, plan=run.plan.model_copy(update={"trials": trials})))
    ranked = {row.name: row for row in board.of(first.row.setting)}
    rows = [ranked.get(side.row.name) for side in (first, second) if side.name == side.row.name]
    if len(rows) == 2 and rows[0] is not None and rows[1] is not None:
        both = {info.name: board.compare(rows[0], rows[1], info.name) for info in shown}
        scored = sum(board.primary.name in row.metrics for row in ranked.values())
        own = tuple(record.trial_id for side in (first, second) for record in side.row.finished)
        unreadable = tuple(message for message in board.unreadable if message.startswith(own))
        return _Found(_present(both), unreadable), scored * (scored - 1) // 2
    finished = [*first.row.finished, *second.row.finished]
    resampled = Resampled(finished, shown, examples_of(run, finished, shown))
    one, other = (
        replace(side.row, label=f"{letter} {side.row.label}") for letter, side in (("A", first), ("B", second))
    )
    families, _ = families_of([one, other], shown, run.plan.equivalence_margin, resampled)
    alone = {info.name: families.difference(one, other, info.name) for info in shown}
    return _Found(_present(alone), tuple(resampled.unreadable)), 1


def _present(differences: Mapping[str, Difference | None]) -> dict[str, Difference]:
    return {name: found for name, found in differences.items() if found is not None}


def _shown(run: Run, metric: str | None) -> tuple[MetricInfo, ...]:
    names = {info.name: info for info in run.plan.metrics}
    if metric is None:
        metrics = [
            info for info in run.plan.metrics if info.name != WRONG
        ]  # neither high nor low values are good in themselves
        return tuple(sorted(metrics, key=lambda info: info.name != run.plan.primary_metric))
    if metric not in names:
        raise UserError(f"--metric: {metric!r} is not a metric of this run; {did_you_mean(metric, names)}")
    return (names[metric],)


def _of_setting(trials: Sequence[PlannedTrial], setting: str | None) -> Sequence[PlannedTrial]:
    if setting is None:
        return trials
    names = dict.fromkeys(trial.setting for trial in trials)
    found = _matching(setting, names)
    if not found:
        raise UserError(f"--setting: unknown setting {setting!r}; {did_you_mean(setting, names)}")
    if len(found) > 1:
        raise UserError(f"--setting: {setting!r} is ambiguous: {_quoted(found)}; write more of it")
    return [trial for trial in trials if trial.setting == found[0]]


def _matching(text: str, names: Iterable[str]) -> list[str]:
    """The name that equals the text, ignoring case; otherwise all names that contain it."""
    wanted = text.casefold().strip()
    exact = [name for name in names if name.casefold() == wanted]
    return exact or [name for name in names if wanted in name.casefold()]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _row_name(trial: PlannedTrial) -> str:
    return f"{trial.label} {trial.grouping}".rstrip()


def _named(text: str, trials: Sequence[PlannedTrial]) -> _Named:
    """The trial with this id, or the trials of all rows with this name."""
    for trial in trials:
        if trial.trial_id == text:
            return _Named(text, [trial], by_id=True)
    names = dict.fromkeys(map(_row_name, trials))
    found = _matching(text, names)
    if not found:
        raise UserError(f"{text!r} is neither a row of the leaderboard nor a trial id; {did_you_mean(text, names)}")
    if len(found) > 1:
        raise UserError(f"{text!r} is ambiguous: {_quoted(found)}; write more of the name")
    return _Named(found[0], [trial for trial in trials if _row_name(trial) == found[0]], by_id=False)


def _in_one_setting(one: _Named, other: _Named) -> tuple[_Named, _Named]:
    """Both, restricted to the one setting that they share."""
    settings = [dict.fromkeys(trial.setting for trial in side.trials) for side in (one, other)]
    shared = [setting for setting in settings[0] if setting in settings[1]]
    pair = f"{one.name!r} and {other.name!r}"
    if len(shared) > 1:
        raise UserError(f"{pair} are in {len(shared)} settings; choose one with --setting: {_quoted(shared)}")
    if not shared:
        found = " and ".join(map(_quoted, settings))
        raise UserError(f"{pair} share no setting (found: {found}): more than the method differs between them")
    first, second = (
        replace(side, trials=[trial for trial in side.trials if trial.setting == shared[0]]) for side in (one, other)
    )
    if {trial.trial_id for trial in first.trials} & {trial.trial_id for trial in second.trials}:
        raise UserError(f"{pair} have trials in common; name two rows, or two trials")
    return first, second


def _search(side: _Named, other: _Named, run: Run) -> Search:
    """All learning rates of the row that is named or that the trial belongs to; chosen: the best one, or that trial.

    A row that is compared with a single trial contributes only its trial of the same seed.
    """
    key = (_row_name(side.trials[0]), side.trials[0].setting)
    candidates = candidates_of([t for t in run.plan.trials if (_row_name(t), t.setting) == key], run)
    if side.by_id:
        return Search(candidates, candidates_of(side.trials, run)[0])
    best = choose(candidates)
    if other.by_id:
        same_seed = [trial for trial in best.trials if trial.seed == other.trials[0].seed]
        best = candidates_of(same_seed, run)[0] if same_seed else replace(best, trials=(), finished=())
    return Search(candidates, best)


def _pairs(one: Side, other: Side) -> tuple[Pairs, tuple[str, ...]]:
    for side in (one, other):
        if not side.row.finished:
            return [], (f"{side.name} has no finished trial to compare",)
    seeds = [{record.seed for record in side.row.finished} for side in (one, other)]
    if not seeds[0] & seeds[1]:
        found = " and ".join(", ".join(map(str, sorted(own))) for own in seeds)
        return [], (f"they have no seed in common ({found})",)
    return pairs(one.row, other.row)
