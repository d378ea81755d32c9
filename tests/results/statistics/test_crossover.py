"""Sweeps are found among the settings, and the interval of the crossover has its nominal coverage (simulation)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from harness.core.record import TrialRecord, read_run
from results.leaderboard.sweeps import Curve, Sweep, build_sweeps
from results.leaderboard.table import build_leaderboard
from results.statistics.crossover import Gap, locate
from tests.support.sweeps import ScoreOf, write_sweep

BUDGETS = (64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
SHAPES = {  # how far the reference is ahead; the crossover is where the sign changes for the last time
    "steep": np.linspace(-0.09, 0.105, 7),
    "shallow": np.linspace(-0.018, 0.021, 7),
    "close after it": np.array([-0.09, -0.03, 0.009, 0.009, 0.009, 0.009, 0.09]),
    "ahead, behind, ahead": np.array([0.03, -0.045, -0.045, -0.015, 0.024, 0.045, 0.06]),
}
E = 200


def true_crossover(gap_K: np.ndarray) -> float:
    """An independent computation: the last sign change, linear in the logarithm."""
    last = int(np.flatnonzero(gap_K <= 0)[-1])
    share = -gap_K[last] / (gap_K[last + 1] - gap_K[last])
    return float(np.exp(np.interp(share, [0, 1], np.log(BUDGETS[last : last + 2]))))


def drawn(rng: np.random.Generator, gap_K: np.ndarray, seeds: int, shared: float) -> Gap:
    """A sweep with the noise of seeds, which have ``shared`` of their variance in common over budgets, and examples."""
    covariance_KK = 0.02**2 * ((1 - shared) * np.eye(7) + shared)
    examples_EK = 0.1 * (rng.normal(size=(E, 1)) + rng.normal(size=(E, 7)))
    ahead_SK = gap_K + rng.multivariate_normal(np.zeros(7), covariance_KK, seeds) + examples_EK.mean(axis=0)
    return Gap(BUDGETS, ahead_SK.mean(axis=0), seeds, np.cov(ahead_SK.T) / seeds, np.cov(examples_EK.T) / E, examples=E)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_interval_covers_the_true_crossover(shape: str, seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    truth, repetitions, covered = true_crossover(SHAPES[shape]), 500, 0
    for shared in (0.0, 0.7):
        for _ in range(repetitions // 2):
            at, low, high = locate(drawn(rng, SHAPES[shape], seeds, shared))
            assert low is not None
            assert high is not None
            assert low <= at <= high
            covered += low <= truth <= high
    assert covered / repetitions >= 0.93


def test_without_a_crossover_none_is_shown() -> None:
    rng = np.random.default_rng(0)
    ahead = [locate(drawn(rng, np.full(7, 0.2), 3, 0.5)) for _ in range(200)]
    assert sum(found == (-math.inf, -math.inf, -math.inf) for found in ahead) >= 0.93 * 200
    behind = [locate(drawn(rng, np.full(7, -0.2), 3, 0.5)) for _ in range(200)]
    assert sum(found == (math.inf, math.inf, math.inf) for found in behind) >= 0.93 * 200
    level = [locate(drawn(rng, np.zeros(7), 3, 0.5)) for _ in range(200)]
    bounded = sum(math.isfinite(low or 0) and math.isfinite(high or 0) for _, low, high in level)
    assert bounded <= 0.05 * 200


def test_a_gap_without_errors_crosses_where_the_lines_meet() -> None:
    gap = Gap((100.0, 1000.0, 10000.0), np.array([-1.0, 1.0, 2.0]), 3, np.zeros((3, 3)))
    assert locate(gap) == pytest.approx((100 * math.sqrt(10),) * 3)


def test_between_budgets_the_errors_are_those_of_the_interpolated_difference() -> None:
    rng = np.random.default_rng(4)
    gap = drawn(rng, SHAPES["steep"], 5, 0.5)
    seeds_SK = rng.normal(size=(5, 7))
    gap = Gap(gap.budgets, seeds_SK.mean(axis=0), 5, np.cov(seeds_SK.T) / 5)
    middle_S = 0.7 * seeds_SK[:, 2] + 0.3 * seeds_SK[:, 3]
    ahead, half = gap.at(2, 0.3)
    assert ahead == pytest.approx(middle_S.mean())
    assert half == pytest.approx(2.776445 * middle_S.std(ddof=1) / math.sqrt(5))  # t with 4 degrees of freedom


def crossing(budget: int, epochs: int, method: str, grouping: str, seed: int) -> float:
    """Full fine-tuning gains twice as much per doubling as LoRA, and both are level at 256."""
    doublings = math.log2(budget / 256) + math.log2(epochs / 4)
    return (
        0.5
        + {"full": 0.1, "lora": 0.05, "none": 0.0}[method] * doublings
        + 0.003 * ((seed * 7) % 5 - 2) * (method == "lora")
    )


def sweeps_of(folder: Path, score: ScoreOf = crossing, **options: object) -> tuple[Sweep, ...]:
    write_sweep(folder, score, **options)
    return build_sweeps(build_leaderboard(read_run(folder)))


def curve_of(sweep: Sweep, name: str) -> Curve:
    return next(curve for curve in sweep.curves if curve.name == name)


def test_every_sweep_over_examples_and_over_epochs_is_found(tmp_path: Path) -> None:
    found = sweeps_of(tmp_path, budgets=(64, 256, 1024), epochs=(2, 8))
    assert [(sweep.kind, sweep.setting, sweep.budgets) for sweep in found] == [
        ("examples", "epochs=2", (64, 256, 1024)),
        ("examples", "epochs=8", (64, 256, 1024)),
        ("epochs", "examples=64", (2, 8)),
        ("epochs", "examples=256", (2, 8)),
        ("epochs", "examples=all", (2, 8)),  # the largest budget is "all" in its spec
    ]
    assert all(sweep.reference == "Full fine-tuning" for sweep in found)


def test_one_budget_is_no_sweep(tmp_path: Path) -> None:
    assert sweeps_of(tmp_path, budgets=(64,)) == ()


def test_the_crossover_in_words(tmp_path: Path) -> None:
    (sweep,) = sweeps_of(tmp_path, budgets=(64, 128, 256, 512, 1024), epochs=(4,))
    lora = curve_of(sweep, "LoRA specific").crossover
    assert lora is not None
    assert lora.at == pytest.approx(256, rel=0.02)
    assert lora.low is not None
    assert lora.high is not None
    assert 128 < lora.low < 256 < lora.high < 512
    assert lora.words.startswith("about 260 [")
    assert lora.covers == "seeds and test examples"
    bare = curve_of(sweep, "none").crossover
    assert bare is not None
    # Without an adapter nothing is gained: ahead of the reference below 256, as that has not learnt yet.
    assert bare.at == pytest.approx(256, rel=0.02)
    assert curve_of(sweep, "Full fine-tuning").note == "the reference"


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (-0.4, "not within the sweep: Full fine-tuning is ahead at every budget"),
        (0.4, "not within the sweep: LoRA specific is ahead at every budget"),
    ],
)
def test_no_crossover_in_words(tmp_path: Path, shift: float, words: str) -> None:
    def shifted(budget: int, epochs: int, method: str, grouping: str, seed: int) -> float:
        return crossing(budget, epochs, method, grouping, seed) + (shift if method == "lora" else 0)

    (sweep,) = sweeps_of(tmp_path, shifted, budgets=(64, 256, 1024))
    found = curve_of(sweep, "LoRA specific").crossover
    assert found is not None
    assert found.words == words


def test_a_level_method_is_shown_neither_ahead_nor_behind(tmp_path: Path) -> None:
    def level(budget: int, epochs: int, method: str, grouping: str, seed: int) -> float:
        return 0.5 + (0.01 * ((seed * 7 + budget) % 3 - 1) if method == "lora" else 0)

    (sweep,) = sweeps_of(tmp_path, level, budgets=(64, 256, 1024))
    found = curve_of(sweep, "LoRA specific").crossover
    assert found is not None
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.words.startswith("not within the sweep: neither is shown to be ahead")


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    (sweep,) = sweeps_of(tmp_path, seeds=(0,), budgets=(64, 256, 1024), epochs=(4,))
    found = curve_of(sweep, "LoRA specific").crossover
    assert found is not None
    assert (found.low, found.high, found.covers) == (None, None, "")
    assert found.words.endswith("(one seed, so no interval)")


def test_rows_apart_are_named_and_left_out(tmp_path: Path) -> None:
    def other_order(record: TrialRecord) -> TrialRecord | None:
        if record.data is None or record.spec["adapter"]["method"] != "lora" or record.data.examples != 256:
            return record
        return record.model_copy(update={"data": record.data.model_copy(update={"order_fingerprint": "other"})})

    (sweep,) = sweeps_of(tmp_path, budgets=(64, 256, 1024), change=other_order)
    curve = curve_of(sweep, "LoRA specific")
    assert curve.budgets == (64, 1024)
    assert curve.note == "not compared at 256 examples"
    assert any(line.startswith("LoRA specific, examples=256: ") and "order" in line for line in sweep.left_out)


def test_a_method_at_one_budget_has_a_note(tmp_path: Path) -> None:
    def only_the_first(record: TrialRecord) -> TrialRecord | None:
        missing = record.spec["adapter"]["method"] == "lora" and record.data and record.data.examples > 64
        return None if missing else record

    (sweep,) = sweeps_of(tmp_path, budgets=(64, 256), change=only_the_first)
    curve = curve_of(sweep, "LoRA specific")
    assert curve.crossover is None
    assert curve.note == "compared with the reference at fewer than two budgets"


def test_without_a_reference_there_are_curves_and_a_note(tmp_path: Path) -> None:
    (sweep,) = sweeps_of(tmp_path, change=lambda one: None if one.spec["adapter"]["method"] == "full" else one)
    assert sweep.reference is None
    assert [curve.name for curve in sweep.curves] == ["none", "LoRA specific"]
    assert {curve.note for curve in sweep.curves} == {"the reference has no finished trials to compare with"}
