"""harness.load_results: run folders as DataFrames."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

import harness
from harness.core.record import PlannedTrial, TrialRecord
from results.report import write_exports
from tests.support.runs import fake_plan, write_run
from tests.support.sweeps import write_sweep


def test_a_run_folder_is_read_back_as_tables(tmp_path: Path) -> None:
    write_sweep(tmp_path, lambda budget, *_: 0.4 + budget / 1e3)
    results = harness.load_results(str(tmp_path))
    trials = results.trials
    assert (results.complete, results.folder, results.report) == (True, tmp_path, None)
    assert len(trials) == 2 * 3 * 3
    assert set(trials["adapter.rank"].dropna()) == {4}
    assert (str(trials["adapter.rank"].dtype), str(trials["seed"].dtype)) == ("Int64", "Int64")
    assert trials["adapter.rank"].isna().sum() == 12  # none and full have no rank
    assert set(trials["budget.examples"]) == {"64", "all"}
    assert set(trials["data.examples"]) == {64, 256}
    by_budget = trials.groupby("data.examples")["phases_s.train"].mean()
    assert by_budget.to_dict() == {64: 8.0, 256: 32.0}
    assert list(results.leaderboard["label"]) == [row.label for row in results.board.rows]
    for _, line in results.leaderboard.iterrows():
        own = trials[(trials["label"] == line["label"]) & (trials["setting"] == line["setting"])]
        assert math.isclose(own["test.cider"].mean(), line["cider"])


def test_the_parquet_file_has_the_columns_of_the_frame(tmp_path: Path) -> None:
    write_sweep(tmp_path / "run", lambda *_: 0.5)
    results = harness.load_results(tmp_path / "run")
    (path,) = (path for path in write_exports(results.board, tmp_path) if path.suffix == ".parquet")
    kept = pd.read_parquet(path, dtype_backend="numpy_nullable")
    assert list(kept.columns) == list(results.trials.columns)
    assert kept["adapter.rank"].tolist() == results.trials["adapter.rank"].tolist()


def test_several_folders_are_one_leaderboard(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", fake_plan(seeds=(0, 1), settings=("",)))
    other = write_run(tmp_path / "other", fake_plan(seeds=(2, 3), settings=("",)))
    results = harness.load_results([one, str(other)])
    assert results.folders == (one, other)
    assert sorted(set(results.trials["seed"])) == [0, 1, 2, 3]
    assert {row.seeds for row in results.board.rows} == {"4/4"}
    with pytest.raises(harness.UserError, match="results of 2 run folders"):
        _ = results.folder


def test_a_run_in_progress_is_incomplete_and_a_missing_one_is_an_error_at_once(tmp_path: Path) -> None:
    def first_seed(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        return record if trial.seed == 0 else None

    (tmp_path / "grid" / "report").mkdir(parents=True)
    (tmp_path / "grid" / "report" / "index.html").touch()
    results = harness.load_results(write_run(tmp_path / "grid", fake_plan(settings=("",)), first_seed))
    assert not results.complete
    assert len(results.trials) == 8
    assert results.report == tmp_path / "grid" / "report" / "index.html"
    with pytest.raises(harness.UserError, match=r"gird: no such folder; .*did you mean '.*grid'"):
        harness.load_results(tmp_path / "gird")
    with pytest.raises(harness.UserError, match="no run folder given"):
        harness.load_results([])
