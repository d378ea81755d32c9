"""Matched comparisons: a row that differs in any one respect is excluded from ranking, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.record import Plan, PlannedTrial, TrialRecord, read_run
from results.leaderboard.matched import mismatch, pairs
from results.leaderboard.table import Leaderboard, Row, build_leaderboard
from tests.support.runs import METHODS, Change, fake_plan, fake_record, write_run

PLUGIN = {
    "name": "captions", "distribution": "theirs", "result_version": 1, "target": "tasks.x:X", "version": "1.0",
    "git_revision": None,
}  # fmt: skip
SPEC = {
    "task": {"name": "captions", "plugin": PLUGIN, "config": {"root": "/data"}},
    "backbone": {"language_model": "tiny", "encoders": {"image": "vit"}},
    "adapter": {"method": "lora", "config": {"rank": 4}},
    "budget": {"examples": 1024, "epochs": 8},
    "optimizer": {"learning_rate": 0.01, "weight_decay": 0.0},
    "eval": {"num_beams": 1, "per_device_eval_batch_size": 128, "primary_metric": "cider"},
    "seed": 0,
}
SMUGGLER = "BitFit specific"
Smuggle = Callable[[TrialRecord], TrialRecord]


def with_data(**changes: Any) -> Smuggle:
    def change(record: TrialRecord) -> TrialRecord:
        assert record.data is not None
        return record.model_copy(update={"data": record.data.model_copy(update=changes)})

    return change


def with_spec(section: str, **changes: Any) -> Smuggle:
    def change(record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"spec": record.spec | {section: record.spec[section] | changes}})

    return change


def board_of(folder: Path, plan: Plan | None = None, change: Change = lambda _, record: record) -> Leaderboard:
    def specified(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        return change(trial, record.model_copy(update={"spec": SPEC}))

    return build_leaderboard(read_run(write_run(folder, plan or fake_plan(seeds=(0, 1, 2)), specified)))


def row_of(board: Leaderboard, name: str) -> Row:
    return next(row for row in board.rows if row.name == name)


def ranks(board: Leaderboard) -> dict[str, tuple[int, int] | None]:
    return {row.name: row.rank for row in board.rows}


KINDS: dict[str, tuple[Smuggle, str]] = {
    "training examples": (with_data(examples_fingerprint="x"), "training examples differ"),
    "order": (with_data(order_fingerprint="x"), "order of the examples differs"),
    "steps": (with_data(steps=512), "number of optimizer steps differs (512, 256)"),
    "evaluation examples": (with_data(evaluation_fingerprint="x"), "evaluation examples differ"),
    "weights of another trial": (with_data(started_from=("x",)), "adapter groups trained before, on other data"),
    "not recorded": (
        lambda record: record.model_copy(update={"data": None}),
        "the training data are not recorded",
    ),
    "other seed": (lambda record: record.model_copy(update={"seed": 7}), "seed differs (7, 0)"),
    "evaluation": (with_spec("eval", num_beams=4), "eval.num_beams differs (4, 1)"),
    "evaluation unknown": (
        lambda record: record.model_copy(update={"spec": {k: v for k, v in record.spec.items() if k != "eval"}}),
        "eval.num_beams differs (not recorded, 1)",
    ),
    "backbone": (with_spec("backbone", language_model="big"), "backbone.language_model differs (big, tiny)"),
    "encoder": (with_spec("backbone", encoders={"image": "clip"}), "backbone.encoders.image differs (clip, vit)"),
    "budget": (with_spec("budget", epochs=16), "budget.epochs differs (16, 8)"),
    "task": (with_spec("task", config={"root": "/else"}), "task.config.root differs (/else, /data)"),
    "optimizer": (with_spec("optimizer", weight_decay=0.1), "optimizer.weight_decay differs (0.1, 0.0)"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=["one seed", "all seeds"])
def test_a_smuggled_row_is_apart_and_changes_nothing_for_the_others(
    tmp_path: Path, kind: str, seeds: tuple[int, ...]
) -> None:
    smuggle, reason = KINDS[kind]
    whole = fake_plan(seeds=(0, 1, 2))

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        odd = f"{trial.label} {trial.grouping}" == SMUGGLER and trial.seed in seeds
        return smuggle(record) if odd else record

    board = board_of(tmp_path / "smuggled", whole, change)
    row = row_of(board, SMUGGLER)
    assert reason in "; ".join(row.apart)
    assert re.match(r"seeds? 0.* not match Full fine-tuning: ", row.apart[0])
    assert (row.rank, row.rank_text, row.differences, row.difference_errors_B) == (None, "", {}, None)
    assert row.metrics["cider"].mean > 0  # shown all the same
    assert board.apart(row.setting) == [row]
    assert row not in board.of(row.setting)
    assert [delta.label for delta in board.deltas if delta.differences] == ["IA3", "LoRA r=4"]

    rest = tuple(trial for trial in whole.trials if f"{trial.label} {trial.grouping}" != SMUGGLER)
    without = board_of(tmp_path / "without", whole.model_copy(update={"trials": rest}))
    assert {name: rank for name, rank in ranks(board).items() if name != SMUGGLER} == ranks(without)
    for other in without.rows:
        assert row_of(board, other.name).differences == other.differences
        assert row_of(board, other.name).apart == ()


def test_what_says_nothing_of_the_comparison_may_differ(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        if trial.method != "ia3":
            return record
        for harmless in (
            with_spec("eval", primary_metric="perplexity", per_device_eval_batch_size=8),
            with_spec("optimizer", learning_rate=0.5),
            with_spec("adapter", config={"rank": 8}),
            with_spec("task", plugin=PLUGIN | {"target": "elsewhere.x:X", "version": "2.0", "git_revision": "abc"}),
        ):
            record = harmless(record)
        return record

    board = board_of(tmp_path, change=change)
    assert not any(row.apart for row in board.rows)
    assert all(row.rank for row in board.rows)


def test_a_task_whose_results_changed_does_not_match(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        return with_spec("task", plugin=PLUGIN | {"result_version": 2})(record) if trial.method == "ia3" else record

    apart = {row.method: "; ".join(row.apart) for row in board_of(tmp_path, change=change).rows if row.apart}
    assert set(apart) == {"ia3"}
    assert "task.plugin differs (theirs:captions@2, theirs:captions@1)" in apart["ia3"]


def test_other_weights_under_one_name_do_not_match(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        digit = "2" if trial.method == "ia3" else "1"
        prints = {"language_model": f"sha256:{digit * 64}", "encoders.image": "commit:abc"}
        return record.model_copy(update={"spec": record.spec | {"fingerprints": prints}})

    apart = {row.method: "; ".join(row.apart) for row in board_of(tmp_path, change=change).rows if row.apart}
    assert set(apart) == {"ia3"}
    assert "backbone.language_model weights differ (222222222222, 111111111111)" in apart["ia3"]
    assert "encoders" not in apart["ia3"]


def test_libraries_that_change_scores_are_versions_too(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        versions = record.versions | {"pycocoevalcap": "1.2", "ray": "2.60"}
        if trial.seed == 0 and trial.method == "ia3":
            versions |= {"pycocoevalcap": "1.3"}
        return record.model_copy(update={"versions": versions | {"ray": f"2.6{trial.seed}"}})

    marked = {row.method: row.mixed_versions for row in board_of(tmp_path, change=change).rows if row.mixed_versions}
    assert marked == {"ia3": "its trials mix versions: pycocoevalcap 1.3 and 1.2"}


def test_a_row_that_mixes_versions_is_marked(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        if trial.seed == 0:
            return record
        record = record.model_copy(update={"git_revision": "abc+"}) if trial.method == "ia3" else record
        newer = with_spec("task", plugin=PLUGIN | {"version": "1.1"})
        return newer(record) if trial.method == "lora" else record

    marked = {row.method: row.mixed_versions for row in board_of(tmp_path, change=change).rows if row.mixed_versions}
    assert set(marked) == {"ia3", "lora"}
    assert re.search(r"versions: context-peft-harness .* and .*\(abc\+\)$", marked["ia3"])
    assert marked["lora"].endswith("versions: theirs 1.0 and 1.1")


def test_a_row_made_with_other_code_than_its_table_is_marked(tmp_path: Path) -> None:
    """A grid that was extended after a change of the code."""

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"git_revision": "fedcba9876543210"}) if trial.method == "ia3" else record

    board = board_of(tmp_path, change=change)
    said = "context-peft-harness unknown (fedcba9876543210), most of the table with unknown (0123456789abcdef)"
    marked = {row.name: row.mixed_versions for row in board.rows if row.mixed_versions}
    assert marked == dict.fromkeys(("IA3 agnostic", "IA3 specific"), f"made with {said}")


def test_many_differing_keys_are_counted(tmp_path: Path) -> None:
    trial = fake_plan().trials[0]
    record = fake_record(trial, 1, 0.5)
    one = record.model_copy(update={"spec": SPEC})
    assert mismatch(one, record) == (
        "task.name differs (captions, not recorded); task.plugin differs (theirs:captions@1, not recorded); "
        "task.config.root differs (/data, not recorded); 6 more keys differ"
    )
    assert mismatch(one, one) is None


def test_reasons_of_several_seeds_are_one_sentence(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        if trial.method != "none":
            return record
        return with_data(steps=1)(record) if trial.seed == 1 else with_data(order_fingerprint="x")(record)

    assert row_of(board_of(tmp_path, change=change), "none").apart == (
        "seeds 0, 2 do not match Full fine-tuning: order of the examples differs",
        "seed 1 does not match Full fine-tuning: number of optimizer steps differs (1, 256)",
    )


@pytest.mark.parametrize(
    ("field", "reason"), [("evaluation", "evaluation examples"), ("examples", "training examples")]
)
def test_a_seed_added_after_the_data_changed_is_not_averaged_with_the_others(
    tmp_path: Path, field: str, reason: str
) -> None:
    """Trials of one seed match each other, so that only what is common to seeds shows it."""

    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        record = with_data(examples_fingerprint="all")(with_spec("budget", examples="all")(record))
        return with_data(**{f"{field}_fingerprint": "new"})(record) if trial.seed == 2 else record

    board = board_of(tmp_path, change=change)
    for row in board.rows:
        assert row.apart == (
            f"seed 2 does not match other seeds: {reason} differ (data that changed under their name)",
        )
        assert row.rank is None


def test_where_the_reference_is_the_odd_one_the_others_are_apart_with_its_name(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        return with_data(steps=512)(record) if trial.method == "full" else record

    board = board_of(tmp_path, change=change)
    full, *others = sorted(board.rows, key=lambda row: not row.is_reference)
    assert (full.apart, full.rank) == ((), (1, 1))
    assert len(others) == 7
    for row in others:
        assert row.apart == (
            "seeds 0, 1, 2 do not match Full fine-tuning: number of optimizer steps differs (256, 512)",
        )
        assert (row.rank, row.differences) == (None, {})
    # They match each other, so the agnostic → specific comparison is kept.
    assert [len(delta.differences) for delta in board.deltas] == [4, 4, 4]


def test_a_reference_without_a_record_of_its_data_sets_nobody_else_apart(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        return record.model_copy(update={"data": None}) if trial.method == "full" else record

    board = board_of(tmp_path, change=change)
    assert [row.name for row in board.rows if row.apart] == ["Full fine-tuning"]
    assert "the training data are not recorded" in row_of(board, "Full fine-tuning").apart[0]
    row = row_of(board, "LoRA r=4 specific")
    assert row.rank is not None
    assert (row.differences, row.notes) == ({}, ("not compared with Full fine-tuning, which is excluded from ranking",))


def test_without_the_reference_the_most_common_kind_is_the_measure(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
        return with_data(order_fingerprint="x")(record) if trial.method == "none" else record

    board = board_of(tmp_path, fake_plan(methods=METHODS[:-1]), change)  # "none" is the first in the plan
    assert [row.name for row in board.rows if row.apart] == ["none"]
    assert "do not match IA3 agnostic: order of the examples differs" in row_of(board, "none").apart[0]


def test_pairs_are_by_seed_and_none_where_one_seed_does_not_match(tmp_path: Path) -> None:
    def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        if trial.method == "full" and trial.seed == 1:
            return None
        return with_data(order_fingerprint="x")(record) if trial.method == "none" and trial.seed == 0 else record

    board = board_of(tmp_path, change=change)
    full, lora, none = (row_of(board, name) for name in ("Full fine-tuning", "LoRA r=4 specific", "none"))
    found, notes = pairs(lora, full)
    assert [(one.seed, other.seed) for one, other in found] == [(0, 0), (2, 2)]
    assert notes == ("seed 1 not compared with Full fine-tuning: Full fine-tuning has not finished it",)
    assert lora.differences["cider"].n == 2
    assert pairs(none, full) == (
        [],
        (
            "not compared with Full fine-tuning: seed 0 does not match: order of the examples differs",
            "seed 1 not compared with Full fine-tuning: Full fine-tuning has not finished it",
        ),
    )
