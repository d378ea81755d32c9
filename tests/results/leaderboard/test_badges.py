"""Badges of rows that do not answer, from made-up records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.core.record import Answers, MetricInfo, PlannedTrial, TrialRecord, read_run
from results.leaderboard.badges import LABELS, Badge, badges_of, doubts
from results.leaderboard.table import build_leaderboard
from results.statistics.intervals import Estimate
from tests.support.runs import fake_plan, fake_record, write_run

EXACT = MetricInfo(name="exact_match", label="Exact match", higher_is_better=True)
VARIED = Answers(texts=64, distinct=40, commonest="a cat", commonest_count=3, distinct_references=60)
ONE_TEXT = VARIED.model_copy(update={"distinct": 1, "commonest_count": 64})
CLASSES = VARIED.model_copy(
    update={
        "distinct": 2,
        "distinct_references": 2,
        "majority": "yes",
        "training_answers": 2,
        "majority_scores": {"exact_match": 0.6},
        "chance_scores": {"exact_match": 0.5},
    }
)


@dataclass(frozen=True)
class Badged:
    badges: tuple[Badge, ...]


def records(*answers: Answers | None, member: str = "") -> list[TrialRecord]:
    trial = fake_plan().trials[0]
    one = fake_record(trial, 1, 0.5)
    return [one.model_copy(update={"answers": {} if given is None else {member: given}}) for given in answers]


def found(
    *answers: Answers | None, use: Estimate | None = None, score: Estimate | None = None, **options: Any
) -> tuple[Badge, ...]:
    info = options.pop("info", EXACT)
    return badges_of(records(*answers, **options), {info.name: score} if score else {}, use, [info])


def test_one_text_for_all_is_a_doubt() -> None:
    (badge,) = found(ONE_TEXT, ONE_TEXT)
    assert badge == Badge("one_text", "writes the same text for all 64 test examples (“a cat”)", True)
    assert badge.label == "one text for all"
    (badge,) = found(VARIED, ONE_TEXT, VARIED)
    assert badge.text == "writes the same text for all 64 test examples with 1 of 3 seeds (“a cat”)"
    (badge,) = found(ONE_TEXT.model_copy(update={"commonest": ""}), member="trends")
    assert badge.text == "writes nothing for any of the 64 test examples of trends"
    (badge,) = found(ONE_TEXT.model_copy(update={"commonest": "word " * 40}))
    assert len(badge.text) < 130


@pytest.mark.parametrize(
    "harmless",
    [VARIED, None, ONE_TEXT.model_copy(update={"texts": 1}), ONE_TEXT.model_copy(update={"distinct_references": 1})],
)
def test_what_is_not_one_text_for_all(harmless: Answers | None) -> None:
    """One test example, or one right answer for all, may have one text; records of earlier versions say nothing."""
    assert found(harmless) == ()


def test_few_texts_are_said_without_a_doubt() -> None:
    (badge,) = found(VARIED.model_copy(update={"distinct": 3}))
    assert (badge.kind, badge.doubts_answer) == ("few_texts", False)
    assert badge.text == "writes at most 3 different texts for 64 test examples"
    assert found(VARIED.model_copy(update={"distinct": 4})) == ()


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (Estimate(1.0, 0.99, 1.01, 3), "ignores_input"),
        (Estimate(1.009, None, None, 1), "ignores_input"),
        (Estimate(0.8, 0.7, 0.9, 3), "ignores_input"),  # the wrong input is better
        (Estimate(1.3, 0.9, 1.7, 3), "input_unproven"),
        (Estimate(1.3, 1.2, 1.4, 3), None),
        (Estimate(1.3, None, None, 1), None),
        (None, None),
    ],
)
def test_use_of_the_input(use: Estimate | None, kind: str | None) -> None:
    badges = found(VARIED, use=use)
    assert [badge.kind for badge in badges] == ([kind] if kind else [])
    assert [badge.doubts_answer for badge in badges] == ([kind == "ignores_input"] if kind else [])
    if use is not None and badges:
        assert f"{use.mean:.3g}×" in badges[0].text


@pytest.mark.parametrize(
    ("score", "kind"),
    [
        (Estimate(0.6, 0.55, 0.65, 3), "at_constant"),
        (Estimate(0.4, None, None, 1), "at_constant"),
        (Estimate(0.7, 0.5, 0.9, 3), "constant_unproven"),
        (Estimate(0.7, 0.65, 0.75, 3), None),
        (None, None),
    ],
)
def test_a_score_is_compared_with_the_majority_answer(score: Estimate | None, kind: str | None) -> None:
    badges = found(CLASSES, CLASSES, score=score)
    assert [badge.kind for badge in badges] == ([kind] if kind else [])
    if kind:
        assert "always answering “yes” (0.6): Exact match 0." in badges[0].text


def test_chance_counts_where_it_is_better_than_the_majority_answer() -> None:
    lucky = CLASSES.model_copy(update={"chance_scores": {"exact_match": 0.65}})
    (badge,) = found(lucky, score=Estimate(0.63, 0.62, 0.64, 3))
    assert badge.text == "is no better than answering by chance (0.65): Exact match 0.63"


def test_a_rate_of_errors_is_compared_in_its_direction() -> None:
    info = EXACT.model_copy(update={"higher_is_better": False})
    assert found(CLASSES, score=Estimate(0.3, 0.2, 0.4, 3), info=info) == ()
    (badge,) = found(CLASSES, score=Estimate(0.9, 0.8, 1.0, 3), info=info)
    assert badge.kind == "at_constant"


def test_in_a_mixture_the_scores_of_the_same_task_are_compared() -> None:
    score, info = Estimate(0.4, 0.3, 0.5, 3), EXACT.model_copy(update={"name": "vqa/exact_match"})
    (badge,) = found(CLASSES, member="vqa", score=score, info=info)
    assert badge.kind == "at_constant"
    assert found(CLASSES, member="text", score=score, info=info) == ()
    assert found(CLASSES, member="vqa", score=score) == ()


def test_doubts_are_joined_and_others_are_left_out() -> None:
    badges = found(ONE_TEXT, use=Estimate(1.0, None, None, 1))
    assert doubts(Badged(badges)) == (
        "writes the same text for all 64 test examples (“a cat”) and ignores its input (with another example's input "
        "the perplexity is 1×)"
    )
    assert doubts(Badged(found(VARIED, use=Estimate(1.3, 0.9, 1.7, 3)))) == ""
    assert {badge.kind for badge in badges} <= LABELS.keys()


def test_rows_of_a_leaderboard_have_their_badges(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"answers": {"": ONE_TEXT if trial.method == "full" else VARIED}})

    board = build_leaderboard(read_run(write_run(tmp_path, fake_plan(seeds=(0, 1, 2)), change)))
    by_method = {row.method: [badge.kind for badge in row.badges] for row in board.rows}
    assert by_method["full"] == ["one_text"]
    assert by_method["lora"] == []
    assert by_method["none"] in (["ignores_input"], ["input_unproven"])
