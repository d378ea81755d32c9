"""The first card: the question, the recommendation, its price, and how sure it is (synthetic records)."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.record import PlannedTrial, TrialRecord, read_run
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.page.answer import FirstCard, first_card
from tests.support.grid import write_grid
from tests.support.runs import fake_plan, write_run


def level(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
    """LoRA is as good as full fine-tuning up to its noise; every other row is far behind."""
    score = {"lora": 1.0, "full": 1.001}.get(trial.method, 0.3) + 0.004 * ((trial.seed * 7 + len(trial.trial_id)) % 5)
    spec = {**record.spec, "task": {"name": "scenes"}, "backbone": {"language_model": "builtin/tiny-llama"}}
    test = record.metrics["test"] | {"cider": score}
    return record.model_copy(update={"metrics": {**record.metrics, "test": test}, "spec": spec})


def board_of(folder: Path, **changes: object) -> Leaderboard:
    return build_leaderboard(read_run(write_run(folder, fake_plan(seeds=(0, 1, 2), **changes), level)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> FirstCard:
    return first_card(board_of(tmp_path_factory.mktemp("run")))


def test_the_question_says_what_is_compared_by_what_and_with_how_much_evidence(card: FirstCard) -> None:
    assert card.question == (
        "Which of 8 ways to fine-tune tiny-llama for scenes? Test CIDEr (higher is better), 3 seeds."
    )


def test_the_cheapest_good_row_is_named_with_its_prices_as_figures(card: FirstCard) -> None:
    assert card.title == "Use LoRA r=4 agnostic"
    assert card.price_of == "Relative to Full fine-tuning:"
    assert [(one.label, one.text) for one in card.prices][:2] == [("trainable parameters", "8 %"), ("memory", "88 %")]
    assert "%" not in card.sentence.partition("[")[0]  # the figures are not said twice
    assert card.sentence[0].isupper()
    assert card.others == ()
    assert card.sure


def test_a_row_that_is_the_reference_has_its_own_price(tmp_path: Path) -> None:
    card = first_card(
        board_of(tmp_path, methods=(("none", "none", "", 9_312, 0.0), ("Full fine-tuning", "full", "", 561_312, 1.0)))
    )
    assert (card.title, card.price_of) == ("Use Full fine-tuning", "Its price:")
    assert card.prices[0].text == "561k"


def test_several_settings_have_one_answer_and_one_each(tmp_path: Path) -> None:
    card = first_card(build_leaderboard(read_run(write_grid(tmp_path))))
    assert card.title == "Use LoRA r=8 specific"
    assert "in 4 settings" in card.question
    assert [one.setting for one in card.others] == [f"examples={one}" for one in (64, 256, 1024, "all")]
    assert card.sure[0].startswith("In ")


def test_nothing_to_recommend_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path, fake_plan(), lambda *_: None)
    card = first_card(build_leaderboard(read_run(run)))
    assert (card.title, card.prices) == ("No recommendation", ())
    assert "no finished trial" in card.sentence
