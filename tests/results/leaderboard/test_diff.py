"""Two leaderboards: what changed, against scipy's tests, and which rows are not comparable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_ind, ttest_rel

from harness.core.errors import UserError
from harness.core.record import PlannedTrial, TrialRecord, read_run
from results.leaderboard.diff import Change, diff
from results.leaderboard.published import PublishedLeaderboard, publish
from results.leaderboard.table import build_leaderboard
from tests.support.runs import fake_plan, write_run

LORA = "LoRA r=4 specific"
SCORES = [0.50, 0.58, 0.55, 0.61, 0.53]
Edit = Callable[[PlannedTrial, TrialRecord], TrialRecord | None]


def board(folder: Path, edit: Edit = lambda _, record: record, **changes: Any) -> PublishedLeaderboard:
    plan = fake_plan(**{"seeds": (0, 1, 2), "settings": ("",)} | changes)
    return publish(build_leaderboard(read_run(write_run(folder, plan, edit))))


def cider(values: dict[int, float], method: str = "lora") -> Edit:
    """Give the rows of a method these scores by seed."""

    def edit(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        if trial.method != method:
            return record
        return record.model_copy(update={"metrics": {"test": {"cider": values[trial.seed], "perplexity": 3.0}}})

    return edit


def of(old: PublishedLeaderboard, new: PublishedLeaderboard, name: str = LORA) -> Change:
    (change,) = (change for change in diff(old, new).changes if change.name == name)
    return change


def test_a_leaderboard_is_unchanged_from_itself(tmp_path: Path) -> None:
    one = board(tmp_path)
    found = diff(one, one)
    assert {change.verdict for change in found.changes} == {"unchanged"}
    assert len(found.changes) == 8
    assert all(change.notes == () and change.old_rank == change.new_rank for change in found.changes)


def test_the_same_seeds_are_paired(tmp_path: Path) -> None:
    before = dict(enumerate(SCORES))
    after = {seed: score + 0.1 + 0.01 * (-1) ** seed for seed, score in before.items()}
    seeds = tuple(before)
    change = of(board(tmp_path / "old", cider(before), seeds=seeds), board(tmp_path / "new", cider(after), seeds=seeds))
    expected = ttest_rel(list(after.values()), SCORES)
    interval = expected.confidence_interval(0.95)
    assert change.paired
    assert change.difference is not None
    assert (change.difference.low, change.difference.high) == pytest.approx((interval.low, interval.high))
    assert change.difference.p_value == pytest.approx(expected.pvalue)
    assert change.difference.p_adjusted == pytest.approx(2 * expected.pvalue)  # both groupings of LoRA changed alike
    assert change.verdict == "better"
    assert (change.old_mean, change.new_mean) == pytest.approx((np.mean(SCORES), np.mean(list(after.values()))))


@pytest.mark.parametrize("seeds", [(0, 1, 2, 3, 4), (0, 1, 2, 3)], ids=["paired", "unpaired"])
def test_perplexities_change_by_a_ratio(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    before = {seed: 3 + score for seed, score in enumerate(SCORES)}
    after = {seed: before[seed] * (1.2 + 0.01 * (-1) ** seed) for seed in seeds}

    def perplexity(values: dict[int, float]) -> Edit:
        return lambda trial, record: record.model_copy(update={"metrics": {"test": {"perplexity": values[trial.seed]}}})

    plan = {"primary_metric": "perplexity", "methods": [("LoRA r=4", "lora", "specific", 1, 0.5)]}
    old = board(tmp_path / "old", perplexity(before), seeds=tuple(before), **plan)
    change = of(old, board(tmp_path / "new", perplexity(after), seeds=seeds, **plan))
    logs = np.log(list(after.values())), np.log(list(before.values()))
    expected = ttest_rel(*logs) if len(seeds) == 5 else ttest_ind(*logs, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert change.difference is not None
    assert (change.difference.low, change.difference.high) == pytest.approx(
        (np.exp(interval.low), np.exp(interval.high))
    )
    assert change.difference.p_value == pytest.approx(expected.pvalue)
    assert (change.difference.null, change.verdict) == (1.0, "worse")
    assert change.difference.mean == pytest.approx(np.exp(logs[0].mean() - logs[1].mean()))


def test_other_seeds_are_tested_unpaired(tmp_path: Path) -> None:
    before, after = {0: 0.5, 1: 0.6, 2: 0.55}, {0: 0.5, 1: 0.6, 2: 0.55, 3: 0.2, 4: 0.3}
    change = of(board(tmp_path / "old", cider(before)), board(tmp_path / "new", cider(after), seeds=tuple(after)))
    expected = ttest_ind(list(after.values()), list(before.values()), equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert not change.paired
    assert change.difference is not None
    assert (change.difference.low, change.difference.high) == pytest.approx((interval.low, interval.high))
    assert change.difference.p_value == pytest.approx(expected.pvalue)
    assert change.verdict == "noise"
    assert "seeds: 0, 1, 2 → 0, 1, 2, 3, 4" in change.notes


def test_false_alarms_are_held_over_many_rows() -> None:
    """Of re-runs of a grid without any change in truth at most about 5 % may show one (Holm over its rows)."""
    rng = np.random.default_rng(0)
    rounds = 250
    alarms = sum(
        any(
            (p := found.difference.p_adjusted if found.difference else None) is not None and p <= 0.05
            for found in diff(noisy(rng), noisy(rng)).changes
        )
        for _ in range(rounds)
    )
    assert alarms / rounds < 0.05 + 3 * (0.05 * 0.95 / rounds) ** 0.5


def noisy(rng: np.random.Generator, rows: int = 6, seeds: int = 5) -> PublishedLeaderboard:
    """Rows whose scores are only noise."""
    data = {
        seed: {"examples": 1, "examples_fingerprint": "a", "order_fingerprint": "b", "evaluation_fingerprint": "c"}
        | {"steps": 1}
        for seed in range(seeds)
    }
    absent = dict.fromkeys(
        ("rank", "learning_rate", "input_use", "parameters", "peak_bytes", "examples_per_s", "tokens_per_s", "profile")
    ) | dict.fromkeys(("train_time_s", "wall_time_s"))
    score = dict.fromkeys(("low", "high", "seed_se", "example_se", "examples")) | {"covers": "", "seeds": 5, "mean": 0}
    made = [
        absent
        | {"setting": "", "label": str(row), "method": "x", "grouping": "", "is_reference": False, "apart": []}
        | {
            "effort": 1,
            "halving": "",
            "candidates": [],
            "seeds_finished": 5,
            "seeds_planned": 5,
            "trial_ids": {},
            "data": data,
        }
        | {"differences": {}, "notes": [], "badges": []}
        | {"metrics": {"m": score | {"by_seed": {seed: rng.normal() for seed in range(seeds)}}}}
        for row in range(rows)
    ]
    return PublishedLeaderboard.model_validate(
        {
            "created_from": {"experiments": [], "run_folders": [], "git_revisions": [], "versions": {}},
            "primary_metric": "m",
            "metrics": [
                {"name": "m", "label": "M", "higher_is_better": True, "scale": "identity", "lower": None, "upper": None}
            ],
            "reference_method": "full",
            "rows": made,
            "deltas": [],
            "unfinished": [],
        }
    )


def test_one_seed_is_not_tested(tmp_path: Path) -> None:
    old = board(tmp_path / "old", cider({0: 0.5}), seeds=(0,))
    change = of(old, board(tmp_path / "new", cider({0: 0.9}), seeds=(0,)))
    assert change.verdict == "untested"
    assert change.difference is not None
    assert (change.difference.mean, change.difference.p_value) == (pytest.approx(0.4), None)
    more = of(old, board(tmp_path / "more", cider({0: 0.9, 1: 0.8}), seeds=(0, 1)))
    assert (more.verdict, more.paired) == ("untested", False)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("examples_fingerprint", "x", "training examples differ"),
        ("order_fingerprint", "x", "order of the examples differs"),
        ("evaluation_fingerprint", "x", "evaluation examples differ"),
        ("steps", 7, "number of optimizer steps differs"),
        ("started_from", ("x",), "adapter groups started from other weights"),
    ],
)
def test_rows_on_other_data_are_not_comparable(tmp_path: Path, field: str, value: Any, reason: str) -> None:
    def smuggled(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        assert record.data is not None
        if (trial.method, trial.seed) != ("lora", 1):
            return record
        return record.model_copy(update={"data": record.data.model_copy(update={field: value})})

    old, new = board(tmp_path / "old"), board(tmp_path / "new", smuggled)
    change = of(old, new)
    assert (change.verdict, change.reason, change.difference) == ("not comparable", reason, None)
    assert any(note.startswith("now excluded from ranking: ") for note in change.notes)
    assert "no longer excluded from ranking" in of(new, old).notes
    assert of(old, new, "IA3 agnostic").verdict == "unchanged"


def test_a_row_without_data_or_score_is_not_comparable(tmp_path: Path) -> None:
    old = board(tmp_path / "old")
    new = board(tmp_path / "new", lambda t, r: r.model_copy(update={"data": None}) if t.method == "lora" else r)
    assert of(old, new).reason == "the training data are not recorded"
    new = board(tmp_path / "later", lambda t, r: None if t.method == "lora" else r)
    change = of(old, new)
    assert (change.verdict, change.reason, change.new_mean) == ("not comparable", "no CIDEr in the new one", None)


def test_rows_that_came_and_went_and_changed_ranks(tmp_path: Path) -> None:
    methods = [("LoRA r=4", "lora", "specific", 1, 0.5), ("Full fine-tuning", "full", "", 1, 0.5)]
    old = board(tmp_path / "old", methods=[*methods, ("IA3", "ia3", "agnostic", 1, 0.5)])
    scores = {0: 9.0, 1: 9.01, 2: 9.02}
    new = board(tmp_path / "new", cider(scores), methods=[*methods, ("BitFit", "bitfit", "specific", 1, 0.5)])
    found = diff(old, new)
    by_name = {change.name: change for change in found.changes}
    assert [change.name for change in found.changes][-1] == "IA3 agnostic"  # after the rows of the new one
    assert (by_name[LORA].old_rank, by_name[LORA].new_rank) == ((1, 2), (1, 1))
    came, went = by_name["BitFit specific"], by_name["IA3 agnostic"]
    assert (came.verdict, came.old_mean, came.old_rank, came.difference) == ("new", None, None, None)
    assert came.new_mean == pytest.approx(
        new.rows[[row.name for row in new.rows].index(came.name)].metrics["cider"].mean
    )
    assert came.new_rank is not None
    assert (went.verdict, went.new_mean, went.new_rank, went.difference) == ("removed", None, None, None)
    assert went.old_mean is not None
    tested = [change for change in found.changes if change.difference]
    assert {change.name for change in tested} == {LORA}  # p is corrected over these alone
    assert tested[0].difference is not None
    assert tested[0].difference.p_adjusted == tested[0].difference.p_value


def test_metrics_must_be_shared(tmp_path: Path) -> None:
    old = board(tmp_path / "old")
    new = board(tmp_path / "new", primary_metric="perplexity")
    with pytest.raises(UserError, match=r"different primary metrics \(cider, perplexity\); choose one .* \(--metric\)"):
        diff(old, new)
    assert diff(old, new, "bleu_4").metric.label == "BLEU-4"
    with pytest.raises(
        UserError, match=r"--metric: 'blue_4' is not a metric of both leaderboards; .*did you mean 'bleu_4'"
    ):
        diff(old, new, "blue_4")
    turned = tuple(info.model_copy(update={"higher_is_better": not info.higher_is_better}) for info in old.metrics)
    with pytest.raises(UserError, match=r"'cider' is better when higher in one leaderboard"):
        diff(old, old.model_copy(update={"metrics": turned}))
