"""What the leaderboard makes of whole and partial runs and of learning-rate searches (made-up records)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.core.files import write_atomically
from harness.core.record import Plan, PlannedTrial, TrialRecord, read_run, record_path
from results.leaderboard.summary import caveats, headline
from results.leaderboard.table import Leaderboard, Row, build_leaderboard
from tests.support.runs import METHODS, Change, fake_plan, write_run

pytestmark = pytest.mark.quick


def board_of(folder: Path, plan: Plan | None = None, change: Change = lambda _, record: record) -> Leaderboard:
    return build_leaderboard(read_run(write_run(folder, plan or fake_plan(), change)))


def row_of(board: Leaderboard, name: str) -> Row:
    return next(row for row in board.rows if row.name == name)


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
        wobble = 0.001 * ((trial.seed * 7 + len(trial.trial_id)) % 5)
        test = record.metrics["test"] | {"cider": value[trial.method] + wobble}
        return record.model_copy(update={"metrics": {"test": test}})

    board = board_of(tmp_path, fake_plan(seeds=range(5)), steady)
    assert [row.rank_text for row in board.rows] == ["1", "2–3", "2–3", "4–7", "4–7", "4–7", "4–7", "8"]
    assert "is shown to be ahead of all 7 others" in headline(board)[0]
    assert "the other rows are: 7 worse" in headline(board)[1]


def test_one_seed_has_no_interval_and_all_tie(tmp_path: Path) -> None:
    board = board_of(tmp_path, fake_plan(seeds=(3,)))
    assert {row.rank for row in board.rows} == {(1, 8)}
    assert all(row.metrics["cider"].low is None for row in board.rows)
    assert "from a single seed" in headline(board)[0]
    assert "no intervals" in caveats(board)[0]
    assert all(found.p_adjusted is None for row in board.rows for found in row.differences.values())


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
    assert row_of(board, "none").rank is not None
    assert row_of(board, "IA3 agnostic").notes == (
        "not compared with Full fine-tuning: Full fine-tuning has not finished",
    )
    assert row_of(board, "Full fine-tuning").notes == ()
    assert "13 of 16 trials finished (2 out of memory, 1 not run)" in " ".join(caveats(board))


def test_a_trial_whose_record_cannot_be_read_is_not_said_to_have_not_run(tmp_path: Path) -> None:
    board = board_of(tmp_path, change=lambda trial, record: None)
    broken = record_path(tmp_path, board.run.plan.trials[0].trial_id)
    write_atomically(broken, "{")
    board = build_leaderboard(read_run(tmp_path))
    ((status, reason),) = [(one.status, one.reason) for one in board.failed]
    assert (status, len(board.missing)) == ("unreadable", 15)
    assert str(reason).startswith(f"{broken}: not a trial record: Invalid JSON")


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
    assert "not shown to use the input (none)" in " ".join(caveats(board_of(tmp_path)))


def test_an_unknown_primary_metric_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write_run(tmp_path, fake_plan(primary_metric="ciderr"))
    with pytest.raises(UserError, match=r"primary_metric: 'ciderr' is not a metric.*did you mean 'cider'"):
        build_leaderboard(read_run(tmp_path))


def test_two_trials_of_one_row_and_seed_are_refused(tmp_path: Path) -> None:
    trials = fake_plan().trials
    write_run(tmp_path, fake_plan(trials=(*trials, trials[0].model_copy(update={"trial_id": "again"}))))
    with pytest.raises(ValueError, match="again: a trial with the same label, setting and seed exists"):
        build_leaderboard(read_run(tmp_path))


RATES = (0.001, 0.01, 0.1)


def search_plan(searched: Sequence[str] = ("lora",), tried: Mapping[str, tuple[float, ...]] = {}) -> Plan:
    """A plan in which some methods try three learning rates, and some declare that they tried others before."""
    trials = []
    for trial in fake_plan().trials:
        before = {"tried_learning_rates": tried.get(trial.method, ())}
        rates = RATES if trial.method in searched else RATES[:1]
        trials += [
            trial.model_copy(update={"trial_id": f"{trial.trial_id}-{rate}", "learning_rate": rate} | before)
            for rate in rates
        ]
    return fake_plan(trials=tuple(trials))


def validated(record: TrialRecord, perplexity: float) -> TrialRecord:
    return record.model_copy(update={"metrics": record.metrics | {"validation": {"perplexity": perplexity}}})


def by_rate(scores: Mapping[float, float]) -> Change:
    """LoRA's validation perplexity by learning rate; a rate that is not named has not run."""

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if trial.method != "lora":
            return record
        assert trial.learning_rate is not None
        return validated(record, scores[trial.learning_rate]) if trial.learning_rate in scores else None

    return change


METHOD_NAMES = tuple({method for _, method, *_ in METHODS})


def test_the_rate_that_validates_best_is_chosen_and_alone_is_scored(tmp_path: Path) -> None:
    board = board_of(tmp_path, search_plan(METHOD_NAMES), by_rate({0.001: 9.0, 0.01: 5.0, 0.1: 7.0}))
    row = row_of(board, "LoRA r=4 specific")
    assert [candidate.learning_rate for candidate in row.candidates] == list(RATES)
    assert [candidate.validation.mean for candidate in row.candidates if candidate.validation] == [9.0, 5.0, 7.0]
    assert (row.chosen.learning_rate, row.effort, row.seeds) == (0.01, 3, "2/2")
    scores = [board.run.records[f"{trial.trial_id}"].metrics["test"]["cider"] for trial in row.chosen.trials]
    assert row.metrics["cider"].mean == pytest.approx(sum(scores) / 2)
    assert (len(board.rows), row.apart, row.notes) == (8, (), ())
    assert all(row.rank for row in board.rows)


def test_a_row_that_was_searched_for_harder_is_apart(tmp_path: Path) -> None:
    board = board_of(tmp_path, search_plan(), by_rate({0.001: 9.0, 0.01: 5.0, 0.1: 7.0}))
    for row in board.rows:
        harder = ("learning-rate search effort differs (3 tried, Full fine-tuning 1)",)
        assert row.apart == (harder if row.method == "lora" else ())
        assert (row.rank is None) == (row.method == "lora")
        assert bool(row.differences) == (row.method in {"none", "ia3", "bitfit"})
    # Agnostic and specific were searched for alike.
    assert all("cider" in delta.differences for delta in board.deltas)


def test_rates_tried_before_count_once_each(tmp_path: Path) -> None:
    others = {method: (0.001, 0.02, 0.2) for method in METHOD_NAMES if method != "lora"}
    board = board_of(tmp_path, search_plan(tried=others), by_rate({0.001: 9.0, 0.01: 5.0, 0.1: 7.0}))
    assert {row.effort for row in board.rows} == {3}
    assert not any(row.apart for row in board.rows)
    board = board_of(tmp_path / "fewer", search_plan(tried={**others, "none": (0.2,)}))
    assert row_of(board, "none").apart == ("learning-rate search effort differs (2 tried, Full fine-tuning 3)",)


def test_while_a_search_runs_its_row_is_apart_and_says_what_is_missing(tmp_path: Path) -> None:
    board = board_of(tmp_path, search_plan(METHOD_NAMES), by_rate({0.01: 5.0}))
    row = row_of(board, "LoRA r=4 agnostic")
    assert (row.chosen.learning_rate, row.effort, row.rank) == (0.01, 1, None)
    assert row.apart == (
        "learning-rate search effort differs (1 tried, Full fine-tuning 3); 2 of 3 learning rates have not ended",
    )
    assert row.notes == ("2 of 3 learning rates have not ended: another one may still be chosen",)
    assert len(board.missing) == 8
    assert {one.trial.learning_rate for one in board.missing} == {0.001, 0.1}


def test_where_the_references_search_runs_the_others_say_so(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        return None if trial.method == "full" and trial.learning_rate == 0.1 else record

    row = row_of(board_of(tmp_path, search_plan(METHOD_NAMES), change), "none")
    assert row.apart == (
        "learning-rate search effort differs (3 tried, Full fine-tuning 2); "
        "Full fine-tuning: 1 of 3 learning rates has not ended",
    )


def test_seeds_that_no_rate_has_come_to_yet_leave_the_search_as_it_is(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        return None if trial.method == "lora" and trial.seed == 1 else record

    row = row_of(board_of(tmp_path, search_plan(METHOD_NAMES), change), "LoRA r=4 agnostic")
    assert (row.effort, row.apart, row.incomplete) == (3, (), True)
    assert row.notes[0] == "3 of 3 learning rates have not ended: another one may still be chosen"


def test_a_rate_at_which_training_fails_was_tried_and_is_not_chosen(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        if trial.method == "lora" and trial.learning_rate == 0.1:
            if trial.seed == 1:
                return record.model_copy(update={"status": "failed", "reason": "loss is nan", "metrics": {}})
            return validated(record, 1.0)  # the best, on one seed
        return validated(record, {0.001: 5.0, 0.01: 6.0, 0.1: 7.0}[trial.learning_rate or 0])

    board = board_of(tmp_path, search_plan(METHOD_NAMES), change)
    row = row_of(board, "LoRA r=4 agnostic")
    assert (row.chosen.learning_rate, row.effort, row.apart) == (0.001, 3, ())
    assert row.notes == ("learning rate 0.1 was excluded from selection: 1 of 2 trials failed",)
    assert [(one.trial.learning_rate, one.status, one.reason) for one in board.failed] == [
        (0.1, "failed", "loss is nan")
    ] * 2


def test_rates_are_compared_on_the_seeds_that_they_share(tmp_path: Path) -> None:
    lost = {(0.001, 2), (0.01, 0)}
    # By seed; seed 0 is the easy one. On seed 1, which they share, 0.01 is better; by plain means 0.001 would be.
    scores = {(0.001, 0): 1.0, (0.001, 1): 6.0, (0.01, 1): 5.0, (0.01, 2): 8.0}

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        key = (trial.learning_rate or 0, trial.seed)
        return None if trial.method == "lora" and key in lost else validated(record, scores.get(key, 3.0))

    methods = [method for method in METHODS if method[1] == "lora"]
    trials = [
        trial.model_copy(update={"trial_id": f"{trial.trial_id}-{rate}", "learning_rate": rate})
        for trial in fake_plan(seeds=(0, 1, 2), methods=methods).trials
        for rate in (0.001, 0.01)
    ]
    board = board_of(tmp_path, fake_plan(trials=tuple(trials)), change)
    assert {row.chosen.learning_rate for row in board.rows} == {0.01}
