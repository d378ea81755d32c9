"""What a person sees in the terminal before a sweep: the plan."""

from __future__ import annotations

import re

import pytest

from harness.cli.plan import numbered_settings, plan_table, seed_ranges
from harness.core.record import Parameters, Plan
from tests.support.runs import fake_plan
from tests.support.screens import shown

pytestmark = pytest.mark.quick


def test_the_plan_joins_seeds_and_shows_what_is_trained() -> None:
    plan = fake_plan(seeds=(0, 1, 5), settings=("",))
    counts = Parameters(trainable=12_345, adapter=2_345, projector=10_000, language_model=1, encoder=1, total=9_876_543)
    parameters = {trial.trial_id: None if trial.method == "full" else counts for trial in plan.trials}
    states = {trial.trial_id: "finished" if trial.seed == 0 else "to run" for trial in plan.trials}
    text = shown(plan_table(plan, parameters, states), width=110)
    assert "synthetic: 24 trials" in text
    row = r"LoRA r=4 specific +0, 1, 5 +12,345 +2,345 +10,000 +9,876,543 +1 finished, 2 to run"
    assert re.search(row, text)
    assert re.search(r"Full fine-tuning +0, 1, 5 +unknown +unknown +unknown +unknown ", text)
    assert "setting" not in text


def test_the_plan_shows_settings_where_they_vary() -> None:
    plan = fake_plan(settings=("examples=64", "examples=128"))
    ids = [trial.trial_id for trial in plan.trials]
    text = shown(plan_table(plan, dict.fromkeys(ids), dict.fromkeys(ids, "to run")), width=120)
    assert re.search(r"LoRA r=4 agnostic +examples=64 +0, 1", text)
    assert re.search(r"LoRA r=4 agnostic +examples=128 +0, 1", text)


def test_long_settings_are_numbers_in_a_terminal() -> None:
    plan = fake_plan(settings=("audio=builtin/tiny-audio", "audio=openai/whisper-tiny.en"))
    names = numbered_settings(plan)
    assert names == {"audio=builtin/tiny-audio": "1", "audio=openai/whisper-tiny.en": "2"}
    ids = [trial.trial_id for trial in plan.trials]
    text = shown(plan_table(plan, dict.fromkeys(ids), dict.fromkeys(ids, "to run"), names=names), width=80)
    assert re.search(r"^ ?LoRA r=4 agnostic +1 +0, 1 +unknown", text, re.MULTILINE)
    assert "…" not in text
    assert numbered_settings(fake_plan(settings=("examples=64", "examples=128"))) == {}


def test_seeds_are_ranges() -> None:
    assert seed_ranges({3, 0, 1, 2, 4, 7, 9, 10}) == "0–4, 7, 9, 10"
    assert seed_ranges([5]) == "5"


def test_a_row_is_one_line_with_its_learning_rates_and_seeds() -> None:
    plan = fake_plan(seeds=range(200), settings=("",))
    trials = [
        trial.model_copy(update={"trial_id": f"{trial.trial_id}-{rate}", "learning_rate": rate})
        for trial in plan.trials
        for rate in ((1e-3, 3e-3, 1e-2) if trial.method == "lora" else (None,))
    ]
    plan = plan.model_copy(update={"trials": tuple(trials)})
    ids = [trial.trial_id for trial in trials]
    text = shown(plan_table(plan, dict.fromkeys(ids), dict.fromkeys(ids, "to run")), width=150)
    assert "synthetic: 2,400 trials" in text
    assert re.search(r"^ ?LoRA r=4 specific +3 candidates, 0.001–0.01 +0–199 .* 600 to run *$", text, re.MULTILINE)
    assert re.search(r"^ ?none +– +0–199 .* 200 to run *$", text, re.MULTILINE)
    assert len([line for line in text.splitlines() if "to run" in line]) == 8


def test_of_very_many_rows_the_first_are_shown() -> None:
    plan: Plan = fake_plan(settings=("examples=64", "examples=128"))
    ids = [trial.trial_id for trial in plan.trials]
    text = shown(plan_table(plan, dict.fromkeys(ids), dict.fromkeys(ids, "to run"), most=3), width=120)
    assert len([line for line in text.splitlines() if "to run" in line]) == 3
    assert "… and 13 rows more; --all shows them" in text
