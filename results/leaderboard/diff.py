"""An old and a new leaderboard: what changed, and whether it is more than noise.

A row is compared with the row of the same setting, label and grouping. Where its seeds are the same the change is
paired by seed (a paired t test); otherwise the two means are independent (Welch's t test with the Welch-Satterthwaite
degrees of freedom, Biometrika 1947, https://doi.org/10.1093/biomet/34.1-2.28). Both cover the seeds. The test examples
must be the same in both leaderboards and are held fixed: intervals do not cover their choice. Perplexities are compared
by their logarithms, and their change is a ratio; all other scores are compared as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import ttest_ind

from harness.core.errors import UserError, did_you_mean
from harness.core.record import Data
from results.leaderboard.published import PublishedLeaderboard, PublishedMetric, PublishedRow
from results.statistics.intervals import CONFIDENCE, Difference, estimate, holm, p_value

_LARGEST_LOG = 700.0  # two seeds that differ much have an interval without a useful end: a finite one is written
RULE = (
    "p after Holm's correction over all rows tested: a paired t test where the seeds are the same, else Welch's. It "
    "covers the seeds; the test examples are the same and held fixed."
)
# "untested": one side has a single seed; "new", "removed": the row is in one of the leaderboards only.
Verdict = Literal["new", "removed", "unchanged", "better", "worse", "noise", "untested", "not comparable"]
Rank = tuple[int, int] | None


@dataclass(frozen=True)
class Change:
    """One row, in both leaderboards or in one of them."""

    setting: str
    name: str
    old_mean: float | None
    new_mean: float | None
    difference: Difference | None  # new - old, or new / old; None where not comparable, or in one leaderboard only
    paired: bool  # by seed
    verdict: Verdict
    reason: str  # why it is not comparable; else empty
    old_rank: Rank
    new_rank: Rank
    notes: tuple[str, ...]  # what else changed in how the row was produced


@dataclass(frozen=True)
class BoardDiff:
    """What changed from the old to the new leaderboard: the rows of the new one in its order, then removed ones."""

    metric: PublishedMetric
    changes: tuple[Change, ...]


Key = tuple[str, str, str]


def diff(old: PublishedLeaderboard, new: PublishedLeaderboard, metric: str | None = None) -> BoardDiff:
    """Compare two leaderboards; p-values are corrected (Holm) over all tested rows.

    Args:
        old: the earlier leaderboard.
        new: the later leaderboard.
        metric: name of the metric to compare; None for the primary one.

    Raises:
        UserError: a leaderboard lacks the metric, or the primary metrics differ.
    """
    info = _metric(old, new, metric)
    before, after = _by_key(old), _by_key(new)
    changes = [
        _change(before[key], row, info) if key in before else _alone(row, info, "new") for key, row in after.items()
    ]
    changes += [_alone(row, info, "removed") for key, row in before.items() if key not in after]
    p_values = holm([change.difference.p_value if change.difference else None for change in changes])
    return BoardDiff(info, tuple(_judged(change, p, info) for change, p in zip(changes, p_values, strict=True)))


def _metric(old: PublishedLeaderboard, new: PublishedLeaderboard, metric: str | None) -> PublishedMetric:
    if metric is None and old.primary_metric != new.primary_metric:
        raise UserError(
            f"the leaderboards have different primary metrics ({old.primary_metric}, {new.primary_metric}); "
            "choose one that both have (--metric)"
        )
    mine, theirs = ({info.name: info for info in board.metrics} for board in (new, old))
    name = metric or new.primary_metric
    if name not in mine or name not in theirs:
        both = [known for known in mine if known in theirs]
        raise UserError(f"--metric: {name!r} is not a metric of both leaderboards; {did_you_mean(name, both)}")
    if mine[name].higher_is_better != theirs[name].higher_is_better:
        raise UserError(f"{name!r} is better when higher in one leaderboard and when lower in the other")
    return mine[name]


def _by_key(board: PublishedLeaderboard) -> dict[Key, PublishedRow]:
    return {(row.setting, row.label, row.grouping): row for row in board.rows}


def _alone(row: PublishedRow, info: PublishedMetric, verdict: Literal["new", "removed"]) -> Change:
    """A row that one of the leaderboards does not have."""
    score = row.metrics.get(info.name)
    mean = score.mean if score else None
    old_mean, new_mean = (None, mean) if verdict == "new" else (mean, None)
    old_rank, new_rank = (None, row.rank) if verdict == "new" else (row.rank, None)
    return Change(row.setting, row.name, old_mean, new_mean, None, False, verdict, "", old_rank, new_rank, ())


def _change(old: PublishedRow, new: PublishedRow, info: PublishedMetric) -> Change:
    before, after = (row.metrics.get(info.name) for row in (old, new))
    reason = _mismatch(old.data, new.data)
    if before is None or after is None:
        reason = "; ".join(
            f"no {info.label} in the {which} one" for which, one in (("old", before), ("new", after)) if one is None
        )
    change = Change(
        new.setting,
        new.name,
        before.mean if before else None,
        after.mean if after else None,
        difference=None,
        paired=False,
        verdict="not comparable",
        reason=reason,
        old_rank=old.rank,
        new_rank=new.rank,
        notes=_notes(old, new),
    )
    if reason or before is None or after is None:
        return change
    if before.by_seed == after.by_seed:
        return replace(change, verdict="unchanged", paired=True)
    paired = before.by_seed.keys() == after.by_seed.keys()
    ratio = info.scale == "log"
    one, other = (_logarithms(score.by_seed) if ratio else score.by_seed for score in (before, after))
    found = _paired(one, other) if paired else _unpaired(one, other)
    return replace(change, difference=_as_ratio(found) if ratio else found, paired=paired)


def _logarithms(scores: Mapping[int, float]) -> dict[int, float]:
    return {seed: math.log(score) for seed, score in scores.items()}


def _as_ratio(found: Difference) -> Difference:
    """A difference of logarithms as a ratio; standard errors stay those of the logarithm."""
    low, high = (None if end is None else math.exp(min(end, _LARGEST_LOG)) for end in (found.low, found.high))
    return replace(found, mean=math.exp(found.mean), low=low, high=high, null=1.0)


def _mismatch(old: Mapping[int, Data], new: Mapping[int, Data]) -> str:
    """How the data of two rows differ, over the shared seeds or else over all; empty if they are the same."""
    if not old or not new:
        return "the training data are not recorded"
    shared = sorted(old.keys() & new.keys())
    differing = {
        "training examples differ": _differ(old, new, shared, "examples_fingerprint") or _sizes(old) != _sizes(new),
        "order of the examples differs": _differ(old, new, shared, "order_fingerprint"),
        "number of optimizer steps differs": {one.steps for one in old.values()} != {one.steps for one in new.values()},
        "adapter groups started from other weights": _differ(old, new, shared, "started_from"),
        "evaluation examples differ": {one.evaluation_fingerprint for one in old.values()}
        != {one.evaluation_fingerprint for one in new.values()},
    }
    return "; ".join(words for words, differs in differing.items() if differs)


def _differ(old: Mapping[int, Data], new: Mapping[int, Data], seeds: list[int], field: str) -> bool:
    return any(getattr(old[seed], field) != getattr(new[seed], field) for seed in seeds)


def _sizes(data: Mapping[int, Data]) -> set[int]:
    return {one.examples for one in data.values()}


def _paired(old: Mapping[int, float], new: Mapping[int, float]) -> Difference:
    found = estimate([new[seed] - old[seed] for seed in sorted(new)])
    assert found is not None  # noqa: S101 -- a published score has a seed
    return Difference(**vars(found), p_value=p_value(found.mean, found.seed_se, found.n))


def _unpaired(old: Mapping[int, float], new: Mapping[int, float]) -> Difference:
    before, after = list(old.values()), list(new.values())
    mean, seeds = float(np.mean(after) - np.mean(before)), min(len(before), len(after))
    if seeds < 2:
        return Difference(mean, None, None, seeds)
    variance = np.var(before, ddof=1) / len(before) + np.var(after, ddof=1) / len(after)
    if variance == 0:
        return Difference(mean, mean, mean, seeds, 0.0, p_value=1.0 if mean == 0 else 0.0)
    test = ttest_ind(after, before, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    low, high = float(interval.low), float(interval.high)
    return Difference(mean, low, high, seeds, float(np.sqrt(variance)), p_value=float(test.pvalue))


def _notes(old: PublishedRow, new: PublishedRow) -> tuple[str, ...]:
    changes = {
        "learning rate": (_rate(old), _rate(new)),
        "learning rates tried": (str(old.effort), str(new.effort)),
        "halving": (old.halving or "none", new.halving or "none"),
        "seeds": (_seeds(old), _seeds(new)),
    }
    notes = [f"{what}: {before} → {after}" for what, (before, after) in changes.items() if before != after]
    if set(new.apart) - set(old.apart):
        notes.append(f"now excluded from ranking: {'; '.join(new.apart)}")
    elif old.apart and not new.apart:
        notes.append("no longer excluded from ranking")
    return tuple(notes)


def _rate(row: PublishedRow) -> str:
    return "not recorded" if row.learning_rate is None else f"{row.learning_rate:g}"


def _seeds(row: PublishedRow) -> str:
    return ", ".join(map(str, sorted(row.trial_ids))) or "none"


def _judged(change: Change, p_adjusted: float | None, info: PublishedMetric) -> Change:
    if change.difference is None:
        return change
    found = replace(change.difference, p_adjusted=p_adjusted)
    verdict: Verdict = "noise"
    if p_adjusted is None:
        verdict = "untested"
    elif found.significant:
        verdict = "better" if (found.mean > found.null) == info.higher_is_better else "worse"
    return replace(change, difference=found, verdict=verdict)
