"""The leaderboard in MLflow: what is logged on which run, and what the saved view shows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.profile import Measured, Profile, ProfileEntry
from harness.core.record import PlannedTrial, TrialRecord, read_run
from harness.tracking.board import describe_board, grid_link, log_board, save_view, trials_link
from results.leaderboard.table import Leaderboard, build_leaderboard
from tests.support.runs import fake_plan, write_run

PARENT = "0123456789abcdef0123456789abcdef"


class Client:
    """Keeps what is logged, as MLflow does: the last value of each metric and tag of a run."""

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}
        self.experiment_tags: dict[str, str] = {}
        self.calls = 0

    def run(self, trial_id: str) -> Any:
        info, data = SimpleNamespace(run_id=trial_id), SimpleNamespace(metrics={}, tags={"harness.trial_id": trial_id})
        return self.runs.setdefault(trial_id, SimpleNamespace(info=info, data=data))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        assert len(metrics) <= 1000
        self.calls += 1
        self.run(run_id).data.metrics.update({one.key: one.value for one in metrics})
        self.run(run_id).data.tags.update({one.key: one.value for one in tags})

    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
        self.experiment_tags[key] = value


def profiled(board: Leaderboard) -> Leaderboard:
    entries = tuple(
        ProfileEntry(
            key=row.name, name=row.name, setting="", trial_ids=tuple(trial.trial_id for trial in row.trials),
            reference="Full fine-tuning", reference_trial_ids=(), device="CPU",
            step_time_ratio=Measured(median=1.25, n=9),
        )
        for row in board.rows
        if row.method == "lora"
    )  # fmt: skip
    return replace(board, run=replace(board.run, profile=Profile(entries=entries)))


@pytest.fixture
def board(tmp_path: Path) -> Leaderboard:
    plan = fake_plan(seeds=(0, 1, 2), settings=("",), primary_metric="perplexity")
    return profiled(build_leaderboard(read_run(write_run(tmp_path, plan))))


def logged(board: Leaderboard, client: Client | None = None) -> Client:
    client = client or Client()
    trials = [client.run(trial.trial_id) for trial in board.run.plan.trials]
    log_board(client, PARENT, trials, board)
    return client


def test_trials_have_the_leaderboards_scores_and_the_profile_and_the_parent_every_rows(board: Leaderboard) -> None:
    client = logged(board)
    for row in board.rows:
        for trial in row.trials:
            data = client.runs[trial.trial_id].data
            assert data.metrics["leaderboard/perplexity"] == row.metrics["perplexity"].mean
            assert data.tags["harness.rank"] == row.rank_text
            compared = None if row.is_reference else row.differences["perplexity"].mean
            assert data.metrics.get("leaderboard/perplexity_vs_full") == compared
            ratio = 1.25 if row.method == "lora" else None
            assert data.metrics.get("system/profile/step_time_ratio") == ratio
    parent = client.runs[PARENT].data.metrics
    assert parent["leaderboard/LoRA r_4 specific"] == pytest.approx(
        next(row for row in board.rows if row.name == "LoRA r=4 specific").metrics["perplexity"].mean
    )
    assert len(parent) == len(board.rows)


def test_logging_again_logs_nothing_that_is_there(board: Leaderboard) -> None:
    client = logged(board)
    before = client.calls
    logged(board, client)
    assert client.calls == before + 1  # the parent run alone


def test_a_row_that_leaves_the_leaderboard_takes_its_scores_with_it(board: Leaderboard, tmp_path: Path) -> None:
    client = logged(board)

    def without(trial: PlannedTrial, record: TrialRecord) -> TrialRecord | None:
        return record.model_copy(update={"metrics": {}, "status": "failed"}) if trial.method == "ia3" else record

    later = build_leaderboard(read_run(write_run(tmp_path / "later", board.run.plan, without)))
    logged(later, client)
    for trial in board.run.plan.trials:
        data = client.runs[trial.trial_id].data
        assert math.isnan(data.metrics["leaderboard/perplexity"]) == (trial.method == "ia3")
        assert (data.tags["harness.rank"] == "–") == (trial.method == "ia3")


def test_the_saved_view_is_sorted_and_has_the_scores_as_columns(board: Leaderboard) -> None:
    client = Client()
    save_view(client, "7", PARENT, "mlflow.parentRunId", board)
    ((key, value),) = client.experiment_tags.items()
    assert key == "mlflow.sharedViewState.harness-0123456789ab"
    assert len(value) < 5000  # MLflow's limit
    view = json.loads(value)
    assert view["searchFilter"] == f"tags.`mlflow.parentRunId` = '{PARENT}'"
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`leaderboard/perplexity`", True)
    shown = set(view["selectedColumns"])
    assert {"tags.`harness.rank`", "metrics.`leaderboard/perplexity_vs_full`", "metrics.`test/cider`"} <= shown
    assert {"metrics.`system/parameters/trainable`", "metrics.`system/profile/step_time_ratio`"} <= shown
    assert view["columnOrder"][1:] == view["selectedColumns"]
    available = set(logged(board).runs[board.rows[-1].trials[0].trial_id].data.metrics)
    own = {f"metrics.`{name}`" for name in available if name.startswith("leaderboard/")}
    assert {name for name in shown if "leaderboard/" in name} == own


def test_a_higher_score_is_first_where_it_is_better(tmp_path: Path) -> None:
    board = build_leaderboard(read_run(write_run(tmp_path, fake_plan(primary_metric="cider"))))
    client = Client()
    save_view(client, "7", PARENT, "mlflow.parentRunId", board)
    view = json.loads(next(iter(client.experiment_tags.values())))
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`leaderboard/cider`", False)
    assert not [name for name in view["selectedColumns"] if "profile" in name]  # none was measured


def test_links_open_the_pages_of_training_runs() -> None:
    assert trials_link("7", PARENT) == (
        "#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=harness-0123456789ab"
    )
    assert grid_link("7", PARENT) == f"#/experiments/7/runs/{PARENT}?workflowType=machine_learning"


def test_the_description_is_the_leaderboard(board: Leaderboard) -> None:
    text = describe_board(board)
    assert text.index("| Full fine-tuning |") < text.index("| none |")
    assert len(text) < 6000
