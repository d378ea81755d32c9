"""Rows whose learning rates were halved: what counts as effort, and which rows may be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.record import Plan, PlannedTrial, Pruned, TrialRecord, read_run
from harness.core.search import AtRung, Decision, Decisions, Halving
from results.leaderboard.progress import progress_of
from results.leaderboard.table import Leaderboard, Row, build_leaderboard
from tests.support.runs import METRICS, write_run

HALVING = Halving(rungs=(1,))
METHODS = ("none", "lora", "full")


def planned(halvings: dict[str, Halving | None]) -> Plan:
    """Each method with learning rates 1 and 2 and two seeds; the trial ids are method-rate-seed."""
    return Plan(
        experiment="e", experiment_file="e.yaml", primary_metric="perplexity", metrics=METRICS,
        trials=tuple(
            PlannedTrial(
                trial_id=f"{method}-{rate}-{seed}", label=method, method=method, grouping="", setting="", seed=seed,
                learning_rate=float(rate), halving=halvings[method],
            )
            for method in METHODS for rate in (1, 2) for seed in (0, 1)
        ),
    )  # fmt: skip


def board_of(folder: Path, halvings: dict[str, Halving | None], pruned: Callable[[str], bool]) -> Leaderboard:
    """A board where rate 2 of a method is pruned if ``pruned(method)``."""
    out = [f"{method}-2-{seed}" for method in METHODS if pruned(method) for seed in (0, 1)]

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        if trial.trial_id not in out:
            return record
        why = Pruned(
            epoch=1, halving=HALVING, validation_perplexity=9, best_validation_perplexity=8, candidates=2, kept=1
        )
        kept = {"status": "pruned", "pruned": why, "reason": "pruned at epoch 1", "metrics": {}}
        return record.model_copy(update={**kept, "history": record.history[:1]})

    write_run(folder, planned(halvings), change)
    rung = tuple(
        AtRung(learning_rate=rate, validation_perplexity={0: 8, 1: 8}, goes_on=rate == 1) for rate in (1.0, 2.0)
    )
    decision = Decision(row="digest", name="row", epoch=1, candidates=rung, out=tuple(out))
    (folder / "halving.json").write_text(Decisions(decisions=(decision,)).model_dump_json())
    return build_leaderboard(read_run(folder))


def row_of(board: Leaderboard, name: str) -> Row:
    return next(row for row in board.rows if row.name == name)


ALL: dict[str, Halving | None] = dict.fromkeys(METHODS, HALVING)


@pytest.mark.quick
def test_pruned_learning_rates_count_as_effort_and_are_no_failures(tmp_path: Path) -> None:
    board = board_of(tmp_path, ALL, lambda method: True)
    assert [(row.effort, row.halving, row.apart) for row in board.rows] == [(2, "halving at epoch 1 by 2", ())] * 3
    assert {row.chosen.learning_rate for row in board.rows} == {1.0}
    assert [candidate.pruned_at for candidate in board.rows[0].candidates] == [None, 1]
    assert not any("excluded from selection" in note for row in board.rows for note in row.notes)
    assert (len(board.pruned), board.failed, board.missing) == (6, (), ())
    progress = progress_of(board.run, active=False)
    assert (progress.finished, progress.pruned, progress.failures, progress.waiting, progress.planned) == (
        6,
        6,
        (),
        0,
        12,
    )


def test_a_row_that_was_not_halved_does_not_match(tmp_path: Path) -> None:
    board = board_of(tmp_path, {**ALL, "lora": None}, lambda method: method != "lora")
    assert row_of(board, "lora").apart == (
        "halving of the learning rates differs (none; full: halving at epoch 1 by 2)",
    )
    assert [row.apart for row in board.rows if row.name != "lora"] == [(), ()]


def test_a_row_searched_in_full_before_halving_was_planned_does_not_match(tmp_path: Path) -> None:
    board = board_of(tmp_path, ALL, lambda method: method != "lora")
    (reason,) = row_of(board, "lora").apart
    assert reason.startswith("halving of the learning rates differs (halving at epoch 1 by 2, but 2 learning rates")
    whole = board_of(tmp_path / "whole", ALL, lambda method: False)
    assert [row.apart for row in whole.rows] == [()] * 3, "all have had the same search"


def test_other_rungs_do_not_match(tmp_path: Path) -> None:
    board = board_of(tmp_path, {**ALL, "none": Halving(rungs=(2,))}, lambda method: True)
    assert "halving at epoch 2 by 2; full: halving at epoch 1 by 2" in row_of(board, "none").apart[0]


def test_what_another_halving_pruned_goes_on_and_has_not_ended(tmp_path: Path) -> None:
    board_of(tmp_path, ALL, lambda method: True)
    (tmp_path / "halving.json").unlink()
    board = build_leaderboard(read_run(tmp_path))
    assert [one.status for one in board.missing] == ["pruned"] * 6
    assert "1 of 2 learning rates has not ended: another one may still be chosen" in board.rows[0].notes
    assert progress_of(board.run, active=False).waiting == 6


@pytest.mark.parametrize("patience", [None, 2])
def test_with_patience_the_rule_must_agree_and_not_the_steps(tmp_path: Path, patience: int | None) -> None:
    budget = {"epochs": 10} | ({"patience": patience} if patience else {})

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        assert record.data is not None
        steps = 200 if trial.method == "lora" else record.data.steps
        return record.model_copy(
            update={"spec": {"budget": budget}, "data": record.data.model_copy(update={"steps": steps})}
        )

    board = build_leaderboard(read_run(write_run(tmp_path, planned(dict.fromkeys(METHODS)), change)))
    assert bool(row_of(board, "lora").apart) == (patience is None)
    assert ("stopped by patience=2 after 8 of 10 epochs" in row_of(board, "lora").notes) == (patience == 2)
