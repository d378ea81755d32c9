"""What of a trial is logged to MLflow: params from its spec; metrics, datasets and files from its record."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from harness.core.naming import flatten
from harness.core.record import Data, TrialRecord
from harness.tracking.journal import SYSTEM

TRIAL_FILES = ("record.json", "examples.parquet", "attention.safetensors", "log.txt")
_CURVES = {"learning_rate": "schedule/learning_rate"}  # in a section of its own, below the losses
_STATUS = {"finished": "FINISHED", "cancelled": "KILLED", "pruned": "KILLED"}
# A param is named by its path in the spec. Params used for filtering and sorting have short names …
_SHORT = {
    "task.name": "task",
    "backbone.language_model": "language_model",
    "adapter.method": "method",
    "adapter.grouping_name": "grouping",
    "adapter.config.rank": "rank",
    "budget.examples": "examples",
    "budget.epochs": "epochs",
    "optimizer.learning_rate": "learning_rate",
}
# … and values that follow from other params, or are tags because they may change, are not params.
_NO_PARAM = re.compile(
    r"task\.(plugin|modalities|metrics)\..*|adapter\.(plugins|label|learning_rate|tried_learning_rates)"
    r"|adapter\.groups\.\w+\.plugins"
    r"|eval\.(primary_metric|equivalence_margin)|relative_to"
)


def params_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """The values of a spec by their path, or by their short name; empty values are left out."""
    pairs = flatten(spec)
    return {
        key_of(_SHORT.get(path, path)): str(value)
        for path, value in pairs
        if value not in (None, "", []) and not _NO_PARAM.fullmatch(path)
    }


def log_metrics(client: Any, run_id: str, values: Mapping[str, float], step: int = 0) -> None:
    """Log several metrics, now. MLflow draws a single value at step 0 as a bar, not as a curve."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run_id, [Metric(key_of(key), float(value), now, step) for key, value in values.items()])


def key_of(name: str) -> str:
    """A name that MLflow accepts: ``recall@5`` becomes ``recall_5``."""
    return re.sub(r"[^\w.\-/: ]", "_", name)


def named(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an epoch by their names in MLflow."""
    return {_CURVES.get(name, f"epoch/{name}"): float(value) for name, value in values.items()}


def curves_of(record: TrialRecord) -> Iterator[tuple[str, float, int]]:
    """The metrics of all epochs of a record, each with its value and its optimizer step."""
    for epoch in record.history:
        for key, value in named(epoch.model_dump(exclude={"epoch", "step"})).items():
            yield key, value, epoch.step


def scores_of(record: TrialRecord) -> dict[str, float]:
    """The scores, counts, sizes and times of a record."""
    scores = {f"{split}/{name}": x for split, metrics in record.metrics.items() for name, x in metrics.items()}
    return scores | {f"{SYSTEM}/{name}": x for name, x in _counters(record).items()}


def tags_of(record: TrialRecord) -> dict[str, str]:
    """What a record says of its trial in words."""
    tags = {"status": record.status, "reason": record.reason, "device": record.device}
    tags["git_revision"] = record.git_revision
    tags["pruned_at_epoch"] = str(record.pruned.epoch) if record.pruned else None
    return {f"harness.{key}": value for key, value in tags.items() if value}


def status_of(record: TrialRecord) -> str:
    """The status in MLflow's words."""
    return _STATUS.get(record.status, "FAILED")


def _counters(record: TrialRecord) -> dict[str, float]:
    """Counts, sizes and times: what has no curve and is no score."""
    values: dict[str, float] = {"wall_time_s": record.wall_time_s}
    if record.best_epoch is not None:
        values["best_epoch"] = record.best_epoch
    for kind in ("parameters", "memory", "throughput"):
        part = getattr(record, kind)
        fields = part.model_dump(exclude={"by_group"}, exclude_none=True) if part else {}
        values |= {f"{kind}/{name}": x for name, x in fields.items()}
    return values | {f"phases_s/{name}": x for name, x in record.phases_s.items()}


def data_of(task: str, data: Data) -> list[Any]:
    """The training and evaluation data as MLflow's datasets: equal digests mean equal examples."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            # MLflow allows 36 characters of a digest; the whole fingerprint is in the record.
            Dataset(f"{task} {context}", fingerprint[:36], "harness task", task, profile=profile),
            [InputTag("mlflow.data.context", context)],
        )
        for context, fingerprint, profile in (
            ("training", data.examples_fingerprint, json.dumps({"num_rows": data.examples})),
            ("evaluation", data.evaluation_fingerprint, None),
        )
    ]
