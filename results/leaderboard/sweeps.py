"""Sweeps over a budget: settings that differ only in one budget, with a curve and a crossover for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from harness.core import naming
from harness.core.record import MetricInfo, TrialRecord
from results.leaderboard.matched import pairs
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard
from results.statistics.crossover import Gap, locate
from results.statistics.resample import score_on_test
from results.statistics.scales import scale_of

Kind = Literal["examples", "epochs"]
KINDS: tuple[Kind, ...] = ("examples", "epochs")


@dataclass(frozen=True)
class Crossover:
    """The budget from which on the reference is ahead; -inf: from below the sweep, inf: not within the sweep."""

    at: float
    low: float | None  # 95 % interval; None with one seed
    high: float | None
    covers: str  # which randomness the interval covers, as in ``Estimate.covers``
    words: str


@dataclass(frozen=True)
class Curve:
    """One method with one grouping over the budgets at which it has a score, smallest first."""

    budgets: tuple[int, ...]
    rows: tuple[Row, ...]
    crossover: Crossover | None = None
    note: str = ""  # why there is no crossover

    @property
    def name(self) -> str:
        """Label and grouping."""
        return self.rows[0].name


@dataclass(frozen=True)
class Sweep:
    """Settings that differ only in one budget."""

    kind: Kind
    setting: str  # what else was varied in the run, and is constant in this sweep
    budgets: tuple[int, ...]
    reference: str | None  # name of the reference row
    curves: tuple[Curve, ...]  # in the order of the plan, including that of the reference
    left_out: tuple[str, ...] = field(default=())  # rows that are not in the curves, with the reason

    @property
    def what(self) -> str:
        """The budget spelled out."""
        return "number of training examples" if self.kind == "examples" else "number of epochs"


def build_sweeps(board: Leaderboard) -> tuple[Sweep, ...]:
    """Every sweep over examples, and every one over epochs, with at least two budgets."""
    found = []
    for kind in KINDS:
        for rest, settings in settings_alike(board, (f"budget.{kind}",)).items():
            by_budget: dict[int, list[str]] = {}
            for setting, record in settings.items():
                by_budget.setdefault(budget_of(record, kind), []).append(setting)
            if len(by_budget) > 1:
                found.append(_sweep(board, kind, rest, dict(sorted(by_budget.items()))))
    return tuple(found)


def settings_alike(board: Leaderboard, without: Sequence[str]) -> dict[str, dict[str, TrialRecord]]:
    """Groups of settings that differ only in the keys ``without``: common name → setting → one of its finished trials.

    Rows that are excluded from ranking do not represent their setting: their budget may be what differs.
    """
    first: dict[str, TrialRecord] = {}
    for row in board.rows:
        for record in row.finished:
            if not row.apart and record.data is not None and "budget" in record.spec:
                first.setdefault(row.setting, record)
    names = naming.settings({setting: record.spec for setting, record in first.items()}, without)
    alike: dict[str, dict[str, TrialRecord]] = {}
    for setting in board.settings:
        if setting in first:
            alike.setdefault(names[setting], {})[setting] = first[setting]
    return alike


def budget_of(record: TrialRecord, kind: Kind) -> int:
    """Training examples (the spec may say "all") or epochs of a trial."""
    if kind == "examples" and record.data is not None:
        return record.data.examples
    return int(record.spec["budget"][kind])


def _sweep(board: Leaderboard, kind: Kind, rest: str, by_budget: dict[int, list[str]]) -> Sweep:
    left_out = [
        f"{setting}: has the same {budget:,} {kind} as {settings[0]}"
        for budget, settings in by_budget.items()
        for setting in settings[1:]
    ]
    points: dict[str, dict[int, Row]] = {}
    references: dict[int, Row] = {}
    for budget, (setting, *_) in by_budget.items():
        left_out += [f"{row.name}, {setting}: {'; '.join(row.apart)}" for row in board.apart(setting)]
        for row in board.of(setting):
            if board.primary.name in row.metrics:
                points.setdefault(row.name, {})[budget] = row
            if row.is_reference and row.finished and not row.differences:
                references[budget] = row
    order = dict.fromkeys(f"{trial.label} {trial.grouping}".rstrip() for trial in board.run.plan.trials)
    curves = tuple(_curve(board, kind, points[name], references) for name in order if name in points)
    reference = next((row.name for row in references.values()), None)
    return Sweep(kind, rest, tuple(by_budget), reference, curves, tuple(left_out))


def _curve(board: Leaderboard, kind: Kind, points: dict[int, Row], references: dict[int, Row]) -> Curve:
    budgets, rows = tuple(points), tuple(points.values())
    if any(row is references.get(budget) for budget, row in points.items()):
        return Curve(budgets, rows, note="the reference")
    compared = {budget: row for budget, row in points.items() if board.primary.name in row.differences}
    if len(compared) < 2:
        fewer = "compared with the reference at fewer than two budgets"
        return Curve(
            budgets, rows, note=fewer if references else "the reference has no finished trials to compare with"
        )
    gap = _gap(board, compared, references)
    at, low, high = locate(gap)
    words = _words(gap, (at, low, high), rows[0].name, next(iter(references.values())).name)
    found = Crossover(at, low, high, gap.covers, words)
    missing = [f"{budget:,}" for budget in references if budget not in compared]
    return Curve(budgets, rows, found, f"not compared at {', '.join(missing)} {kind}" if missing else "")


def _gap(board: Leaderboard, compared: dict[int, Row], references: dict[int, Row]) -> Gap:
    name = board.primary.name
    sign = -1.0 if board.primary.higher_is_better else 1.0  # differences are method - reference
    by_seed = [_by_seed(row, references[budget], board.primary) for budget, row in compared.items()]
    shared = sorted(set(by_seed[0]).intersection(*by_seed))
    values_SK = np.array([[values[seed] for values in by_seed] for seed in shared])
    differences = [row.differences[name] for row in compared.values()]
    counts = {difference.examples for difference in differences}
    errors = [row.difference_errors_B for row in compared.values() if row.difference_errors_B is not None]
    count = next(iter(counts))
    examples_KK = None
    if len(errors) == len(compared) and len(counts) == 1 and count is not None and count > 1:
        examples_KK = np.cov(np.stack(errors)) * count / (count - 1)  # resampling E of E has (E - 1)/E of the variance
    return Gap(
        budgets=tuple(compared),
        ahead_K=sign * np.array([np.mean(list(values.values())) for values in by_seed]),
        seeds=len(shared),
        seeds_KK=np.cov(values_SK, rowvar=False) / len(shared) if len(shared) > 1 else None,
        examples_KK=examples_KK,
        examples=count or 2,
    )


def _by_seed(row: Row, reference: Row, metric: MetricInfo) -> dict[int, float]:
    """The differences on the metric's scale, of logarithms for a perplexity."""
    scores = [
        (a.seed, score_on_test(a, metric.name), score_on_test(b, metric.name)) for a, b in pairs(row, reference)[0]
    ]
    both = [(seed, a, b) for seed, a, b in scores if a is not None and b is not None]
    z_2S = scale_of(metric, row.differences[metric.name].examples).rows(np.array([one[1:] for one in both], float).T)
    return {seed: float(z) for (seed, *_), z in zip(both, z_2S[0] - z_2S[1], strict=True)}


def _words(gap: Gap, crossover: tuple[float, float | None, float | None], name: str, reference: str) -> str:
    """The crossover as a phrase; a budget is rounded to two significant digits."""
    at, low, high = crossover
    first, last = f"below {gap.budgets[0]:,}", f"beyond {gap.budgets[-1]:,}"

    def show(budget: float) -> str:
        if math.isinf(budget):
            return first if budget < 0 else last
        places = 1 - math.floor(math.log10(budget))
        return f"{round(budget, places):,.{max(0, places)}f}"

    every = "every budget" if np.all(gap.ahead_K <= 0) else "the largest budget"
    means = f"{reference} is ahead at every budget" if at == -math.inf else f"{name} is ahead at {every}"
    if low is None or high is None:
        alone = "one seed, so no interval" if gap.seeds == 1 else "no two seeds at all its budgets, so no interval"
        return f"about {show(at)} ({alone})" if math.isfinite(at) else f"not within the sweep: {means} ({alone})"
    if low == -math.inf and high == math.inf:
        return (
            f"not within the sweep: neither is shown to be ahead ({name} at any budget, {reference} at the largest one)"
        )
    if low == high:
        return f"not within the sweep: {means}"
    span = f"[{show(low)}, {show(high)}]"
    return f"about {show(at)} {span}" if math.isfinite(at) else f"not within the sweep by the means: {means}; {span}"
