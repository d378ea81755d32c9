"""The columns of the leaderboard: prices as profiled, options as they differ, and which end is the better one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.core.profile import Measured, Profile, ProfileEntry
from harness.core.record import PlannedTrial, TrialRecord, read_run
from results.leaderboard.coverage import table_coverage
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.page.columns import NOTHING, Cell, Column, columns_of, short_count
from tests.support.runs import fake_plan, write_run


def change(trial: PlannedTrial, record: TrialRecord) -> TrialRecord:
    config = {"rank": 4, "dropout": 0.0} if trial.method == "lora" else {"scale": trial.grouping == "specific"}
    spec = {**record.spec, "adapter": {**record.spec["adapter"], "config": config}}
    return record.model_copy(update={"spec": spec})


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    return build_leaderboard(read_run(write_run(tmp_path_factory.mktemp("run"), fake_plan(), change)))


def found(board: Leaderboard) -> dict[str, Column]:
    rows = board.of(board.settings[0])
    return {one.key: one for one in columns_of(board, rows, table_coverage(board, rows))}


def cells(board: Leaderboard, key: str) -> dict[str, Cell]:
    return {row.name: found(board)[key].read(row) for row in board.of(board.settings[0])}


def profiled(board: Leaderboard) -> Leaderboard:
    """The board with a profile in which LoRA has twice the step time and half the memory, and IA3 was not measured."""
    full = next(row for row in board.rows if row.is_reference)
    reference = tuple(trial.trial_id for trial in full.trials)
    entries = []
    for row in board.rows:
        ratio, memory = {"lora": (2.0, 0.5), "full": (1.0, 1.0)}.get(row.method, (1.25, 0.75))
        if row.method == "ia3":
            continue
        entries.append(
            ProfileEntry(
                key=row.name,
                name=row.name,
                setting=row.setting,
                trial_ids=tuple(trial.trial_id for trial in row.trials),
                reference=full.name,
                reference_trial_ids=reference,
                device="CPU",
                step_time_ratio=Measured(median=ratio, low=ratio - 0.1, high=ratio + 0.1, n=9),
                peak_memory_bytes=Measured(median=memory * 2**30, n=1),
                memory_ratio=Measured(median=memory, n=1),
            )
        )
    return replace(board, run=replace(board.run, profile=Profile(entries=tuple(entries))))


def test_speed_and_memory_are_those_of_the_profile_where_there_is_one(board: Leaderboard) -> None:
    shown = [one.key for one in found(board).values() if one.shown]
    assert shown == ["cider", "difference", "trainable", "memory"]  # these trials have no training time
    own = profiled(board)
    assert [one.key for one in found(own).values() if one.shown] == [
        "cider", "difference", "trainable", "step_time", "peak_memory",
    ]  # fmt: skip
    assert cells(own, "step_time")["LoRA r=4 specific"] == Cell("2.00×", 2.0, "[1.90×, 2.10×]")
    assert cells(own, "step_time")["IA3 agnostic"] == NOTHING
    assert cells(own, "peak_memory")["LoRA r=4 specific"] == Cell("512 MiB", 2**29, "50 % of Full fine-tuning")
    assert cells(own, "peak_memory")["Full fine-tuning"] == Cell("1 GiB", 2**30)
    assert "profile.energy" not in found(own)  # nothing was measured


def test_prices_are_shares_of_the_reference(board: Leaderboard) -> None:
    assert cells(board, "trainable")["LoRA r=4 specific"] == Cell("80.7k", 80_688, "14 % of full")
    assert cells(board, "trainable")["Full fine-tuning"] == Cell("561k", 561_312)


def test_the_first_click_shows_the_best(board: Leaderboard) -> None:
    columns = found(board)
    directions = {key: columns[key].first for key in ("cider", "perplexity", "trainable", "examples_per_s")}
    assert directions == {
        "cider": "descending", "perplexity": "ascending", "trainable": "ascending", "examples_per_s": "descending",
    }  # fmt: skip
    assert columns["perplexity"].note == "lower is better"
    assert columns["trainable"].note == ""


def test_options_that_differ_have_a_column(board: Leaderboard) -> None:
    assert [key for key in found(board) if key.startswith("option.")] == ["option.scale"]
    assert found(board)["option.scale"].words
    assert cells(board, "option.scale")["IA3 specific"] == Cell("True", "True")
    assert cells(board, "option.scale")["LoRA r=4 specific"] == NOTHING


def test_a_difference_tells_more_on_demand(board: Leaderboard) -> None:
    cell = cells(board, "difference")["none"]
    assert (cell.kind, cell.small) == ("worse", "worse")
    assert cell.text.startswith("−")
    assert cell.hint.startswith("[−")
    assert "new seeds: worse" in cell.hint
    assert cells(board, "difference")["Full fine-tuning"].text == "reference"


def test_counts_are_short() -> None:
    shown = [short_count(value) for value in (7, 999, 9_312, 80_688, 1_240_000, 7.1e9)]
    assert shown == ["7", "999", "9.31k", "80.7k", "1.24M", "7.1G"]


def test_what_no_row_has_is_no_column(tmp_path: Path) -> None:
    run = write_run(tmp_path, fake_plan(seeds=(0,)), lambda *_: None)
    board = build_leaderboard(read_run(run))
    rows = list(board.rows)
    assert [one.key for one in columns_of(board, rows, table_coverage(board, rows))] == ["seeds"]
