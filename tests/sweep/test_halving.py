"""Halving inside rows: decided by what trials recorded, once, as the leaderboard would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.core.record import (
    Epoch,
    PlannedTrial,
    Status,
    TrialRecord,
    paused_path,
    read_record,
    record_path,
    write_record,
)
from harness.core.search import Halving, read_decisions
from harness.sweep.halving import HalvedRows

pytestmark = pytest.mark.quick

ONE = Halving(rungs=(1,))
RATES = (1e-3, 2e-3, 3e-3, 4e-3)


def plan(
    halving: Halving = ONE, rates: Sequence[float] = RATES, seeds: Sequence[int] = (0, 1), method: str = "lora"
) -> list[PlannedTrial]:
    return [
        PlannedTrial(
            trial_id=f"{method}-{rate:g}-{seed}", label=method, method=method, grouping="", setting="", seed=seed,
            learning_rate=rate, halving=halving,
        )
        for rate in rates for seed in seeds
    ]  # fmt: skip


def recorded(trial: PlannedTrial, perplexities: Sequence[float], status: Status) -> TrialRecord:
    return TrialRecord(
        trial_id=trial.trial_id,
        experiment="e",
        status=status,
        spec={},
        seed=trial.seed,
        history=tuple(
            Epoch(epoch=n, step=n, train_loss=1.0, validation_perplexity=value, learning_rate=1e-3)
            for n, value in enumerate(perplexities, 1)
        ),
        wall_time_s=1.0,
        started_at="2026-01-01T00:00:00+00:00",
    )


def pause(run: Path, trial: PlannedTrial, *perplexities: float) -> None:
    path = paused_path(run, trial.trial_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recorded(trial, perplexities, "paused").model_dump_json())


def end(run: Path, trial: PlannedTrial, status: Status, *perplexities: float) -> None:
    write_record(run, recorded(trial, perplexities, status))


def going_on(rows: HalvedRows, trials: Sequence[PlannedTrial], epoch: int = 1) -> set[float | None]:
    return {trial.learning_rate for trial in trials if rows.goes_on(trial.trial_id, epoch)}


def test_a_row_is_decided_when_all_its_trials_have_come_so_far(tmp_path: Path) -> None:
    trials = plan()
    rows = HalvedRows(tmp_path, trials)
    for trial, score in zip(trials, (5, 5, 3, 4, 9, 2, 3, 3), strict=True):  # means 5, 3.5, 5.5, 3
        assert rows.goes_on(trials[0].trial_id, 1) is None
        pause(tmp_path, trial, score)
        rows.update(trial.trial_id)
    assert going_on(rows, trials) == {2e-3, 4e-3}
    (decision,) = read_decisions(tmp_path)
    assert [(one.learning_rate, one.validation_perplexity, one.goes_on) for one in decision.candidates] == [
        (1e-3, {0: 5, 1: 5}, False), (2e-3, {0: 3, 1: 4}, True),
        (3e-3, {0: 9, 1: 2}, False), (4e-3, {0: 3, 1: 3}, True),
    ]  # fmt: skip
    assert [trial_id for trial_id in decision.out if not rows.is_out(trial_id)] == []


def test_the_order_in_which_trials_come_does_not_matter(tmp_path: Path) -> None:
    trials = plan()
    kept = []
    for name, order in (("a", trials), ("b", trials[::-1])):
        rows = HalvedRows(tmp_path / name, trials)
        for trial in order:
            pause(tmp_path / name, trial, 1 + 7 * trials.index(trial) % 5)
            rows.update(trial.trial_id)
        kept.append(read_decisions(tmp_path / name))
    assert kept[0] == kept[1] != ()


def test_a_learning_rate_that_lost_a_seed_is_out_and_is_not_tried_again(tmp_path: Path) -> None:
    trials = plan(rates=RATES[:2])
    pause(tmp_path, trials[0], 9.0)
    pause(tmp_path, trials[1], 9.0)
    pause(tmp_path, trials[2], 1.0)
    end(tmp_path, trials[3], "failed")
    rows = HalvedRows(tmp_path, trials)
    rows.read()
    assert going_on(rows, trials) == {1e-3}
    pruned = read_record(record_path(tmp_path, trials[2].trial_id))
    assert (pruned.status, pruned.history[0].validation_perplexity) == ("pruned", 1.0)
    assert pruned.reason == "pruned at epoch 1: 1 of 2 learning rates go on, and a seed of 0.002 failed"
    assert [rows.is_out(trial.trial_id) for trial in trials] == [False, False, True, True]
    end(tmp_path, trials[3], "finished", 0.5)
    again = HalvedRows(tmp_path, trials)
    again.read()
    assert going_on(again, trials) == {1e-3}, "a decision is final"


def test_if_every_learning_rate_failed_none_goes_on(tmp_path: Path) -> None:
    trials = plan(rates=RATES[:2], seeds=(0,))
    for trial in trials:
        end(tmp_path, trial, "failed")
    rows = HalvedRows(tmp_path, trials)
    rows.read()
    assert going_on(rows, trials) == set()


def test_scores_are_the_lowest_up_to_the_rung_and_later_epochs_play_no_part(tmp_path: Path) -> None:
    trials = plan(Halving(rungs=(2,)), RATES[:2], (0,))
    pause(tmp_path, trials[0], 3.0, 8.0)
    end(tmp_path, trials[1], "finished", 5.0, 4.0, 1.0)
    rows = HalvedRows(tmp_path, trials)
    rows.read()
    assert going_on(rows, trials, 2) == {1e-3}


def test_each_rung_keeps_a_share_and_the_last_candidate_waits_for_nobody(tmp_path: Path) -> None:
    trials = plan(Halving(rungs=(1, 2, 3)), seeds=(0,))
    rows = HalvedRows(tmp_path, trials)
    for epoch, waiting in ((1, trials), (2, trials[:2])):
        for trial in waiting:
            pause(tmp_path, trial, *[float(1 + trials.index(trial))] * epoch)
            rows.update(trial.trial_id)
    assert [going_on(rows, trials, epoch) for epoch in (1, 2)] == [{1e-3, 2e-3}, {1e-3}]
    assert rows.goes_on(trials[0].trial_id, 3) is True
    rows.prune(trials[1].trial_id)
    pruned = read_record(record_path(tmp_path, trials[1].trial_id)).pruned
    assert pruned is not None
    assert (pruned.epoch, pruned.candidates, pruned.kept, pruned.halving.rungs) == (2, 2, 1, (1, 2, 3))
    assert (pruned.validation_perplexity, pruned.best_validation_perplexity) == (2.0, 1.0)
    assert not paused_path(tmp_path, trials[1].trial_id).exists()


def test_a_kill_between_a_decision_and_its_records_loses_nothing(tmp_path: Path) -> None:
    trials = plan(rates=RATES[:2], seeds=(0,))
    rows = HalvedRows(tmp_path, trials)
    for trial, score in zip(trials, (1.0, 2.0), strict=True):
        pause(tmp_path, trial, score)
        rows.update(trial.trial_id)
    assert not record_path(tmp_path, trials[1].trial_id).exists()
    again = HalvedRows(tmp_path, trials)
    again.read()
    assert read_record(record_path(tmp_path, trials[1].trial_id)).status == "pruned"
    assert going_on(again, trials) == {1e-3}


def test_more_seeds_or_another_halving_are_decided_anew(tmp_path: Path) -> None:
    trials = plan(seeds=(0,))
    for trial, score in zip(trials, (1.0, 2.0, 3.0, 4.0), strict=True):
        pause(tmp_path, trial, score)
    rows = HalvedRows(tmp_path, trials)
    rows.read()
    assert [rows.is_out(trial.trial_id) for trial in trials] == [False, False, True, True]
    later = HalvedRows(tmp_path, plan(Halving(rungs=(2,)), seeds=(0,)))
    later.read()
    assert not any(later.is_out(trial.trial_id) for trial in trials), "pruned trials have not come to epoch 2"
    assert read_decisions(tmp_path) == (), "void decisions are not kept for readers of the run folder"
    rows = HalvedRows(tmp_path, plan(seeds=(0, 1)))
    rows.read()
    assert not any(rows.is_out(trial.trial_id) for trial in trials)


def test_decisions_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "halving.json").write_text("{}x")
    with pytest.raises(UserError, match=r"halving\.json: .*without the file, halving is decided anew"):
        HalvedRows(tmp_path, plan())


def test_rows_do_not_depend_on_one_another_and_a_row_without_a_search_has_no_rungs(tmp_path: Path) -> None:
    lora, none, full = plan(seeds=(0,)), plan(rates=(1e-3,), seeds=(0,), method="none"), plan(method="full")
    for trial in lora:
        pause(tmp_path, trial, trial.learning_rate or 0.0)
    rows = HalvedRows(tmp_path, [*lora, *none, *full])
    rows.read()
    assert going_on(rows, lora) == {1e-3, 2e-3}
    assert rows.goes_on(full[0].trial_id, 1) is None
    assert (rows.rungs(none[0].trial_id), rows.rungs(full[0].trial_id)) == ((), (1,))
    assert not rows.is_out(none[0].trial_id)
