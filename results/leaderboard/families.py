"""The rows of one setting as families: one for each metric, in which every row informs how much seeds vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.core.record import MetricInfo
from results.leaderboard.badges import badges_of
from results.leaderboard.rows import Row
from results.statistics.family import Family
from results.statistics.intervals import Difference, Estimate
from results.statistics.resample import Resampled


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
        replace(row, metrics=found, badges=badges_of(row.finished, found, row.input_use, metrics))
        for row, found in zip(rows, means, strict=True)
    ]
    return Families(families, places), scored
