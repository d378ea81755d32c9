"""What one axis of a grid changes with all else equal, and which method stands where over all settings.

The **main effect** of a level (rank 16 instead of 4, one group per context instead of one for all, more data) is the
mean of paired differences: between rows that differ in this axis alone, seed by seed, on the scale of the metric, over
every combination of the other axes that has both levels. The **mean rank** of a method is over the settings that rank
all of the methods compared, seed by seed.

Intervals (95 % each, not corrected for their number) cover new seeds, for these combinations and test examples. How far
an effect varies between the combinations is shown as its smallest and largest value. Seeds are few and the trials of
one seed share their data, so the interval is the wider of two: by the means of the seeds (right also where all trials
of a seed are shifted together), and by the residuals of each combination pooled (right where they are not, and less at
the mercy of two or three means that happen to agree). Simulated in tests/results/leaderboard/test_effects.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from harness.core import naming
from harness.core.formulas import Floats
from harness.core.record import TrialRecord
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard
from results.statistics.intervals import CONFIDENCE
from results.statistics.scales import Scale, scale_of

GROUPING = "grouping"
_BASE_GROUPING = "agnostic"


@dataclass(frozen=True)
class Spread:
    """A mean over combinations and seeds: its interval (None with one seed), and its range over the combinations."""

    mean: float
    low: float | None
    high: float | None
    least: float
    most: float


@dataclass(frozen=True)
class Effect:
    """One level against the baseline of its axis, as it is shown: a ratio on the log scale, else a difference."""

    level: str
    change: Spread
    null: float  # what "equal" is
    combinations: int
    seeds: int

    @property
    def excludes_null(self) -> bool:
        """Whether the interval shows that the level matters."""
        return (
            self.change.low is not None
            and self.change.high is not None
            and not self.change.low <= self.null <= self.change.high
        )


@dataclass(frozen=True)
class Axis:
    """An axis of the grid: its name as in the experiment file, its baseline, and the other levels."""

    name: str
    baseline: str
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class MeanRank:
    """The mean rank of one method with one grouping over settings."""

    label: str
    grouping: str
    rank: Spread


@dataclass(frozen=True)
class MeanRanks:
    """Mean ranks, best first, over the settings in which all of these methods are ranked."""

    rows: tuple[MeanRank, ...]
    settings: int
    seeds: int


def spread(values_CS: Floats, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Spread:
    """The mean over combinations C and seeds S with its interval over seeds, for these combinations."""
    combinations, seeds = values_CS.shape
    mean_C, mean_S = values_CS.mean(axis=1), values_CS.mean(axis=0)
    mean, ends = float(values_CS.mean()), (float(mean_C.min()), float(mean_C.max()))
    if seeds < 2:
        return Spread(mean, None, None, *ends)
    by_seed = float(mean_S.var(ddof=1)) / seeds
    degrees = combinations * (seeds - 1)
    pooled = float(((values_CS - mean_C[:, None]) ** 2).sum()) / degrees / values_CS.size
    level = (1 + CONFIDENCE) / 2
    half = max(
        float(stdtrit(seeds - 1, level)) * math.sqrt(by_seed), float(stdtrit(degrees, level)) * math.sqrt(pooled)
    )
    return Spread(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), *ends)


def mean_ranks(board: Leaderboard) -> MeanRanks | None:
    """None with fewer than two settings that rank the same two or more methods on shared seeds."""
    ranked = {
        setting: {row.name: row for row in board.of(setting) if row.rank is not None} for setting in board.settings
    }
    ranked = {setting: rows for setting, rows in ranked.items() if len(rows) > 1}
    names = _in_all(list(ranked.values()))
    if len(ranked) < 2 or len(names) < 2:
        return None
    scores = [[rows[name].values(board.primary.name) for name in names] for rows in ranked.values()]
    seeds = sorted(set.intersection(*(set(by_seed) for rows in scores for by_seed in rows)))
    if not seeds:
        return None
    from scipy.stats import rankdata  # half a second to import, and few reports need it

    scores_CRS = np.array([[[by_seed[seed] for seed in seeds] for by_seed in rows] for rows in scores])
    sign = -1 if board.primary.higher_is_better else 1
    ranks_CRS = rankdata(sign * scores_CRS, axis=1)
    first = next(iter(ranked.values()))
    found = [
        MeanRank(first[name].label, first[name].grouping, spread(ranks_CRS[:, number], (1, len(names))))
        for number, name in enumerate(names)
    ]
    return MeanRanks(tuple(sorted(found, key=lambda one: one.rank.mean)), len(ranked), len(seeds))


def _in_all(groups: Sequence[Mapping[str, Row]]) -> list[str]:
    return [name for name in groups[0] if all(name in group for group in groups)] if groups else []


@dataclass(frozen=True)
class _Placed:
    """A row with its place on every axis, and its score by seed."""

    places: dict[str, Any]
    by_seed: dict[int, float]


def main_effects(board: Leaderboard) -> tuple[Axis, ...]:
    """Every axis in which rows differ alone, in the order of the experiment; those without such rows are left out."""
    metric = board.primary.name
    rows = [row for row in board.rows if row.rank is not None and metric in row.metrics]
    placed = [_Placed(_places(row), row.values(metric)) for row in rows]
    examples = next((one.examples for row in rows if (one := row.metrics[metric]).examples), None)
    scale = scale_of(board.primary, examples)
    names = dict.fromkeys(name for one in placed for name in one.places)
    varying = [name for name in names if name != "method" and len(_levels(name, placed)) > 1]
    found = (_axis(name, placed, scale) for name in varying)
    return tuple(axis for axis in found if axis is not None)


def _places(row: Row) -> dict[str, Any]:
    """Method, grouping, the adapter's options, and the conditions of the setting, by their keys in the experiment."""
    record: TrialRecord = row.finished[0]
    conditions = naming.flatten(naming.conditions(record.spec))
    options = naming.method_options(record.spec.get("adapter", {}))
    kept = {key: value for key, value in conditions if not key.startswith(naming.FINGERPRINTS)}
    grouping = {GROUPING: row.grouping} if row.grouping else {}
    return {"method": row.method, **grouping, **options, **kept}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _levels(name: str, placed: Sequence[_Placed]) -> list[Any]:
    """The values of an axis: numbers from the smallest, others in the order of the plan, agnostic first."""
    found = list({_text(one.places[name]): one.places[name] for one in placed if name in one.places}.values())
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in found):
        return sorted(found)
    return sorted(found, key=lambda one: (name != GROUPING) or one != _BASE_GROUPING)


def _axis(name: str, placed: Sequence[_Placed], scale: Scale) -> Axis | None:
    """The levels against the first one, over every combination of all else that has both."""
    combinations: dict[str, dict[str, dict[int, float]]] = {}
    for one in placed:
        if name in one.places:
            others = {key: value for key, value in one.places.items() if key != name}
            combinations.setdefault(_text(others), {})[_text(one.places[name])] = one.by_seed
    baseline, *levels = map(_text, _levels(name, placed))
    found = [
        effect
        for level in levels
        if (
            effect := _effect(
                level, [(c[level], c[baseline]) for c in combinations.values() if {level, baseline} <= c.keys()], scale
            )
        )
    ]
    return Axis(name, baseline, tuple(found)) if found else None


def _effect(level: str, paired: Sequence[tuple[dict[int, float], dict[int, float]]], scale: Scale) -> Effect | None:
    seeds = sorted(set.intersection(*(set(one) & set(other) for one, other in paired))) if paired else []
    if not seeds:
        return None
    one_CS, other_CS = (
        scale.rows(np.array([[pair[side][seed] for seed in seeds] for pair in paired])) for side in (0, 1)
    )
    change = spread(one_CS - other_CS)
    middle = one_CS.mean(keepdims=True), other_CS.mean(keepdims=True)

    def shown(value: float | None) -> float | None:
        return None if value is None else float(scale.difference(*middle, value).item())

    values = [shown(value) for value in (change.mean, change.low, change.high, change.least, change.most)]
    mean, low, high, least, most = values
    if mean is None or least is None or most is None:  # never: only the ends of an interval may be missing
        return None
    return Effect(level, Spread(mean, low, high, least, most), scale.null, len(paired), len(seeds))
