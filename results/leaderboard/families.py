"""The rows of one setting as families: one for each metric, in which every row informs how much seeds vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.core.record import MetricInfo
from results.leaderboard.badges import badges_of
from results.leaderboard.rows import RIGHT, WRONG, Row
from results.statistics.family import Family
from results.statistics.intervals import Difference, Estimate
from results.statistics.resample import Resampled

_RATIO = MetricInfo(name="input_use", label="wrong/right input", higher_is_better=True, scale="log", lower=0.0)


@dataclass(frozen=True)
class Families:
    """The families of some rows that may be compared with each other, by metric, and the place of each row in them."""

    of: Mapping[str, Family]
    places: Mapping[str, Mapping[str, int]]  # metric → name of a row → its place

    def difference(self, one: Row, other: Row, metric: str) -> Difference | None:
        """``one`` less ``other``; None if one of them lacks the score, or they share no seed."""
        places = self.places.get(metric, {})
        if one.name not in places or other.name not in places or one.name == other.name:
            return None
        return self.of[metric].difference(places[one.name], places[other.name])


def families_of(
    rows: Sequence[Row], metrics: Sequence[MetricInfo], margin: float, resampled: Resampled
) -> tuple[Families, list[Row]]:
    """The families of rows of one setting that may be compared, and the rows with their means and badges.

    Args:
        rows: the rows.
        metrics: those of the run.
        margin: see ``Plan.equivalence_margin``.
        resampled: their trials.
    """
    seeds = sorted({record.seed for row in rows for record in row.finished})
    uses = _input_use(rows, seeds, margin, resampled)
    families: dict[str, Family] = {}
    places: dict[str, dict[str, int]] = {}
    means: list[dict[str, Estimate]] = [{} for _ in rows]
    for info in metrics:
        values = [row.values(info.name) for row in rows]
        chosen = [index for index, by_seed in enumerate(values) if by_seed]
        if not chosen:
            continue
        scores_RS = np.array([[values[index].get(seed, np.nan) for seed in seeds] for index in chosen])
        replicates = resampled.replicates_of_rows([rows[index].finished for index in chosen], info.name)
        family = Family(scores_RS, info, margin, replicates)
        families[info.name] = family
        places[info.name] = {rows[index].name: place for place, index in enumerate(chosen)}
        for place, index in enumerate(chosen):
            means[index][info.name] = family.estimate(place)
    scored = [
        replace(row, metrics=found, input_use=use, badges=badges_of(row.finished, found, use, metrics))
        for row, found, use in zip(rows, means, uses, strict=True)
    ]
    return Families(families, places), scored


def _input_use(rows: Sequence[Row], seeds: Sequence[int], margin: float, resampled: Resampled) -> list[Estimate | None]:
    """The perplexity with the wrong input relative to that with the right one, of each row."""
    right, wrong = ([row.values(name) for row in rows] for name in (RIGHT, WRONG))
    chosen = [index for index in range(len(rows)) if right[index].keys() & wrong[index].keys()]
    found: list[Estimate | None] = [None] * len(rows)
    if not chosen:
        return found
    nan = float("nan")
    ratios_RS = np.array([[wrong[i].get(seed, nan) / right[i].get(seed, nan) for seed in seeds] for i in chosen])
    records = [rows[index].finished for index in chosen]
    replicates = [resampled.replicates_of_rows(records, name) for name in (WRONG, RIGHT)]
    both = None
    if replicates[0] is not None and replicates[1] is not None and replicates[0][1] == replicates[1][1]:
        both = replicates[0][0] / replicates[1][0], replicates[0][1]
    family = Family(ratios_RS, _RATIO, margin, both)
    for place, index in enumerate(chosen):
        found[index] = family.estimate(place)
    return found
