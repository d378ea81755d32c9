"""Which trials are compared, and what the leaderboard makes of whole, partial and unmatched runs (made-up records)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_fixture import METHODS, Change, fake_plan, fake_record, write_run

from harness.errors import UserError
from harness.record import Plan, PlannedTrial, TrialRecord, read_run
from results.matched import mismatch
from results.table import Leaderboard, Row, build_leaderboard, leaderboard_rows
from results.words import caveats, headline

MISMATCHES = {
    "examples_fingerprint": ("x", "training examples differ"),
    "order_fingerprint": ("x", "order of the examples differs"),
    "evaluation_fingerprint": ("x", "evaluation examples differ"),
    "started_from": (("x",), "adapter groups trained before, on other data"),
    "steps": (512, r"number of optimizer steps differs (512, 256)"),
}


def with_data(record: TrialRecord, **changes: Any) -> TrialRecord:
    assert record.data is not None
    return record.model_copy(update={"data": record.data.model_copy(update=changes)})


def board_of(folder: Path, plan: Plan | None = None, change: Change = lambda _, record: record) -> Leaderboard:
    return build_leaderboard(read_run(write_run(folder, plan or fake_plan(), change)))


def row_of(board: Leaderboard, name: str) -> Row:
    return next(row for row in board.rows if row.name == name)


@pytest.fixture
def trial() -> PlannedTrial:
    return fake_plan().trials[0]


def test_the_same_data_match(trial: PlannedTrial) -> None:
    assert mismatch(fake_record(trial, 10, 0.1), fake_record(trial, 99, 0.9)) is None


@pytest.mark.parametrize("field", MISMATCHES)
def test_each_mismatch_has_its_reason(trial: PlannedTrial, field: str) -> None:
    value, reason = MISMATCHES[field]
    record = fake_record(trial, 10, 0.1)
    assert mismatch(with_data(record, **{field: value}), record) == reason


def test_other_seed_or_no_data_do_not_match(trial: PlannedTrial) -> None:
    record = fake_record(trial, 10, 0.1)
    assert mismatch(record, record.model_copy(update={"seed": 5})) == "seed differs (0, 5)"
    assert mismatch(record, record.model_copy(update={"data": None})) == "what was trained on is not recorded"


@pytest.mark.parametrize("field", MISMATCHES)
def test_a_smuggled_mismatch_is_neither_ranked_nor_compared(tmp_path: Path, field: str) -> None:
    value, reason = MISMATCHES[field]

    def smuggle(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        return with_data(record, **{field: value}) if trial.method == "lora" else record

    board = board_of(tmp_path, change=smuggle)
    row = row_of(board, "LoRA r=4 specific")
    assert row.rank is None
    assert row.differences == {}
    assert any(reason in note for note in row.notes)
    ranked = [row for row in board.rows if row.rank]
    assert len(ranked) == 6
    assert max(row.rank[1] for row in ranked if row.rank) == 6
    assert "Not ranked" in " ".join(caveats(board))
    # The two LoRA rows match each other, so the step from agnostic to specific stands.
    assert "cider" in next(delta for delta in board.deltas if delta.label == "LoRA r=4").differences


def test_one_unmatched_seed_is_left_out_of_the_difference(tmp_path: Path) -> None:
    def smuggle(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        odd = trial.method == "bitfit" and trial.seed == 1
        return with_data(record, order_fingerprint="other") if odd else record

    row = row_of(board_of(tmp_path, change=smuggle), "BitFit agnostic")
    assert row.differences["cider"].n == 1
    assert row.differences["cider"].low is None
    assert "seed 1 not compared with Full fine-tuning: order of the examples differs" in row.notes


def test_means_differences_and_order(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    row, full = row_of(board, "LoRA r=4 specific"), row_of(board, "Full fine-tuning")
    ciders = [board.run.records[trial.trial_id].metrics["test"]["cider"] for trial in row.trials]
    references = [board.run.records[trial.trial_id].metrics["test"]["cider"] for trial in full.trials]
    assert row.metrics["cider"].mean == pytest.approx(sum(ciders) / 2)
    assert row.differences["cider"].mean == pytest.approx((sum(ciders) - sum(references)) / 2)
    assert row.input_use is not None
    assert row.input_use.mean == pytest.approx(1.95, abs=0.02)
    assert full.is_reference
    assert full.differences == {}
    means = [row.metrics["cider"].mean for row in board.rows]
    assert means == sorted(means, reverse=True)
    assert len(board.deltas) == 3


def test_a_lower_is_better_primary_turns_the_order(tmp_path: Path) -> None:
    board = board_of(tmp_path, fake_plan(primary_metric="perplexity"))
    means = [row.metrics["perplexity"].mean for row in board.rows]
    assert means == sorted(means)


def test_clear_gaps_are_ranked_and_overlaps_tie(tmp_path: Path) -> None:
    value = {"none": 0.1, "ia3": 0.5, "bitfit": 0.5, "lora": 0.9, "full": 1.3}

    def steady(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        test = record.metrics["test"] | {"cider": value[trial.method] + 0.001 * trial.seed}
        return record.model_copy(update={"metrics": {"test": test}})

    board = board_of(tmp_path, change=steady)
    assert [row.rank_text for row in board.rows] == ["1", "2–3", "2–3", "4–7", "4–7", "4–7", "4–7", "8"]
    assert "its interval lies clear of all 7 others" in headline(board)[0]
    assert "the 7 other rows are: 7 worse." in headline(board)[1]


def test_one_seed_has_no_interval_and_all_tie(tmp_path: Path) -> None:
    board = board_of(tmp_path, fake_plan(seeds=(3,)))
    assert {row.rank for row in board.rows} == {(1, 8)}
    assert all(row.metrics["cider"].low is None for row in board.rows)
    assert "from a single seed" in headline(board)[0]
    assert "no intervals" in caveats(board)[0]


def test_failed_and_missing_trials_are_listed_and_rows_marked(tmp_path: Path) -> None:
    def lose(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if trial.method == "none" and trial.seed == 0:
            return None
        if trial.method == "full":
            return record.model_copy(update={"status": "out_of_memory", "reason": "3.1 GiB needed", "metrics": {}})
        return record

    board = board_of(tmp_path, change=lose)
    assert [(one.status, one.reason) for one in board.failed] == [("out_of_memory", "3.1 GiB needed")] * 2
    assert [one.trial.method for one in board.missing] == ["none"]
    assert row_of(board, "none").incomplete
    assert row_of(board, "none").seeds == "1/2"
    assert row_of(board, "Full fine-tuning").metrics == {}
    assert board.rows[-1].name == "Full fine-tuning"
    assert row_of(board, "IA3 agnostic").rank is not None
    assert "Full fine-tuning has not finished" in row_of(board, "IA3 agnostic").notes[0]
    assert "13 of 16 trials finished (2 failed, 1 not run)" in " ".join(caveats(board))


def test_without_the_reference_in_the_plan_rows_are_still_ranked(tmp_path: Path) -> None:
    board = board_of(tmp_path, fake_plan(methods=METHODS[:-1]))
    assert board.rows[0].rank is not None
    assert board.rows[0].notes == ("no 'full' trial in this setting to compare with",)
    assert "no comparison with 'full'" in " ".join(headline(board))


def test_nothing_finished(tmp_path: Path) -> None:
    board = board_of(tmp_path, change=lambda trial, record: None)
    assert headline(board) == ["No trial has finished: there is nothing to compare yet."]
    assert len(board.missing) == 16
    assert all(row.rank is None for row in board.rows)


def test_an_absent_metric_stays_absent(tmp_path: Path) -> None:
    def drop(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        kept = {name: value for name, value in record.metrics["test"].items() if name == "perplexity"}
        return record.model_copy(update={"metrics": {"test": kept}}) if trial.method == "ia3" else record

    row = row_of(board_of(tmp_path, change=drop), "IA3 specific")
    assert set(row.metrics) == {"perplexity"}
    assert (row.input_use, row.rank) == (None, None)


def test_settings_are_never_compared_with_each_other(tmp_path: Path) -> None:
    board = board_of(tmp_path, fake_plan(settings=("examples=128", "examples=512")))
    assert board.settings == ("examples=128", "examples=512")
    assert {len(board.of(setting)) for setting in board.settings} == {8}
    assert max(row.rank[1] for row in board.rows if row.rank) == 8


def test_unused_input_is_said_in_words(tmp_path: Path) -> None:
    assert "not shown to use their input (none)" in " ".join(caveats(board_of(tmp_path)))


def test_an_unknown_primary_metric_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write_run(tmp_path, fake_plan(primary_metric="ciderr"))
    with pytest.raises(UserError, match=r"primary_metric: 'ciderr' is not a metric.*did you mean 'cider'"):
        leaderboard_rows(read_run(tmp_path))


def test_two_trials_of_one_row_and_seed_are_refused(tmp_path: Path) -> None:
    trials = fake_plan().trials
    write_run(tmp_path, fake_plan(trials=(*trials, trials[0].model_copy(update={"trial_id": "again"}))))
    with pytest.raises(ValueError, match="again: a trial with the same label, setting and seed exists"):
        leaderboard_rows(read_run(tmp_path))
