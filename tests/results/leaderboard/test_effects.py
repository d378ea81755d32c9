"""Main effects and mean ranks: against effects that are known, and their intervals' coverage by simulation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from harness.core.record import TrialRecord, read_run
from results.leaderboard.effects import Axis, main_effects, mean_ranks, spread
from results.leaderboard.table import Leaderboard, build_leaderboard
from tests.support.grid import BUDGET_EFFECT, BUDGETS, GRID, GROUPING_EFFECT, RANK_EFFECT, SEEDS, write_grid
from tests.support.runs import fake_plan, write_run


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    return build_leaderboard(read_run(write_grid(tmp_path_factory.mktemp("grid"))))


@pytest.fixture(scope="module")
def axes(board: Leaderboard) -> dict[str, Axis]:
    return {axis.name: axis for axis in main_effects(board)}


def test_every_axis_has_its_own_effect_over_all_combinations(axes: dict[str, Axis]) -> None:
    assert list(axes) == ["grouping", "rank", "budget.examples"]
    (grouping,), (rank,) = axes["grouping"].effects, axes["rank"].effects
    assert (axes["grouping"].baseline, grouping.level) == ("agnostic", "specific")
    assert (axes["rank"].baseline, rank.level) == ("2", "8")
    assert (grouping.combinations, rank.combinations, rank.seeds) == (2 * len(BUDGETS), 2 * len(BUDGETS), len(SEEDS))
    assert grouping.change.mean == pytest.approx(GROUPING_EFFECT, abs=0.004)
    assert rank.change.mean == pytest.approx(RANK_EFFECT, abs=1e-9)  # the noise does not depend on the rank
    assert grouping.excludes_null
    assert grouping.change.least < grouping.change.mean < grouping.change.most


def test_the_levels_of_an_axis_are_each_compared_with_the_first(axes: dict[str, Axis]) -> None:
    budget = axes["budget.examples"]
    assert {one.level for one in budget.effects} | {budget.baseline} == {"64", "256", "1024", "all"}
    assert {one.combinations for one in budget.effects} == {len(GRID)}
    full_gains = 0.05 / len(GRID)  # full fine-tuning gains 0.05 more per step, the other five methods do not
    by_level = {one.level: one.change for one in budget.effects}
    assert by_level["1024"].mean == pytest.approx(2 * (BUDGET_EFFECT + full_gains), abs=0.004)
    assert by_level["1024"].most == pytest.approx(2 * (BUDGET_EFFECT + 0.05), abs=0.01)


def test_mean_ranks_are_over_the_settings_that_rank_all(board: Leaderboard) -> None:
    found = mean_ranks(board)
    assert found is not None
    assert (found.settings, found.seeds, len(found.rows)) == (len(BUDGETS), len(SEEDS), len(GRID))
    first, last = found.rows[0], found.rows[-1]
    # LoRA r=8 specific is ahead at every budget but the largest, where full fine-tuning is.
    assert (first.label, first.grouping, first.rank.mean) == ("LoRA r=8", "specific", pytest.approx(5 / 4))
    assert (first.rank.least, first.rank.most) == (1, 2)
    assert (last.label, last.rank.mean, last.rank.low, last.rank.high) == ("none", 6, 6, 6)
    assert sum(one.rank.mean for one in found.rows) == pytest.approx(6 * 7 / 2)


def test_one_setting_has_no_mean_ranks_and_a_perplexity_is_compared_as_a_ratio(tmp_path: Path) -> None:
    def change(trial: object, record: TrialRecord) -> TrialRecord:
        perplexity = 3.0 * (1.25 if record.spec["adapter"]["grouping_name"] == "specific" else 1) * (1 + record.seed)
        test = record.metrics["test"] | {"perplexity": perplexity}
        return record.model_copy(update={"metrics": {**record.metrics, "test": test}})

    board = build_leaderboard(read_run(write_run(tmp_path, fake_plan(primary_metric="perplexity"), change)))
    assert mean_ranks(board) is None
    (axis,) = main_effects(board)
    (effect,) = axis.effects
    assert (axis.name, effect.null, effect.combinations) == ("grouping", 1, 3)
    values = (effect.change.mean, effect.change.low, effect.change.high, effect.change.least, effect.change.most)
    assert values == pytest.approx((1.25,) * 5)


def test_one_seed_has_no_interval() -> None:
    found = spread(np.array([[1.0], [3.0]]))
    assert (found.mean, found.low, found.high, found.least, found.most) == (2, None, None, 1, 3)


@pytest.mark.parametrize("shared", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(("combinations", "seeds"), [(1, 3), (2, 2), (6, 2), (6, 3), (12, 5)])
def test_intervals_cover_the_effect(combinations: int, seeds: int, shared: float) -> None:
    """500 grids with an effect of their own per combination; ``shared``: noise common to all trials of a seed."""
    rng = np.random.default_rng(combinations * 100 + seeds)
    of_combination_C1 = rng.normal(0, 2, (combinations, 1))
    truth, covered, tries = float(of_combination_C1.mean()), 0, 500
    for _ in range(tries):
        noise_CS = rng.normal(0, 1, (combinations, seeds)) + shared * rng.normal(0, 1, (1, seeds))
        found = spread(of_combination_C1 + noise_CS)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
    assert covered / tries > 0.95 - 3 * math.sqrt(0.05 * 0.95 / tries)
