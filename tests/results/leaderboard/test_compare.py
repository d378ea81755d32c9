"""Comparisons of two rows, against scipy's paired t test and an explicit Holm correction, and every wrong name."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.core.record import PlannedTrial, Run, TrialRecord, read_run
from results.leaderboard.compare import compare
from results.leaderboard.table import build_leaderboard
from tests.support.runs import fake_plan, write_examples, write_run

LORA, FULL = "LoRA r=4 specific", "Full fine-tuning"
Change = Callable[[PlannedTrial, TrialRecord], TrialRecord | None]


def same(_: PlannedTrial, record: TrialRecord) -> TrialRecord:
    return record


def written(folder: Path, change: Change = same, settings: tuple[str, ...] = ("",)) -> Run:
    return read_run(write_run(folder, fake_plan(seeds=(0, 1, 2), settings=settings), change))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return written(tmp_path)


def scores(run: Run, label: str, metric: str) -> list[float]:
    ids = [trial.trial_id for trial in run.plan.trials if f"{trial.label} {trial.grouping}".strip() == label]
    return [run.records[trial_id].metrics["test"][metric] for trial_id in ids]


def test_two_rows_are_compared_as_on_the_leaderboard(run: Run) -> None:
    found = compare(run, LORA, "IA3 agnostic")
    assert [info.name for info in found.metrics] == ["cider", "perplexity", "bleu_4"]
    board = build_leaderboard(run)
    rows = {row.name: row for row in board.rows}
    for name, difference in found.differences.items():
        one, other = scores(run, LORA, name), scores(run, "IA3 agnostic", name)
        assert difference == board.compare(rows[LORA], rows["IA3 agnostic"], name)
        assert (difference.n, difference.covers) == (3, "seeds")
        assert found.means(name) == pytest.approx((statistics.fmean(one), statistics.fmean(other)))
    assert "Holm-corrected over the 28 pairs of rows" in found.rule


def test_two_trials_are_compared_on_their_own(run: Run) -> None:
    trials = {(f"{one.label} {one.grouping}", one.seed): one.trial_id for one in run.plan.trials}
    found = compare(run, trials[LORA, 1], trials["IA3 agnostic", 1])
    assert (found.differences["cider"].n, found.differences["cider"].p_value, found.rule) == (1, None, "")


def test_the_sentence_follows_the_direction_of_the_metric(run: Run) -> None:
    found = compare(run, "ia3 agnostic", LORA)
    said = {info.name: found.sentence(info) for info in found.metrics}
    assert said["cider"].startswith(f"CIDEr: IA3 agnostic is worse than {LORA} by 0.6")
    assert said["perplexity"].startswith(f"Perplexity: IA3 agnostic is worse than {LORA}, 1.5")
    back = compare(run, LORA, "ia3 agnostic")
    assert back.sentence(back.metrics[0]).startswith(f"CIDEr: {LORA} is better than IA3 agnostic by 0.6")
    near = compare(run, LORA, FULL)
    assert near.sentence(near.metrics[0]).startswith(f"CIDEr: {LORA} and {FULL} are not separated yet")


def test_examples_are_covered_where_their_columns_give_the_score(tmp_path: Path) -> None:
    def as_examples(_: PlannedTrial, record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"metrics": {"test": {"cider": 0.55 + 0.1 * record.seed}}})

    run = written(tmp_path, as_examples)
    for trial in run.plan.trials:
        offset = 0.1 * trial.seed
        columns = {"cider": [None, *(0.1 * index + offset for index in range(12))]}
        write_examples(tmp_path, trial.trial_id, ["a circle"] * 12, tmp_path, **columns)
    difference = compare(run, LORA, FULL).differences["cider"]
    assert (difference.covers, difference.examples) == ("seeds and test examples", 12)
    assert (difference.mean, difference.p_adjusted) == (0, 1)


def test_rows_that_do_not_match_are_not_compared(tmp_path: Path) -> None:
    def other_examples(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        assert record.data is not None
        if trial.method != "lora":
            return record
        return record.model_copy(update={"data": record.data.model_copy(update={"examples_fingerprint": "x"})})

    found = compare(written(tmp_path, other_examples), LORA, FULL)
    assert found.differences == {}
    assert found.refusal == (
        f"{LORA} and {FULL} are not comparable: seeds 0, 1, 2 do not match: training examples differ."
    )


@pytest.mark.parametrize(("one", "other"), [(LORA, FULL), (FULL, LORA)])
def test_a_row_that_has_not_finished_is_not_compared(tmp_path: Path, one: str, other: str) -> None:
    found = compare(written(tmp_path, lambda trial, record: None if trial.method == "lora" else record), one, other)
    assert found.refusal == f"{one} and {other} are not comparable: {LORA} has no finished trial to compare."


def test_a_seed_of_one_alone_is_named_and_left_out(tmp_path: Path) -> None:
    def without_seed_1(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        return None if (trial.method, trial.seed) == ("full", 1) else record

    found = compare(written(tmp_path, without_seed_1), LORA, FULL)
    assert found.differences["cider"].n == 2
    assert any(note == f"seed 1 not compared with {FULL}: {FULL} has not finished it" for note in found.notes)


def test_two_trials_are_compared_on_their_seed(run: Run) -> None:
    ids = {(trial.label, trial.grouping, trial.seed): trial.trial_id for trial in run.plan.trials}
    one, other = ids[("LoRA r=4", "specific", 1)], ids[("Full fine-tuning", "", 1)]
    for second in (other, FULL):
        found = compare(run, one, second)
        difference = found.differences["cider"]
        assert difference.mean == pytest.approx(scores(run, LORA, "cider")[1] - scores(run, FULL, "cider")[1])
        assert (difference.n, difference.low, difference.p_value) == (1, None, None)
        assert found.sentence(found.metrics[0]).startswith("CIDEr: one seed gives no interval")
    refused = compare(run, one, ids[("Full fine-tuning", "", 2)])
    assert refused.refusal.endswith("are not comparable: they have no seed in common (1 and 2).")


def test_the_best_learning_rate_is_compared_and_any_of_them_by_its_trial(tmp_path: Path) -> None:
    def with_rates(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        worse = trial.learning_rate == 1e-1
        scores = {split: dict(values) for split, values in record.metrics.items()}
        scores["validation"]["perplexity"] += 5 if worse else 0
        scores["test"]["cider"] = 0.1 if worse else 0.9
        return record.model_copy(update={"metrics": scores})

    plan = fake_plan(settings=("",))
    trials = tuple(
        trial.model_copy(update={"trial_id": f"{trial.trial_id}-{rate}", "learning_rate": rate})
        for trial in plan.trials
        for rate in (1e-1, 1e-3)
    )
    run = read_run(write_run(tmp_path, plan.model_copy(update={"trials": trials}), with_rates))
    found = compare(run, LORA, FULL)
    assert (found.one.row.chosen.learning_rate, found.one.row.effort) == (1e-3, 2)
    (worse,) = (
        t.trial_id for t in trials if (t.method, t.grouping, t.seed) == ("lora", "specific", 0) and "0.1" in t.trial_id
    )
    assert compare(run, worse, FULL).differences["cider"].mean == pytest.approx(-0.8)


def test_one_of_several_settings_is_chosen_by_a_part_of_its_name(tmp_path: Path) -> None:
    run = written(tmp_path, settings=("examples=64", "examples=128"))
    with pytest.raises(UserError, match=r"2 settings; choose one with --setting: 'examples=64', 'examples=128'"):
        compare(run, LORA, FULL)
    assert compare(run, LORA, FULL, "128").one.row.setting == "examples=128"
    with pytest.raises(UserError, match=r"--setting: 'examples' is ambiguous: 'examples=64', 'examples=128'"):
        compare(run, LORA, FULL, "examples")
    with pytest.raises(UserError, match=r"--setting: unknown setting 'exmples=64'; .*did you mean 'examples=64'"):
        compare(run, LORA, FULL, "exmples=64")
    by_id = [trial.trial_id for trial in run.plan.trials if trial.method in {"none", "full"} and trial.seed == 0]
    with pytest.raises(UserError, match=r"share no setting \(found: 'examples=64' and 'examples=128'\)"):
        compare(run, by_id[0], by_id[-1])


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ("LoRA r=8", FULL, r"'LoRA r=8' is neither a row of the leaderboard nor a trial id; .*did you mean 'LoRA r=4"),
        ("lora", FULL, r"'lora' is ambiguous: 'LoRA r=4 agnostic', 'LoRA r=4 specific'; write more of the name"),
        ("full", FULL, r"'Full fine-tuning' and 'Full fine-tuning' have trials in common"),
    ],
)
def test_wrong_names(run: Run, one: str, other: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        compare(run, one, other)


def test_one_metric_alone(run: Run) -> None:
    found = compare(run, LORA, FULL, metric="perplexity_wrong_input")
    assert [info.name for info in found.metrics] == ["perplexity_wrong_input"]
    difference = found.differences["perplexity_wrong_input"]
    assert difference.null == 1
    with pytest.raises(UserError, match=r"--metric: 'cidre' is not a metric of this run; .*did you mean 'cider'"):
        compare(run, LORA, FULL, metric="cidre")
