"""The leaderboard in MLflow: scores on the runs, a saved view of the trials as a table, and links to both.

MLflow opens an experiment on its page for language-model applications, without columns. So the view is saved as its
button "Share" saves one (a tag of the experiment, as JSON), and the link names the view and the kind of page.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

from harness.core.profile import Measured
from harness.core.record import MetricInfo
from harness.tracking.journal import SYSTEM
from harness.tracking.log import key_of, log_metrics
from results.export.columns import PROFILED, all_columns
from results.export.text import markdown_table
from results.leaderboard.format import ABSENT
from results.leaderboard.recommend import recommend
from results.leaderboard.summary import headline
from results.leaderboard.table import Leaderboard, Row

BOARD = "leaderboard"
RANK_TAG, VERDICT_TAG = "harness.rank", "harness.verdict"
_DESCRIBED_SETTINGS, _DESCRIBED_ROWS = 3, 12  # MLflow keeps 8,000 characters
_PER_CALL = 1000  # metrics that MLflow takes at once
_NAME_WIDTH, _PIXELS = 330, 6  # of the saved view's columns: of the run's name, of each character of other headings
_TRAINING = "workflowType=machine_learning"  # the pages for training runs
_SHARED = "mlflow.sharedViewState."


def trials_link(experiment_id: str, parent_run_id: str) -> str:
    """Path on MLflow's page of the table of a grid's trials, as the saved view shows it."""
    return f"#/experiments/{experiment_id}/runs?{_TRAINING}&viewStateShareKey={quote(_view(parent_run_id))}"


def grid_link(experiment_id: str, parent_run_id: str) -> str:
    """Path on MLflow's page of the parent run of a grid."""
    return f"#/experiments/{experiment_id}/runs/{parent_run_id}?{_TRAINING}"


def _view(parent_run_id: str) -> str:
    return f"harness-{parent_run_id[:12]}"


def save_view(client: Any, experiment_id: str, parent_run_id: str, parent_tag: str, board: Leaderboard) -> None:
    """Save the view of the trials of a grid: the columns of the leaderboard, best row first."""
    primary = board.primary
    scores, others = list(map(_metric, _scores_shown(board))), list(map(_metric, _others_shown(board)))
    verdicts = [f"tags.`{VERDICT_TAG}`"] if len(scores) > 1 else []  # there is something to compare with
    columns = [f"tags.`{RANK_TAG}`", *scores, *verdicts, *others, *map(_param, _varying(board)), _param("seed")]
    name = "attributes.`Run Name`"
    state = {
        "searchFilter": f"tags.`{parent_tag}` = '{parent_run_id}'",
        "orderByKey": _metric(_mean_of(primary)),
        "orderByAsc": not primary.higher_is_better,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": [name, *columns],
        "columnWidths": {name: _NAME_WIDTH} | {one: _PIXELS * len(one) for one in columns},
        "runsHiddenMode": "FIRST_20_RUNS",
    }
    client.set_experiment_tag(experiment_id, _SHARED + _view(parent_run_id), json.dumps(state))


def _metric(key: str) -> str:
    return f"metrics.`{key_of(key)}`"


def _param(key: str) -> str:
    return f"params.`{key}`"


def _scores_shown(board: Leaderboard) -> Iterator[str]:
    yield _mean_of(board.primary)
    if any(board.primary.name in row.differences for row in board.rows):
        yield _difference_of(board)


def _others_shown(board: Leaderboard) -> Iterator[str]:
    """Size, speed, memory; the trial's own primary score and one more."""
    yield f"{SYSTEM}/parameters/trainable"
    if board.run.profile is not None:
        yield f"{SYSTEM}/profile/step_time_ratio"
        yield f"{SYSTEM}/profile/peak_memory_bytes"
    yield f"test/{board.primary.name}"
    second = next((i for i in board.ranking_metrics[1:] if any(i.name in row.metrics for row in board.rows)), None)
    if second is not None:
        yield f"test/{second.name}"


def _varying(board: Leaderboard) -> list[str]:
    """Params that differ between the trials, other than what the name of a run has: none where there is one setting."""
    return ["examples", "epochs"] if len(board.settings) > 1 else []


def _mean_of(info: MetricInfo) -> str:
    return f"{BOARD}/{info.name}"


def _difference_of(board: Leaderboard) -> str:
    return f"{BOARD}/{board.primary.name}_vs_{board.run.plan.reference_method}"


def log_board(client: Any, parent_run_id: str, children: Iterable[Any], board: Leaderboard) -> None:
    """Log the leaderboard's scores, the ranks and the profile on the trials, and every row's score on the parent run.

    A run that has these values already is left alone, so that a grid that is extended costs what is new.

    Args:
        client: of MLflow.
        parent_run_id: of the grid.
        children: the runs of its trials.
        board: the leaderboard.
    """
    rows = {trial.trial_id: row for row in board.rows for trial in row.trials}
    for child in children:
        trial_id = child.data.tags.get("harness.trial_id", "")
        row = rows.get(trial_id)
        metrics = (_scores(row, board) if row else {}) | _profile(trial_id, board)
        gone = {key: math.nan for key in child.data.metrics if key.startswith(f"{BOARD}/") and key not in metrics}
        _update(client, child, metrics | gone, _tags(row, board))
    scored = [(row, row.metrics[board.primary.name]) for row in board.rows if board.primary.name in row.metrics]
    values = [(f"{BOARD}/{' '.join(filter(None, (row.setting, row.name)))}", found.mean) for row, found in scored]
    for start in range(0, len(values), _PER_CALL):
        log_metrics(client, parent_run_id, dict(values[start : start + _PER_CALL]))


def _scores(row: Row, board: Leaderboard) -> dict[str, float]:
    found, difference = row.metrics.get(board.primary.name), row.differences.get(board.primary.name)
    values = {_mean_of(board.primary): found.mean} if found else {}
    return values | ({_difference_of(board): difference.mean} if difference else {})


def _profile(trial_id: str, board: Leaderboard) -> dict[str, float]:
    entry = board.run.profile.entry_of(trial_id) if board.run.profile else None
    measured: dict[str, Measured | None] = {name: getattr(entry, name) for name in PROFILED} if entry else {}
    return {f"{SYSTEM}/profile/{name}": value.median for name, value in measured.items() if value is not None}


def _tags(row: Row | None, board: Leaderboard) -> dict[str, str]:
    """The range of ranks, and the verdict against the reference; only for trials of the chosen learning rate."""
    if row is None:
        return {}
    columns = all_columns(board, [row])
    return {
        tag: columns[name].brief(row) if name in columns else ABSENT
        for name, tag in (("rank", RANK_TAG), ("verdict", VERDICT_TAG))
    }


def _update(client: Any, run: Any, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Log what is not there yet."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    known = run.data.metrics
    new_metrics = [
        Metric(key_of(key), float(value), now, 0)
        for key, value in metrics.items()
        if not _equal(known.get(key_of(key)), value)
    ]
    new_tags = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
    if new_metrics or new_tags:
        client.log_batch(run.info.run_id, metrics=new_metrics, tags=new_tags)


def _equal(known: float | None, value: float) -> bool:
    return known is not None and (known == value or (math.isnan(known) and math.isnan(value)))


def describe_board(board: Leaderboard) -> str:
    """The leaderboard as Markdown, for the description of the parent run, of which MLflow shows the first lines."""
    ranked = any(row.rank for row in board.rows)
    lines = [f"**Recommended:** {recommend(board)[0].sentence}"] if ranked else headline(board)
    columns = ("rank", "method", board.primary.name, "difference", "verdict", "trainable", "step_time", "memory")
    for setting in board.settings[:_DESCRIBED_SETTINGS]:
        rows = board.of(setting)[:_DESCRIBED_ROWS]
        lines += ["", *([f"**{setting}**", ""] if setting else []), *markdown_table(board, rows, columns, brief=True)]
    return "\n".join(lines) + "\n"
