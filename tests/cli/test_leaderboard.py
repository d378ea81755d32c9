"""The leaderboard in the terminal: it fits, it has what was measured and nothing else, and it says what is in doubt."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness.cli.leaderboard import LeaderboardView, print_last_screen
from harness.core.profile import Measured, Profile, ProfileEntry
from harness.core.record import PlannedTrial, Run, TrialRecord, read_run
from results.leaderboard.recommend import recommend
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.loaded import Results
from tests.support.runs import fake_plan, write_run
from tests.support.screens import console, output, shown

pytestmark = pytest.mark.quick


def with_profile(run: Run) -> Run:
    """A profile of every method but IA3."""
    rows: dict[str, list[str]] = {}
    for trial in run.plan.trials:
        if trial.method != "ia3":
            rows.setdefault(f"{trial.label} {trial.grouping}".rstrip(), []).append(trial.trial_id)
    reference = tuple(rows["Full fine-tuning"])
    entries = tuple(
        ProfileEntry(
            key=name, name=name, setting="", trial_ids=tuple(ids), reference="Full fine-tuning",
            reference_trial_ids=reference, device="CPU",
            step_time_ratio=Measured(median=1.0 + 0.01 * len(name), low=1.0, high=1.5, n=9),
            peak_memory_bytes=Measured(median=len(name) * 2**20, n=3),
        )
        for name, ids in rows.items()
    )  # fmt: skip
    return replace(run, profile=Profile(entries=entries))


def perplexities(folder: Path) -> Leaderboard:
    plan = fake_plan(seeds=(0, 1, 2), settings=("",), primary_metric="perplexity")
    return build_leaderboard(with_profile(read_run(write_run(folder, plan))))


def last_screen(results: Results) -> str:
    screen = console(width=80)
    print_last_screen(results, 65.0, screen)
    return output(screen)


def test_eighty_characters_have_everything_that_decides(tmp_path: Path) -> None:
    text = shown(LeaderboardView(perplexities(tmp_path)), width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    first = next(line for line in text.splitlines() if line.startswith("rank"))
    assert first.split() == ["rank", "method", "Perplexity", "÷", "full", "trainable", "step", "memory", "verdict"]
    assert re.search(r"^ *\d(–\d)? LoRA r=4 specific +5\.\d+ +1\.\d+× +80,688 +1\.17× 17 MiB \w", text, re.MULTILINE)
    assert re.search(r"^ *\d(–\d)? Full fine-tuning +\d\.\d+ +1 +561,312 +1\.16× 16 MiB reference$", text, re.MULTILINE)
    assert re.search(r"^ *\d(–\d)? IA3 specific +\S+ +\S+ +12,384 +– +– \w", text, re.MULTILINE)  # not profiled
    legend = (
        "÷ full, step: relative to Full fine-tuning; verdict: against Full fine-tuning, for models trained with new"
    )
    assert legend in " ".join(text.split())


def test_a_wide_terminal_shows_intervals_and_more_scores(tmp_path: Path) -> None:
    text = shown(LeaderboardView(perplexities(tmp_path)), width=300)
    assert re.search(r"LoRA r=4 specific +5\.\d+ \[[\d.]+, [\d.]+\] +1\.\d+× \[[\d.]+×, [\d.]+×\] p ", text)
    assert re.search(r"1\.17× \[1\.000×, 1\.50×\] +17 MiB", text)
    (first,) = (line for line in text.splitlines() if line.startswith("rank"))
    assert first.split()[-5:] == ["CIDEr", "wrong", "/", "right", "seeds"]
    middle = shown(LeaderboardView(perplexities(tmp_path)), width=112)
    assert "CIDEr" in middle
    assert not re.search(r"\[\d", middle)


def test_what_was_not_measured_has_no_column(tmp_path: Path) -> None:
    plan = fake_plan(settings=("",), methods=[("none", "none", "", 1, 0.0), ("IA3", "ia3", "agnostic", 1, 0.3)])
    bare = shown(LeaderboardView(build_leaderboard(read_run(write_run(tmp_path, plan)))), width=80)
    (first,) = (line for line in bare.splitlines() if line.startswith("rank"))
    assert first.split() == ["rank", "method", "CIDEr", "trainable", "seeds"]  # no profile, and nothing to compare with
    assert "verdict" not in bare
    assert "step" not in bare


def test_columns_are_chosen(tmp_path: Path) -> None:
    text = shown(LeaderboardView(perplexities(tmp_path), ("method", "cider", "total")), width=80)
    assert text.splitlines()[1].split() == ["method", "CIDEr", "Total", "parameters"]
    assert "verdict" not in text


def test_a_missing_score_is_missing_and_not_zero(tmp_path: Path) -> None:
    def without_cider(trial: PlannedTrial, made: TrialRecord) -> TrialRecord:
        if trial.method != "none":
            return made
        test = {name: value for name, value in made.metrics["test"].items() if name != "cider"}
        return made.model_copy(update={"metrics": {"test": test}})

    plan = fake_plan(settings=("",), primary_metric="perplexity")
    board = build_leaderboard(read_run(write_run(tmp_path, plan, without_cider)))
    text = shown(LeaderboardView(board), width=100)
    assert re.search(r"none +9\.\d+ +1\.\d+× +9,312 +\w.* – +1\.\d+ +2/2", text)
    assert "excluded from ranking" not in text


def test_rows_excluded_from_ranking_are_below_the_table_of_their_setting(tmp_path: Path) -> None:
    def fewer_steps(trial: PlannedTrial, made: TrialRecord) -> TrialRecord:
        assert made.data is not None
        if (trial.method, trial.setting) != ("bitfit", "examples=64"):
            return made
        return made.model_copy(update={"data": made.data.model_copy(update={"steps": 99})})

    plan = fake_plan(settings=("examples=64", "examples=128"))
    text = shown(LeaderboardView(build_leaderboard(read_run(write_run(tmp_path, plan, fewer_steps)))), width=80)
    first, second = text.split("\nexamples=128\n")
    assert "\nexamples=64\n" in first
    table, below = first.split("excluded from ranking: ")
    assert "BitFit" not in table
    assert " ".join(below.split()) == (
        "BitFit specific, BitFit agnostic: seeds 0, 1 do not match Full fine-tuning: number of optimizer steps differs "
        "(99, 256)"
    )
    assert len(re.findall(r"^ *\d\S* +BitFit", second, re.MULTILINE)) == 2
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
        line for line in shown(LeaderboardView(board), width=2000).splitlines() if "excluded from ranking" in line
    ]
    assert line.rstrip().endswith(" …")
    assert len(line.rstrip()) < 300


def test_the_last_screen_fits_and_says_where_to_look(tmp_path: Path) -> None:
    board = perplexities(tmp_path)
    board = replace(
        board, run=replace(board.run, plan=board.run.plan.model_copy(update={"mlflow_uri": "sqlite:///a.db"}))
    )
    results = Results((tmp_path,), tmp_path / "index.html", tracking_link="#/experiments/1/runs?x=y", known_board=board)
    text = last_screen(results)
    assert f"recommended: {recommend(board)[0].sentence}" in " ".join(text.split())
    assert "24 of 24 trials finished; this run took 1 min 05 s\n" in text
    assert f"report:  {tmp_path / 'index.html'}\n" in text  # in one piece, however long
    assert re.search(
        r"MLflow:  \S+/mlflow ui --backend-store-uri sqlite:///a\.db --host 127\.0\.0\.1 --port 5000\n", text
    )
    assert "         then http://127.0.0.1:5000/#/experiments/1/runs?x=y\n" in text
    own = [line for line in text.splitlines() if not line.startswith(("report: ", "MLflow: ", "         then"))]
    assert max(map(len, own)) <= 80


def test_the_link_of_a_server_needs_no_command(tmp_path: Path) -> None:
    board = perplexities(tmp_path)
    plan = board.run.plan.model_copy(update={"mlflow_uri": "https://host/mlflow/"})
    results = Results(
        (tmp_path,), None, tracking_link="#/x", known_board=replace(board, run=replace(board.run, plan=plan))
    )
    text = last_screen(results)
    assert text.endswith("MLflow:  https://host/mlflow/#/x\n")
