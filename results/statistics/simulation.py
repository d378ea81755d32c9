"""Error rates, power and coverage of the leaderboard's statistics: ``python -m results.statistics.simulation``.

Scores are drawn from row + seed + error, with errors of other spreads in other rows, skewed errors, one wild row, or
test examples. Printed for each scenario:

- family: in how many of the families at least one of the rows that are equal is called better or worse, all being equal
  (``all``) or half of them being better (``half``);
- power: the share of pairs of an equal and a better row that are told apart;
- mean, difference: how often the 95 % intervals hold the true mean and the true difference.

Axes: F families, R rows, S seeds, E examples.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from harness.core.formulas import Floats
from harness.core.record import MetricInfo
from results.statistics.family import Family
from results.statistics.intervals import resample_weights

SCORE = MetricInfo(name="score", label="Score", higher_is_better=True)
EXAMPLES = 60
_BETTER = 7.0  # standard deviations of the errors over seeds, by which half of the rows are better


@dataclass(frozen=True)
class Scenario:
    """How scores are drawn; standard deviations of errors over seeds are about 1."""

    name: str
    spread: float = 0.0  # the rows' standard deviations differ by up to this power of e
    wild: float = 1.0  # one row's standard deviation is this times larger
    skewed: bool = False  # errors are exponential
    seed: float = 1.0  # standard deviation of the seeds' effects, which the rows share
    example: float = 0.0  # standard deviation of the mean over examples of a row, unlike that of other rows


SCENARIOS = (
    Scenario("equal spreads"),
    Scenario("spreads to e", spread=1.0),
    Scenario("spreads to e²", spread=2.0),
    Scenario("skewed", skewed=True),
    Scenario("skewed, spreads to e", skewed=True, spread=1.0),
    Scenario("skewed, spreads to e²", skewed=True, spread=2.0),
    Scenario("example noise", example=0.5),
    Scenario("mostly example noise", example=3.0),
    Scenario("one row 3 times wilder", wild=3.0),
    Scenario("one row 10 times wilder", wild=10.0),
)


@dataclass(frozen=True)
class Result:
    """Shares of families, of pairs or of intervals."""

    all_equal: float
    half_equal: float
    power: float
    mean: float
    difference: float


def simulate(scenario: Scenario, rows: int, seeds: int, families: int, better: float = _BETTER) -> Result:
    """Draw families and judge them.

    Args:
        scenario: how scores are drawn.
        rows: R.
        seeds: S.
        families: F.
        better: by how many standard deviations of the errors over seeds every other row is better.
    """
    rng = np.random.default_rng(rows * 1000 + seeds)
    true_R = np.where(np.arange(rows) % 2, better, 0.0)
    first, second = np.triu_indices(rows, 1)
    differ_N = true_R[first] != true_R[second]
    false, half, power, mean, difference = [], [], [], [], []
    for _ in range(families):
        scores_RS, errors_RE = _drawn(rng, scenario, rows, seeds)
        family = _family(scores_RS, errors_RE)
        false.append(bool(family.new.significant_N.any()))
        shifted = _family(scores_RS + true_R[:, None], errors_RE)
        told_N = shifted.new.significant_N
        half.append(bool(told_N[~differ_N].any()))
        power.append(float(told_N[differ_N].mean()))
        mean.append(not family.estimate(0).excludes(0))
        found = family.difference(0, 1)
        difference.append(found is not None and not found.excludes(0))
    return Result(*(float(np.mean(found)) for found in (false, half, power, mean, difference)))


def _drawn(rng: np.random.Generator, scenario: Scenario, rows: int, seeds: int) -> tuple[Floats, Floats | None]:
    """(R, S) scores whose expectation is 0, and (R, E) the examples' part of a row's score."""
    errors_RS = rng.exponential(size=(rows, seeds)) - 1 if scenario.skewed else rng.normal(size=(rows, seeds))
    spread_R = np.exp(rng.uniform(-scenario.spread / 2, scenario.spread / 2, rows))
    spread_R[0] *= scenario.wild
    scores_RS = rng.normal(0, scenario.seed, seeds) + errors_RS * spread_R[:, None]
    if not scenario.example:
        return scores_RS, None
    shared_E = rng.normal(size=EXAMPLES)  # hard and easy examples are so for all rows
    examples_RE = (rng.normal(size=(rows, EXAMPLES)) + shared_E) * scenario.example * np.sqrt(EXAMPLES)
    return scores_RS + examples_RE.mean(axis=1, keepdims=True), examples_RE


def _family(scores_RS: Floats, examples_RE: Floats | None) -> Family:
    if examples_RE is None:
        return Family(scores_RS, SCORE, 0.01)
    weights_BE = resample_weights(EXAMPLES)
    means_RB = scores_RS.mean(axis=1, keepdims=True) + (
        examples_RE @ weights_BE.T / EXAMPLES - examples_RE.mean(axis=1, keepdims=True)
    )
    return Family(scores_RS, SCORE, 0.01, (means_RB, EXAMPLES))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 3, 8, 20, 40])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5, 10])
    parser.add_argument("--families", type=int, default=1000)
    options = parser.parse_args()
    table = Table("rows", "seeds", "scenario", "family all", "family half", "power", "mean", "difference", box=None)
    for rows in options.rows:
        for seeds in options.seeds:
            for scenario in SCENARIOS:
                found = simulate(scenario, rows, seeds, options.families)
                shares = (found.all_equal, found.half_equal, found.power, found.mean, found.difference)
                table.add_row(str(rows), str(seeds), scenario.name, *(f"{share:.3f}" for share in shares))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
