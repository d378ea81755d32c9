"""The sentences above the tables, and the description of the intervals of each table (synthetic records)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from harness.core.record import Answers, Plan, PlannedTrial, Run, TrialRecord
from results.leaderboard import summary
from results.leaderboard.coverage import DAGGER, coverage
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.statistics.intervals import Difference, Estimate, Verdict
from tests.support.runs import METHODS, Change, fake_data, fake_plan, fake_record

BOTH = Estimate(1.0, 0.9, 1.1, 3, 0.01, 0.02, 50)
SEEDS = Estimate(1.0, 0.9, 1.1, 3, 0.01)
ONE = Estimate(1.0, None, None, 1)


def board_of(plan: Plan, change: Change = lambda _, record: record) -> Leaderboard:
    known = {(label, grouping): (trainable, quality) for label, _, grouping, trainable, quality in METHODS}
    records = {
        trial.trial_id: found
        for trial in plan.trials
        if (found := change(trial, fake_record(trial, *known[(trial.label, trial.grouping)]))) is not None
    }
    return build_leaderboard(Run(Path("nowhere"), plan, records, (), ()))


def with_primary(board: Leaderboard, estimates: list[Estimate]) -> Leaderboard:
    """The board with other estimates of the primary metric."""
    rows = [
        replace(row, metrics=row.metrics | {board.primary.name: estimate})
        for row, estimate in zip(board.rows, estimates, strict=True)
    ]
    return replace(board, rows=tuple(rows))


def joined(board: Leaderboard) -> str:
    return " ".join(summary.caveats(board))


@pytest.mark.parametrize(
    ("estimates", "said", "unsaid"),
    [
        ([BOTH] * 8, "and the choice of the 50 test examples, by resampling them.", "alone"),
        ([BOTH] * 6 + [SEEDS] * 2, f"those of 2 of 8 rows cover seeds alone ({DAGGER}).", "do not cover"),
        ([SEEDS] * 8, "They do not cover the choice of test examples", DAGGER),
        ([ONE] * 8, "one finished seed per row: no intervals, so nothing is shown to be better", "cover"),
    ],
)
def test_it_is_said_what_the_intervals_cover(estimates: list[Estimate], said: str, unsaid: str) -> None:
    sentence = summary.caveats(with_primary(board_of(fake_plan()), estimates))[0]
    assert said in sentence
    assert unsaid not in sentence


def test_pairs_that_are_not_separated_are_counted_and_not_called_equal() -> None:
    board = board_of(fake_plan())
    ranked = board.of(board.settings[0])
    pairs = [board.compare(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
    left = sum(one is not None and one.verdict == "unresolved" for one in pairs)
    assert 0 < left < len(pairs) == 28
    assert f"With 2 seeds {left} of 28 pairs of rows are not separated" in joined(board)
    assert "none is shown to be equal within 0.01" in joined(board)
    assert "not separated" not in joined(board_of(fake_plan(seeds=(0,))))


def test_the_headline_says_from_which_rows_the_best_is_not_separated() -> None:
    board = board_of(fake_plan())
    others = board.of(board.settings[0])[1:]
    level = [row for row in others if row.rank and row.rank[0] == 1]
    assert level
    said = summary.headline(board)[0]
    assert f"but is not separated yet from {level[0].name}" in said
    assert "tie" not in said


def test_rows_apart_are_counted_with_their_reasons() -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if trial.method != "lora":
            return record
        return record.model_copy(
            update={"data": fake_data(trial.seed).model_copy(update={"order_fingerprint": "other"})}
        )

    board = board_of(fake_plan(), change)
    assert (
        "2 rows are excluded from ranking, because they are not comparable with the others. "
        "LoRA r=4 specific and LoRA r=4 agnostic: order of the examples differs." in joined(board)
    )
    assert not any("LoRA" in sentence for sentence in summary.headline(board))


def test_other_devices_and_software_are_named() -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if trial.method == "ia3":
            versions = record.versions | {"torch": "2.12.0"}
            return record.model_copy(update={"device": "GPU", "versions": versions, "git_revision": "fedcba"})
        return record

    found = joined(board_of(fake_plan(), change))
    assert "The trials ran on 2 kinds of device (CPU, 2 cores (synthetic); GPU)" in found
    assert "ran different software versions: 2 revisions of the code; torch 2.12.0, 2.13.0." in found
    assert "software" not in joined(board_of(fake_plan()))
    assert "kinds of device" not in joined(board_of(fake_plan()))


def test_what_did_not_finish_or_could_not_be_read_is_counted() -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if trial.method == "full" and trial.seed == 0:
            return None
        if trial.method == "none" and trial.seed == 1:
            return record.model_copy(update={"status": "out_of_memory", "reason": "no", "metrics": {}})
        return record

    board = board_of(fake_plan(), change)
    run = replace(board.run, broken=("a: no",), foreign=("x", "y"), notes=("two runs were joined.",))
    found = joined(replace(board, run=run, unreadable=("z: no",)))
    assert "14 of 16 trials finished (1 out of memory, 1 not run)." in found
    assert "1 record file could not be read" in found
    assert "2 records that the plan does not name" in found
    assert "two runs were joined." in found
    assert "1 file of per-example scores could not be read" in found


def test_the_headline_counts_verdicts_after_correction() -> None:
    board = board_of(fake_plan(seeds=range(5)))
    others = [row for row in board.rows if not row.is_reference]
    p_values = [0.001, 0.04, 0.06, 0.5, None, 0.001, 0.3]
    rows = []
    for row, p in zip(others, p_values, strict=True):
        said = {0.001: "better", 0.04: "worse", 0.3: "equivalent"}.get(p or 0, "unresolved")
        found = Difference(0.1, -1, 1, 5, p_value=p and p / 10, p_adjusted=p, verdict=cast("Verdict", said))
        rows.append(replace(row, differences={board.primary.name: found}))
    reference = next(row for row in board.rows if row.is_reference)
    sentence = summary.headline(replace(board, rows=(reference, *rows)))[1]
    assert sentence == (
        "Against Full fine-tuning on the same data, paired by seed and corrected for all pairs of 8 rows, the other "
        "rows are: 2 better, 1 worse, 1 equal within the margin, 2 not separated yet, 1 on one seed only."
    )


def test_a_table_marks_what_covers_less_than_the_rest() -> None:
    alike = coverage({"a": [BOTH, BOTH], "b": [BOTH, None]})
    assert (alike.sentence, alike.head("a"), alike.cell("a", BOTH)) == (
        "Intervals (95 %) cover seeds and test examples.",
        "",
        "",
    )
    alone = coverage({"a": [SEEDS], "b": [SEEDS, ONE]})
    assert alone.sentence == "Intervals (95 %) cover seeds alone, not the choice of test examples."
    assert alone.head("a") == alone.cell("a", SEEDS) == ""
    mixed = coverage({"a": [BOTH, SEEDS], "b": [SEEDS, SEEDS], "c": [BOTH, ONE]})
    assert mixed.sentence.endswith(f"{DAGGER} seeds alone.")
    assert [mixed.head(column).strip() for column in "abc"] == ["", DAGGER, ""]
    assert [mixed.cell("a", one).strip() for one in (BOTH, SEEDS)] == ["", DAGGER]
    assert mixed.cell("b", SEEDS) == ""
    assert coverage({"a": [ONE, None]}).sentence == "One seed each: there are no intervals."


def test_a_winner_that_does_not_answer_is_named_in_the_same_sentence() -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        same = Answers(texts=64, distinct=1, commonest="a cat", commonest_count=64, distinct_references=60)
        return record.model_copy(update={"answers": {"": same}} if trial.method == "full" else {})

    plan = fake_plan(seeds=(0, 1, 2))
    first = summary.headline(board_of(plan, change))[0]
    assert first.startswith("Full fine-tuning has the best mean test CIDEr")
    assert ", although it writes the same text for all 64 test examples (“a cat”)" in first
    assert "although" not in summary.headline(board_of(plan))[0]
    alone = summary.headline(board_of(fake_plan(seeds=(0,)), change))[0]
    assert ", although it writes the same text for all 64 test examples (“a cat”), from a single seed" in alone


def test_clusters_are_said_to_be_what_is_drawn() -> None:
    def change(_: PlannedTrial, record: TrialRecord) -> TrialRecord:
        some = Answers(texts=120, distinct=90, commonest="a cat", commonest_count=2, distinct_references=100)
        return record.model_copy(update={"answers": {"": some}})

    sentence = summary.caveats(with_primary(board_of(fake_plan(), change), [BOTH] * 8))[0]
    assert "the choice of the test examples, by what they share (50 clusters of the 120 examples)" in sentence
