"""Pareto fronts against brute force, cost per point of CIDEr, and the interquartile mean across tasks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from harness.core.profile import Measured, Profile, ProfileEntry, write_profile
from harness.core.record import TrialRecord, read_run
from results.leaderboard.efficiency import Efficiency, Front, build_efficiency
from results.leaderboard.table import build_leaderboard
from tests.support.sweeps import METHODS, Change, ScoreOf, write_sweep

MANY = (
    METHODS[0],
    *(("LoRA", "lora", "specific", {"rank": rank}, 10_000 * rank) for rank in (1, 2, 3, 4, 5, 6)),
    METHODS[-1],
)


def any_score(budget: int, epochs: int, method: str, grouping: str, seed: int) -> float:
    return {"none": 0.2, "lora": 0.4, "full": 0.5}[method] + 0.01 * seed


def efficiency_of(folder: Path, score: ScoreOf = any_score, **options: object) -> Efficiency:
    write_sweep(folder, score, **options)
    return build_efficiency(build_leaderboard(read_run(folder)))


def scrambled(primary: str) -> Change:
    """Quality in no order of cost, with ties."""
    rng = np.random.default_rng(1)
    by_row: dict[str, float] = {}

    def change(record: TrialRecord) -> TrialRecord:
        row = record.trial_id.rpartition("-")[0]
        score = by_row.setdefault(row, float(rng.integers(3, 7)) / 10)
        metrics = {**record.metrics, "test": {**record.metrics["test"], primary: score}}
        return record.model_copy(update={"metrics": metrics})

    return change


def dominated(front: Front, higher_is_better: bool) -> list[bool]:
    """By the definition, over all pairs."""
    sign = 1 if higher_is_better else -1
    points = [(one.cost, -sign * one.quality.mean) for one in front.points]
    return [any(other[0] <= own[0] and other[1] <= own[1] and other != own for other in points) for own in points]


@pytest.mark.parametrize(("primary", "higher_is_better"), [("bleu_4", True), ("perplexity", False)])
def test_the_front_is_what_no_row_dominates(tmp_path: Path, primary: str, higher_is_better: bool) -> None:
    found = efficiency_of(tmp_path, budgets=(64,), methods=MANY, seeds=(0,), primary=primary, change=scrambled(primary))
    (setting,) = found.settings
    assert [front.cost.name for front in setting.fronts] == ["parameters", "memory", "time"]
    for front in setting.fronts:
        assert [not one.on_front for one in front.points] == dominated(front, higher_is_better)
        assert [one.cost for one in front.points] == sorted(one.cost for one in front.points)
    parameters = setting.fronts[0]
    assert 1 < sum(one.on_front for one in parameters.points) < len(MANY)
    for line in setting.rows:
        on = [front.cost for front in setting.fronts if any(p.on_front and p.row is line.row for p in front.points)]
        assert list(line.fronts) == on


def test_costs_are_those_recorded(tmp_path: Path) -> None:
    (setting,) = efficiency_of(tmp_path, budgets=(64,)).settings
    by_name = {front.cost.name: {one.name: one.cost for one in front.points} for front in setting.fronts}
    assert by_name["parameters"] == {"none": 1_000, "LoRA specific": 40_000, "Full fine-tuning": 500_000}
    assert by_name["memory"]["LoRA specific"] == 3_485_248 + 4 * 40_000 + 8 * 40_000 + 41_000_000
    assert by_name["time"]["LoRA specific"] == 8.0


def test_examples_seen_are_compared_over_the_settings_of_a_sweep(tmp_path: Path) -> None:
    def longer(budget: int, epochs: int, method: str, grouping: str, seed: int) -> float:
        return any_score(budget, epochs, method, grouping, seed) + 0.05 * epochs

    found = efficiency_of(tmp_path, longer, budgets=(64, 1024), epochs=(2, 4))
    (front,) = found.examples
    assert sorted({one.cost for one in front.points}) == [128, 256, 2048, 4096]
    assert len(front.points) == 4 * len(METHODS)
    # Twice the epochs bring 0.1 here, twice the examples nothing.
    assert [one.name for one in front.points if one.on_front] == [
        "Full fine-tuning, examples=64 epochs=2",
        "Full fine-tuning, examples=64 epochs=4",
    ]


def test_cost_per_point_of_cider(tmp_path: Path) -> None:
    (setting,) = efficiency_of(tmp_path, budgets=(64,), seeds=(0,)).settings
    lora = next(line for line in setting.rows if line.row.method == "lora")
    assert lora.per_point is not None
    assert lora.per_point.seconds == pytest.approx(8 / 40)
    assert lora.per_point.parameters == pytest.approx(40_000 / 40)
    assert lora.per_gain is not None
    assert lora.per_gain.seconds == pytest.approx(8 / 20)
    assert lora.per_gain.parameters == pytest.approx(40_000 / 20)
    assert next(line for line in setting.rows if line.row.method == "none").per_gain is None


def test_nothing_gained_has_no_cost_per_point(tmp_path: Path) -> None:
    def worse(budget: int, epochs: int, method: str, grouping: str, seed: int) -> float:
        return 0.1 if method == "lora" else 0.2

    (setting,) = efficiency_of(tmp_path, worse, budgets=(64,)).settings
    lora = next(line for line in setting.rows if line.row.method == "lora")
    assert lora.per_gain is None
    assert lora.per_point is not None


def test_times_on_different_devices_are_not_compared(tmp_path: Path) -> None:
    def moved(record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"device": "GPU"}) if record.seed == 1 else record

    (setting,) = efficiency_of(tmp_path, budgets=(64,), change=moved).settings
    assert [front.cost.name for front in setting.fronts] == ["parameters", "memory"]
    assert setting.notes == (
        "trained on different devices (CPU, 2 cores (synthetic); GPU): their training times are not comparable",
    )


def test_what_was_not_measured_is_named(tmp_path: Path) -> None:
    def unmeasured(record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"memory": None}) if record.spec["adapter"]["method"] == "lora" else record

    (setting,) = efficiency_of(tmp_path, budgets=(64,), change=unmeasured).settings
    assert setting.notes == ("memory of the model in training not measured: LoRA specific",)
    assert [len(front.points) for front in setting.fronts] == [3, 2, 3]


TASKS = ("scenes", "trends", "vqa", "speech")


def by_task(record: TrialRecord) -> TrialRecord:
    """LoRA has 0.5, 0.8, 0.9 and 2 times the reference's score, a little more with each seed."""
    factor = (0.5, 0.8, 0.9, 2.0)[TASKS.index(record.spec["task"]["name"])]
    score = 0.4 * (factor + 0.01 * record.seed if record.spec["adapter"]["method"] == "lora" else 1.0)
    metrics = {**record.metrics, "test": {**record.metrics["test"], "cider": score, "perplexity": 1 / score}}
    return record.model_copy(update={"metrics": metrics})


@pytest.mark.parametrize("primary", ["cider", "perplexity"])
def test_the_interquartile_mean_across_tasks(tmp_path: Path, primary: str) -> None:
    across = efficiency_of(tmp_path, budgets=(64,), tasks=TASKS, primary=primary, change=by_task).across
    assert across is not None
    assert across.tasks == TASKS
    lora = next(row for row in across.rows if row.name == "LoRA specific")
    # The middle half of four is the two in the middle: 0.85 for seed 0, 0.86 and 0.87 for the others.
    assert lora.relative.mean == pytest.approx(0.86)
    assert lora.relative.n == 3
    assert lora.relative.low == pytest.approx(0.86 - 4.302653 * 0.01 / math.sqrt(3))
    assert lora.notes == ()
    assert "Full fine-tuning" not in [row.name for row in across.rows]
    assert "The intervals cover only the seeds" in across.words


def test_a_row_without_a_task_says_so(tmp_path: Path) -> None:
    def gap(record: TrialRecord) -> TrialRecord | None:
        task, method = record.spec["task"]["name"], record.spec["adapter"]["method"]
        return None if (task, method) == ("vqa", "lora") else by_task(record)

    across = efficiency_of(tmp_path, budgets=(64,), tasks=TASKS, change=gap).across
    assert across is not None
    lora = next(row for row in across.rows if row.name == "LoRA specific")
    assert lora.tasks == ("scenes", "trends", "speech")
    assert lora.notes == ("without name=vqa",)
    # The middle half of three is the one in the middle and a quarter of each other one.
    assert lora.relative.mean == pytest.approx((0.25 * 0.5 + 0.8 + 0.25 * 2.0) / 1.5 + 0.01)


def test_one_task_has_no_mean_across_tasks(tmp_path: Path) -> None:
    assert efficiency_of(tmp_path).across is None


def profiled(folder: Path, without: tuple[str, ...] = ()) -> Efficiency:
    """A sweep with a profile: LoRA takes 1.5 s for a step and 30 MiB, full fine-tuning 2 s and 60 MiB."""
    write_sweep(folder, any_score, budgets=(64,))
    run = read_run(folder)
    ids = {
        label: tuple(trial.trial_id for trial in run.plan.trials if trial.method == label)
        for label in dict.fromkeys(trial.method for trial in run.plan.trials)
    }
    entries = [
        ProfileEntry(
            key=method, name=method, setting="", trial_ids=own, reference="full", reference_trial_ids=ids["full"],
            device="cpu", step_time_s=Measured(median=seconds, n=15),
            step_time_ratio=Measured(median=seconds / 2, n=15), peak_memory_bytes=Measured(median=size * 2**20, n=1),
        )
        for method, own in ids.items()
        for seconds, size in [{"none": (1.0, 20), "lora": (1.5, 30), "full": (2.0, 60)}[method]]
        if method not in without
    ]  # fmt: skip
    write_profile(folder, Profile(entries=tuple(entries)))
    return build_efficiency(build_leaderboard(read_run(folder)))


def test_costs_are_those_of_the_profile_where_there_is_one(tmp_path: Path) -> None:
    (setting,) = profiled(tmp_path).settings
    by_name = {front.cost.name: {one.name: one.cost for one in front.points} for front in setting.fronts}
    steps = next(record.data.steps for record in read_run(tmp_path).records.values() if record.data)
    assert by_name["time"] == {
        "none": steps * 1.0,
        "LoRA specific": steps * 1.5,
        "Full fine-tuning": steps * 2.0,
    }
    assert by_name["memory"]["LoRA specific"] == 30 * 2**20
    assert [front.cost.label for front in setting.fronts][1:] == [
        "peak memory in training",
        "training time alone on the device",
    ]
    lora = next(line for line in setting.rows if line.row.method == "lora")
    assert lora.per_point is not None
    assert lora.per_point.seconds == pytest.approx(steps * 1.5 / 41)


def test_an_incomplete_profile_is_not_mixed_with_times_of_training(tmp_path: Path) -> None:
    (setting,) = profiled(tmp_path, without=("none",)).settings
    labels = [front.cost.label for front in setting.fronts]
    assert labels[1:] == ["memory of the model in training", "training time, as trained (not comparable)"]
    (time,) = [front for front in setting.fronts if front.cost.name == "time"]
    assert {one.cost for one in time.points} == {8.0}
