"""Which row to use: the cheapest one that is not shown to be worse than the best, with its price and what is not known.

In each setting the best row is the one with the best mean among the ranked rows that are within the limits and whose
answers are not in doubt (``badges.py``). A row is good enough if its mean is within the margin of the best, or if their
difference is not separated (``Difference.verdict``) and the interval is narrow enough to mean something: half of it is
at most a quarter of the score. Without that condition weak evidence would recommend anything. Of the rows that are good
enough the cheapest is recommended; the sentence gives the difference from the best with its interval, and ``unknown``
says what would tell more.

Over settings the cheapest row is recommended that is good enough in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, geometric_mean

from harness.core.errors import UserError, did_you_mean
from harness.core.profile import ProfileEntry
from harness.core.record import Run
from results.leaderboard.amounts import Amount, Kind, parse_amount
from results.leaderboard.badges import doubts
from results.leaderboard.efficiency import memory_bytes, trainable
from results.leaderboard.format import change, change_interval, number, ratio, share, size_text
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.statistics.intervals import Difference

_NAMED = 3  # rows named in a sentence
_IN_PERCENT = ("trainable parameters", "memory")  # "41 % of the memory"; other prices are "1.06× the …"
_WIDEST = 0.25  # of the score: half the interval of a difference that is not separated, and still good enough


@dataclass(frozen=True)
class Limits:
    """What a row may cost. A relative amount is a share of what the reference method of the setting costs."""

    max_trainable: Amount | None = None  # parameters
    max_memory: Amount | None = None  # bytes
    max_hours: Amount | None = None  # of training one trial


def limits_of(
    max_trainable: str | float | None = None,
    max_memory: str | float | None = None,
    max_hours: str | float | None = None,
    prefix: str = "",
) -> Limits:
    """Limits as people write them.

    Args:
        max_trainable: ``2M``, or ``1%`` of what the reference method trains.
        max_memory: ``24GiB`` or a number of bytes, or ``50%`` of the reference method's.
        max_hours: of training one trial; or a share.
        prefix: of the names in messages: ``--`` for command lines, where words are parted by ``-``.

    Raises:
        UserError: one is not an amount above 0.
    """

    def read(text: str | float | None, kind: Kind, name: str) -> Amount | None:
        where = f"{prefix}{name.replace('_', '-')}" if prefix else name
        return None if text is None else parse_amount(text, kind, where)

    return Limits(
        read(max_trainable, "count", "max_trainable"),
        read(max_memory, "size", "max_memory"),
        read(max_hours, "number", "max_hours"),
    )


@dataclass(frozen=True)
class Price:
    """What the recommended row costs or scores relative to the reference: 1 is equal.

    ``low`` and ``high``: the interval of the ratio, where there is one.
    """

    name: str  # "trainable parameters", "memory", "step time", or the label of the metric
    ratio: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """What to use in one setting, or over all of them (``setting`` None)."""

    setting: str | None
    name: str | None  # of the recommended row; None: nothing can be recommended, and the sentence says why
    row: Row | None  # None also over several settings
    sentence: str
    prices: tuple[Price, ...] = ()
    unknown: tuple[str, ...] = ()  # what is not known, and what would tell

    @property
    def text(self) -> str:
        """The sentence after the name of the setting, and a line for everything that is not known."""
        start = f"{self.setting}: " if self.setting else ""
        return "\n".join([f"{start}{self.sentence}", *(f"  {line}" for line in self.unknown)])


@dataclass(frozen=True)
class _Choice:
    """The rows of one setting that are good enough, cheapest first."""

    setting: str
    rows: tuple[Row, ...]
    best: Row
    kept: tuple[Row, ...]  # all that are within the limits and not in doubt, best first
    reference: Row | None
    dropped: tuple[str, ...]  # why rows that may be as good were left out


def with_metric(run: Run, metric: str) -> Run:
    """The run with another primary metric.

    Raises:
        UserError: the run has no such metric.
    """
    names = [info.name for info in run.plan.metrics]
    if metric not in names:
        raise UserError(f"--metric: {metric!r} is not a metric of this run; {did_you_mean(metric, names)}")
    return replace(run, plan=run.plan.model_copy(update={"primary_metric": metric}))


def recommend_from(
    run: Run, limits: Limits = Limits(), within: float | None = None, metric: str | None = None
) -> tuple[Recommendation, ...]:
    """``recommend`` on the leaderboard of a run, by its primary metric or another one.

    Args:
        run: one run folder, or several as one.
        limits: what a row may cost.
        within: the margin; default: that of the experiment.
        metric: the metric that decides.

    Raises:
        UserError: the metric is unknown, or a limit is relative and a setting has no reference.
    """
    board = build_leaderboard(run if metric is None else with_metric(run, metric))
    return recommend(board, limits, within)


def recommend(board: Leaderboard, limits: Limits = Limits(), within: float | None = None) -> tuple[Recommendation, ...]:
    """One recommendation for each setting in the order of the plan; with several, first the one over all of them.

    Args:
        board: the leaderboard.
        limits: what a row may cost.
        within: by how much a row may be worse than the best: relative for metrics compared by their ratio, else in
            units of the metric; default: the margin of the experiment.

    Raises:
        UserError: a limit is relative and a setting has no reference.
    """
    margin = board.run.plan.equivalence_margin if within is None else within
    choices = {setting: _choose(board, setting, limits, margin) for setting in board.settings}
    found = [
        choice if isinstance(choice, Recommendation) else _in_setting(board, choice, margin)
        for choice in choices.values()
    ]
    if len(found) == 1:
        return tuple(found)
    usable = [choice for choice in choices.values() if isinstance(choice, _Choice)]
    return (_over_settings(board, usable), *found)


def _choose(board: Leaderboard, setting: str, limits: Limits, margin: float) -> _Choice | Recommendation:
    ranked = [row for row in board.of(setting) if row.rank is not None]
    if not ranked:
        why = f"no finished trial has a comparable test {board.primary.label}"
        return Recommendation(
            setting, None, None, f"No row can be recommended: {why}.", (), _unfinished(board, setting)
        )
    reference = next((row for row in ranked if row.is_reference), None)
    dropped = {row.name: reason for row in ranked if (reason := _beyond(board, row, reference, limits))}
    dropped |= {row.name: f"it {doubt}" for row in ranked if row.name not in dropped and (doubt := doubts(row))}
    kept = [row for row in ranked if row.name not in dropped]
    reasons = tuple(f"{name} is left out: {reason}" for name, reason in dropped.items())
    if not kept:
        return Recommendation(
            setting, None, None, "No row can be recommended: each is beyond a limit or in doubt.", (), reasons
        )
    best = kept[0]
    enough = [row for row in kept if row is best or _good_enough(board, row, best, margin)]
    enough.sort(key=lambda row: (trainable(row) is None, trainable(row) or 0.0))
    return _Choice(setting, tuple(enough), best, tuple(kept), reference, reasons)


def _beyond(board: Leaderboard, row: Row, reference: Row | None, limits: Limits) -> str:
    """Why a row is not within the limits; empty if it is. A cost that was not measured is not within a limit."""
    for name, limit, read, show in (
        ("trainable parameters", limits.max_trainable, _trainable, "{:,.0f}".format),
        ("memory", limits.max_memory, _memory_bytes, size_text),
        ("hours of training", limits.max_hours, _training_hours, number),
    ):
        if limit is None:
            continue
        whole = None if reference is None else read(board, reference)
        if limit.relative and whole is None:
            place = f" in the setting {row.setting}" if row.setting else ""
            raise UserError(
                f"{limit.text} of the {name}: no reference method has finished{place}; give an absolute amount"
            )
        value = read(board, row)
        if value is None:
            return f"{name} not measured"
        if value > (limit.value * (whole or 0.0) if limit.relative else limit.value):
            return f"{show(value)} {name}, more than {limit.text}"
    return ""


def _trainable(_: Leaderboard, row: Row) -> float | None:
    return trainable(row)


def _entry(board: Leaderboard, row: Row) -> ProfileEntry | None:
    return board.run.profile.entry_of(row.trials[0].trial_id) if board.run.profile and row.trials else None


def _memory_bytes(board: Leaderboard, row: Row) -> float | None:
    """The peak that the profile measured; without one the sum by kind, which leaves out the process itself."""
    entry = _entry(board, row)
    return entry.peak_memory_bytes.median if entry and entry.peak_memory_bytes else memory_bytes(row)


def _training_hours(board: Leaderboard, row: Row) -> float | None:
    """All steps of a trial at the profile's step time; without one the time that its trials took."""
    entry, data = _entry(board, row), next((record.data for record in row.finished if record.data), None)
    if entry and entry.step_time_s and data:
        return entry.step_time_s.median * data.steps / 3600
    return row.train_time_s.mean / 3600 if row.train_time_s else None


def _good_enough(board: Leaderboard, row: Row, best: Row, margin: float) -> bool:
    """Whether the row's mean is within the margin of the best, or the two are not separated by a telling interval."""
    found = board.compare(row, best)
    if found is None:
        return False
    behind = -found.mean if board.primary.higher_is_better else found.mean
    if found.null == 1:
        behind = 1 / found.mean - 1 if board.primary.higher_is_better else found.mean - 1
    return behind <= margin or (found.verdict == "unresolved" and _tells(board, found, best))


def _tells(board: Leaderboard, found: Difference, best: Row) -> bool:
    """Whether the interval of a difference from the best is narrow enough for "not separated" to mean something."""
    if not found.low or not found.high:  # one seed; or a ratio without bounds
        return False
    if found.null == 1:
        return math.log(found.high / found.low) / 2 <= math.log1p(_WIDEST)
    return (found.high - found.low) / 2 <= _WIDEST * abs(best.metrics[board.primary.name].mean)


def _in_setting(board: Leaderboard, choice: _Choice, margin: float) -> Recommendation:
    row, best = choice.rows[0], choice.best
    prices = _prices(board, row, choice.reference)
    paid = _paid(prices, choice.reference) if choice.reference is not None and row is not choice.reference else ""
    parts = filter(None, [paid, _evidence(board, choice, row, margin)])
    unknown = (
        *_unresolved(board, row, best),
        *_unmeasured(board, row),
        *choice.dropped,
        *_unfinished(board, row.setting),
    )
    sentence = f"{row.name}: {'; '.join(parts)}.{_cheaper(board, choice, row)}"
    return Recommendation(row.setting, row.name, row, sentence, prices, unknown)


def _cheaper(board: Leaderboard, choice: _Choice, row: Row) -> str:
    """Where the reference is recommended, the best row that is cheaper, and its price."""
    reference = choice.reference
    if reference is None or row is not reference:
        return ""
    cheaper = (other for other in choice.kept if (trainable(other) or math.inf) < (trainable(row) or 0))
    found = next(cheaper, None)
    paid = "" if found is None else _paid(_prices(board, found, reference), None)
    return f" The best of the cheaper rows, {found.name}: {paid}." if found is not None and paid else ""


def _prices(board: Leaderboard, row: Row, reference: Row | None) -> tuple[Price, ...]:
    if reference is None or row is reference:
        return ()
    own, other = trainable(row), trainable(reference)
    found = [Price("trainable parameters", own / other)] if own is not None and other else []
    found += _profiled(board, row, reference)
    difference = board.compare(row, reference)
    one, two = row.metrics[board.primary.name].mean, reference.metrics[board.primary.name].mean
    if difference is not None and difference.null == 1:
        found.append(Price(board.primary.label, difference.mean, difference.low, difference.high))
    elif two > 0 and one >= 0:
        found.append(Price(board.primary.label, one / two))
    return tuple(found)


def _profiled(board: Leaderboard, row: Row, reference: Row) -> list[Price]:
    """Memory and step time as the profile measured them; memory by kind where there is no profile."""
    found = []
    own, other = _entry(board, row), _entry(board, reference)
    against = own if own and other and own.reference_trial_ids == other.trial_ids else None
    if against and against.memory_ratio:
        found.append(Price("memory", against.memory_ratio.median, against.memory_ratio.low, against.memory_ratio.high))
    elif (mine := memory_bytes(row)) is not None and (theirs := memory_bytes(reference)):
        found.append(Price("memory", mine / theirs))
    if against and (time := against.step_time_ratio):
        found.append(Price("step time", time.median, time.low, time.high))
    return found


def _paid(prices: Sequence[Price], reference: Row | None) -> str:
    """``0.7 % of the trainable parameters, 41 % of the memory, 1.06× the perplexity of full fine-tuning``."""
    words = [
        f"{share(one.ratio)} of the {one.name}"
        if one.name in _IN_PERCENT
        else f"{ratio(one.ratio)} the {_lower(one.name)}"
        for one in prices
    ]
    return f"{', '.join(words)}{f' of {reference.name}' if words and reference is not None else ''}"


def _lower(label: str) -> str:
    """``Perplexity`` → ``perplexity``; names such as CIDEr and BLEU-4 stay."""
    return label[:1].lower() + label[1:] if label[1:].islower() else label


def _evidence(board: Leaderboard, choice: _Choice, row: Row, margin: float) -> str:
    best = choice.best
    if row is not best:
        found = board.compare(row, best)
        return "" if found is None else _against_best(found, best, best is choice.reference, margin)
    ranked = [other for other in board.of(row.setting) if other.rank is not None]
    if ranked[0] is not row:
        return f"the best mean {_lower(board.primary.label)} within the limits"
    start = f"the best mean {_lower(board.primary.label)}"
    if len(ranked) == 1:
        return f"{start}, of one ranked row"
    if row.metrics[board.primary.name].n < 2:
        return f"{start}, from one seed: nothing shows that it is ahead"
    behind = sum(other.rank is not None and other.rank[0] > 1 for other in ranked)
    others = len(ranked) - 1
    if behind == others:
        return f"{start}, shown to be ahead of {'the other row' if others == 1 else f'all {others} other rows'}"
    return f"{start}, shown to be ahead of {behind} of the {others} other rows"


def _against_best(found: Difference, best: Row, priced: bool, margin: float) -> str:
    """How sure the difference from the best is; the difference itself where the price does not give it already."""
    size = change_interval(found) if priced else f"{change(found)} {change_interval(found)}".rstrip()
    of_best = f"the best, {best.name}{f': {size}' if size else ''}"
    within = share(margin) if found.null == 1 else number(margin)
    if found.p_adjusted is None:
        return f"from one seed, so it is not tested against {of_best}"
    if found.verdict == "equivalent":
        return f"shown to be as good, within {within}, as {of_best}"
    if found.verdict == "unresolved":
        return f"not separated yet from {of_best}"
    return f"behind, but within {within} of, {of_best}"


def _unresolved(board: Leaderboard, row: Row, best: Row) -> list[str]:
    """What would separate the recommended row from the best, and cheaper rows that may be as good."""
    if row.metrics[board.primary.name].n < 2:
        return ["There is one seed, so no difference can be tested: add seeds to the experiment and run it again."]
    lines = []
    found = board.compare(row, best)
    if found is not None and found.verdict == "unresolved":
        lines.append(f"Whether {best.name} is better than {row.name} is not known; {_would_tell(found)}.")
    wide = [other for other in board.of(row.setting) if _cheaper_but_unknown(board, other, row, best)]
    if wide:
        named = ", ".join(other.name for other in wide[:_NAMED])
        more = f" and {len(wide) - _NAMED} more" if len(wide) > _NAMED else ""
        verb = "is" if len(wide) == 1 else "are"
        lines.append(f"{named}{more} {verb} cheaper and may be as good: the intervals are too wide to tell.")
    return lines


def _cheaper_but_unknown(board: Leaderboard, other: Row, row: Row, best: Row) -> bool:
    if other.rank is None or (trainable(other) or math.inf) >= (trainable(row) or 0):
        return False
    found = board.compare(other, best)
    return found is not None and found.verdict == "unresolved" and not _tells(board, found, best)


def _would_tell(found: Difference) -> str:
    if found.more_seeds is None:
        return "more seeds or test examples would tell"
    return f"{found.more_seeds} more seed{'s' * (found.more_seeds > 1)} would probably tell"


def _unmeasured(board: Leaderboard, row: Row) -> list[str]:
    entry = _entry(board, row)
    if entry is None:
        return ["Step time and peak memory are not measured: harness profile measures them."]
    return [f"Step time and peak memory are not measured: {entry.reason}."] if entry.reason else []


def _unfinished(board: Leaderboard, setting: str) -> tuple[str, ...]:
    open_ = [one for one in (*board.failed, *board.missing) if one.trial.setting == setting]
    open_ = [one for one in open_ if one.trial.trial_id not in board.run.out]
    planned = sum(trial.setting == setting for trial in board.run.plan.trials)
    if not open_:
        return ()
    return (f"{len(open_)} of {planned} trials have not finished; run the experiment again for the rest.",)


def _over_settings(board: Leaderboard, choices: Sequence[_Choice]) -> Recommendation:
    """The cheapest row that is good enough in every setting; without one, that which is so in the most."""
    if not choices:
        return Recommendation(None, None, None, "No row can be recommended: nothing is ranked in any setting.")
    costs: dict[str, list[float]] = {}
    for choice in choices:
        for row in choice.rows:
            costs.setdefault(row.name, []).append(trainable(row) or math.inf)
    most = max(len(values) for values in costs.values())
    name = min((one for one, values in costs.items() if len(values) == most), key=lambda one: fmean(costs[one]))
    good = [(choice, row) for choice in choices for row in choice.rows if row.name == name]
    by_name: dict[str, list[float]] = {}
    for choice, row in good:
        for price in _prices(board, row, choice.reference):
            by_name.setdefault(price.name, []).append(price.ratio)
    prices = tuple(
        Price(one, geometric_mean(ratios) if min(ratios) > 0 else fmean(ratios)) for one, ratios in by_name.items()
    )
    everywhere = most == len(board.settings)
    where = f"{'in all' if everywhere else f'in {most} of the'} {len(board.settings)} settings"
    start = f"{name} is the cheapest row that is not shown to be worse {where}"
    if all(row is choice.best for choice, row in good):
        start = (
            f"{name} has the best mean {_lower(board.primary.label)} {where}, and no cheaper row is good enough in "
            f"{'all' if everywhere else 'as many'} of them"
        )
    reference = next((choice.reference for choice, row in good if choice.reference not in (None, row)), None)
    paid = _paid(prices, reference)
    sentence = f"{start}{f': on average {paid}' if paid else ''}."
    worse = [choice for choice in choices if not any(row.name == name for row in choice.rows)]
    lost = [f"{choice.setting}: {choice.rows[0].name} instead" for choice in worse]
    return Recommendation(None, name, None, sentence, prices, tuple(lost))
