"""Recommendations from made-up scores whose cheapest good row is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness.cli.app import app
from harness.core.errors import UserError
from harness.core.profile import Measured, Profile, ProfileEntry, write_profile
from harness.core.record import Answers, Data, Plan, PlannedTrial, Run, TrialRecord, read_run
from results.leaderboard.recommend import Limits, Recommendation, limits_of, recommend_from
from tests.support.runs import fake_plan, write_run

FULL, LORA, CHEAP, BITFIT, IA3 = (
    "Full fine-tuning",
    "LoRA r=4 specific",
    "LoRA r=4 agnostic",
    "BitFit specific",
    "IA3 specific",
)
TRAINABLE = {FULL: 561_312, LORA: 80_688, CHEAP: 45_000, BITFIT: 16_992, IA3: 12_384}
# Seeds err by about 1 %: LoRA is not separated from full fine-tuning, BitFit is 20 % behind and IA3 50 %.
SCORES = {
    FULL: (2.80, 2.83, 2.78),
    LORA: (2.82, 2.80, 2.81),
    CHEAP: (2.80, 2.84, 2.81),
    BITFIT: (3.36, 3.38, 3.35),
    IA3: (4.20, 4.23, 4.19),
}
Scores = Mapping[str, Sequence[float]]


def name_of(trial: PlannedTrial) -> str:
    return f"{trial.label} {trial.grouping}".strip()


def plan_of(scores: Mapping[str, Scores], seeds: int = 3) -> Plan:
    """The rows of each setting, primary metric perplexity."""
    plan = fake_plan(range(seeds), settings=tuple(scores), primary_metric="perplexity")
    kept = tuple(trial for trial in plan.trials if name_of(trial) in scores[trial.setting])
    return plan.model_copy(update={"trials": kept})


def run_of(folder: Path, scores: Mapping[str, Scores], seeds: int = 3, **changes: Any) -> Run:
    """``changes``: fields of the records of cheap rows (LoRA agnostic)."""

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        score = scores[trial.setting][name_of(trial)][trial.seed]
        test = {"perplexity": score, "cider": 1 / score}
        fields = {"metrics": {"validation": {"perplexity": score}, "test": test}}
        return record.model_copy(update=fields | (changes if name_of(trial) == CHEAP else {}))

    return read_run(write_run(folder, plan_of(scores, seeds), change))


def only(found: Sequence[Recommendation]) -> Recommendation:
    assert len(found) == 1
    return found[0]


def test_the_cheapest_row_that_is_not_separated_from_the_best(tmp_path: Path) -> None:
    found = only(recommend_from(run_of(tmp_path, {"": SCORES})))
    assert found.name == CHEAP
    assert found.row is not None
    prices = {price.name: price for price in found.prices}
    assert prices["trainable parameters"].ratio == 45_000 / 561_312
    weights, activations = 3_485_248, 41_000_000
    by_hand = (weights + 12 * 45_000 + activations) / (weights + 12 * 561_312 + activations)
    assert prices["memory"].ratio == pytest.approx(by_hand)
    assert prices["Perplexity"].ratio == pytest.approx((2.80 * 2.84 * 2.81 / (2.80 * 2.83 * 2.78)) ** (1 / 3))
    assert found.sentence.startswith(
        "LoRA r=4 agnostic: 8 % of the trainable parameters, 88 % of the memory, 1.005× the perplexity of Full "
        "fine-tuning; not separated yet from the best, Full fine-tuning: ["
    )
    assert any(line.startswith("Whether Full fine-tuning is better than LoRA r=4 agnostic") for line in found.unknown)


def test_a_margin_admits_rows_that_are_shown_to_be_worse(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"": SCORES})
    found = only(recommend_from(run, within=0.25))
    assert found.name == BITFIT
    assert "behind, but within 25 % of, the best, Full fine-tuning" in found.sentence
    assert only(recommend_from(run, within=0.6)).name == IA3


def test_a_wide_interval_recommends_nothing_cheaper(tmp_path: Path) -> None:
    """With scores that vary by a factor of two, nothing is separated, and that says nothing."""
    scores = {FULL: (2.0, 4.1, 3.0), CHEAP: (4.4, 2.9, 3.9), IA3: (3.1, 4.9, 4.0)}
    found = only(recommend_from(run_of(tmp_path, {"": scores})))
    assert found.name == FULL
    assert f"{CHEAP}, {IA3} are cheaper and may be as good: the intervals are too wide to tell." in found.unknown


@pytest.mark.parametrize(
    ("limits", "name", "reason"),
    [
        (
            limits_of(max_trainable="4%"),
            BITFIT,
            "LoRA r=4 agnostic is left out: 45,000 trainable parameters, more than 4%",
        ),
        (
            limits_of(max_trainable=50_000),
            CHEAP,
            "Full fine-tuning is left out: 561,312 trainable parameters, more than 50000",
        ),
        (limits_of(max_memory="43 MiB"), CHEAP, "LoRA r=4 specific is left out: 43.3 MiB memory, more than 43 MiB"),
    ],
)
def test_limits(tmp_path: Path, limits: Limits, name: str, reason: str) -> None:
    found = only(recommend_from(run_of(tmp_path, {"": SCORES}), limits))
    assert found.name == name
    assert reason in found.unknown


def test_a_cost_that_was_not_measured_is_not_within_a_limit(tmp_path: Path) -> None:
    found = only(recommend_from(run_of(tmp_path, {"": SCORES}, memory=None), limits_of(max_memory="43.2 MiB")))
    assert found.name != CHEAP
    assert "LoRA r=4 agnostic is left out: memory not measured" in found.unknown


def test_limits_that_nothing_meets(tmp_path: Path) -> None:
    found = only(recommend_from(run_of(tmp_path, {"": SCORES}), limits_of(max_trainable=10)))
    assert (found.name, found.row) == (None, None)
    assert found.sentence == "No row can be recommended: each is beyond a limit or in doubt."
    assert len(found.unknown) == len(SCORES)


def test_a_share_needs_a_reference(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"": {name: values for name, values in SCORES.items() if name != FULL}})
    with pytest.raises(
        UserError, match="1% of the trainable parameters: no reference method has finished; give an abs"
    ):
        recommend_from(run, limits_of(max_trainable="1%"))


def test_an_unknown_metric(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--metric: 'cidr' is not a metric of this run; .*did you mean 'cider'"):
        recommend_from(run_of(tmp_path, {"": SCORES}), metric="cidr")


def test_another_metric_decides(tmp_path: Path) -> None:
    found = only(recommend_from(run_of(tmp_path, {"": SCORES}), metric="cider", within=0.08))
    assert found.name == BITFIT
    assert any(price.name == "CIDEr" for price in found.prices)


def test_one_seed_recommends_by_the_margin_alone(tmp_path: Path) -> None:
    scores = SCORES | {CHEAP: (2.81,)}
    found = only(recommend_from(run_of(tmp_path, {"": scores}, seeds=1)))
    assert found.name == CHEAP
    assert found.sentence.endswith("from one seed, so it is not tested against the best, Full fine-tuning.")
    assert found.unknown[0] == (
        "There is one seed, so no difference can be tested: add seeds to the experiment and run it again."
    )


def test_rows_that_do_not_match_are_never_recommended(tmp_path: Path) -> None:
    other = Data(
        examples=1024, examples_fingerprint="x", order_fingerprint="y", evaluation_fingerprint="ab" * 20, steps=256
    )
    assert only(recommend_from(run_of(tmp_path, {"": SCORES}, data=other))).name == LORA


def test_a_row_that_writes_one_text_is_not_recommended(tmp_path: Path) -> None:
    same = Answers(texts=192, distinct=1, commonest="a cat", commonest_count=192, distinct_references=192)
    found = only(recommend_from(run_of(tmp_path, {"": SCORES}, answers={"": same})))
    assert found.name == LORA
    assert any(
        line.startswith("LoRA r=4 agnostic is left out: it writes the same text for all 192") for line in found.unknown
    )


def test_over_settings_the_row_that_is_good_enough_in_all(tmp_path: Path) -> None:
    harder = SCORES | {CHEAP: (3.4, 3.43, 3.38)}
    everywhere, first, second = recommend_from(run_of(tmp_path, {"a": SCORES, "b": harder}))
    assert (first.setting, first.name, second.setting, second.name) == ("a", CHEAP, "b", LORA)
    assert (everywhere.setting, everywhere.name, everywhere.row) == (None, LORA, None)
    assert everywhere.sentence.startswith(
        "LoRA r=4 specific is the cheapest row that is not shown to be worse in all 2 settings: on average 14 % of"
    )
    assert {price.name for price in everywhere.prices} == {"trainable parameters", "memory", "Perplexity"}


def test_over_settings_a_row_that_is_the_best_in_all_is_called_so(tmp_path: Path) -> None:
    ahead = {name: tuple(2 * score for score in scores) if name != FULL else scores for name, scores in SCORES.items()}
    found = recommend_from(run_of(tmp_path, {"a": ahead, "b": ahead}))[0]
    assert found.name == FULL
    assert found.sentence == (
        "Full fine-tuning has the best mean perplexity in all 2 settings, and no cheaper row is good enough in all of "
        "them."
    )


def test_prices_are_those_of_the_profile(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"": SCORES})
    full, cheap = (tuple(t.trial_id for t in run.plan.trials if name_of(t) == name) for name in (FULL, CHEAP))

    def entry(ids: tuple[str, ...], **values: float) -> ProfileEntry:
        measured = {name: Measured(median=value, n=8) for name, value in values.items()}
        return ProfileEntry(
            key="k",
            name="n",
            setting="",
            trial_ids=ids,
            reference="r",
            reference_trial_ids=full,
            device="d",
            **measured,
        )

    entries = (
        entry(full, step_time_s=2.0, step_time_ratio=1, peak_memory_bytes=100, memory_ratio=1),
        entry(cheap, step_time_s=1.0, step_time_ratio=0.5, peak_memory_bytes=40, memory_ratio=0.4),
    )
    write_profile(tmp_path, Profile(entries=entries))
    found = only(recommend_from(read_run(tmp_path)))
    prices = {price.name: price.ratio for price in found.prices}
    assert (prices["memory"], prices["step time"]) == (0.4, 0.5)
    assert "40 % of the memory, 0.50× the step time" in found.sentence
    assert not any("not measured" in line for line in found.unknown)
    hours = 256 * 1.0 / 3600  # steps at the profile's step time
    assert only(recommend_from(read_run(tmp_path), limits_of(max_hours=hours * 1.01))).name == CHEAP
    dropped = only(recommend_from(read_run(tmp_path), limits_of(max_hours=hours * 0.99))).unknown
    assert any(line.startswith("LoRA r=4 agnostic is left out: 0.071 hours of training, more than") for line in dropped)


def test_the_command(tmp_path: Path) -> None:
    run_of(tmp_path, {"": SCORES})
    result = CliRunner().invoke(app, ["recommend", str(tmp_path), "--max-trainable", "4%", "--within", "1 %"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("BitFit specific: 3 % of the trainable parameters")


def test_where_the_reference_is_recommended_the_best_cheaper_row_is_named(tmp_path: Path) -> None:
    scores = {FULL: SCORES[FULL], BITFIT: SCORES[BITFIT], IA3: SCORES[IA3]}
    found = only(recommend_from(run_of(tmp_path, {"": scores})))
    assert found.sentence == (
        "Full fine-tuning: the best mean perplexity, shown to be ahead of all 2 other rows. The best of the cheaper "
        "rows, BitFit specific: 3 % of the trainable parameters, 87 % of the memory, 1.20× the perplexity."
    )
