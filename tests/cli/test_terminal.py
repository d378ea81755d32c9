"""What a person sees in the terminal beside a running sweep: the plan and the leaderboard."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.cli.terminal import leaderboard_table, plan_table
from harness.core.record import Parameters, PlannedTrial, TrialRecord, read_run
from results.leaderboard.table import build_leaderboard
from tests.support.runs import fake_plan, write_run
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


def test_the_leaderboard_fits_eighty_characters_and_shows_missing_as_missing(tmp_path: Path) -> None:
    def without_cider(trial: PlannedTrial, made: TrialRecord) -> TrialRecord:
        if trial.method != "none":
            return made
        test = {name: value for name, value in made.metrics["test"].items() if name != "cider"}
        return made.model_copy(update={"metrics": {"test": test}})

    plan = fake_plan(settings=("",), primary_metric="perplexity")
    board = build_leaderboard(read_run(write_run(tmp_path, plan, without_cider)))
    text = shown(leaderboard_table(board), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "synthetic: scores on the test split" in text
    assert re.search(r"\n +\d(–8)? +none +9\.\d+ \[[\d.]+, [\d.]+\] +– +1\.\d+ +9,312 +2/2", text)
    assert "excluded from ranking" not in text


def test_rows_excluded_from_ranking_are_below_the_table_of_their_setting(tmp_path: Path) -> None:
    def fewer_steps(trial: PlannedTrial, made: TrialRecord) -> TrialRecord:
        assert made.data is not None
        if (trial.method, trial.setting) != ("bitfit", "examples=64"):
            return made
        return made.model_copy(update={"data": made.data.model_copy(update={"steps": 99})})

    plan = fake_plan(settings=("examples=64", "examples=128"))
    text = shown(leaderboard_table(build_leaderboard(read_run(write_run(tmp_path, plan, fewer_steps)))), width=80)
    first, second = text.split("\nexamples=128\n")
    assert "\nexamples=64\n" in first
    table, below = first.split("excluded from ranking: ")
    assert "BitFit" not in table
    assert " ".join(below.split()) == (
        "BitFit specific, BitFit agnostic: seeds 0, 1 do not match Full fine-tuning: number of optimizer steps differs "
        "(99, 256)"
    )
    assert len(re.findall(r"^ +\d\S* +BitFit", second, re.MULTILINE)) == 2
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    def other(trial: PlannedTrial, made: TrialRecord) -> TrialRecord:
        assert made.data is not None
        if trial.method != "lora":
            return made
        every = {"examples_fingerprint": "x", "order_fingerprint": "x", "evaluation_fingerprint": "x", "steps": 9}
        changed = made.data.model_copy(update=every | {"started_from": (str(trial.seed),)})
        changed = changed.model_copy(update={"steps": 10**100 + trial.seed})
        return made.model_copy(update={"data": changed})

    board = build_leaderboard(read_run(write_run(tmp_path, fake_plan(settings=("",)), other)))
    (line,) = [
        line for line in shown(leaderboard_table(board), width=2000).splitlines() if "excluded from ranking" in line
    ]
    assert line.rstrip().endswith(" …")
    assert len(line.rstrip()) < 300
