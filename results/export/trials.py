"""Every trial's record as one row of a typed table: trials.parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from harness.core.files import atomic
from harness.core.profile import Measured
from harness.core.record import Data, Memory, Parameters, PlannedTrial, Run, Throughput, TrialRecord
from results.export.columns import PROFILED
from results.export.options import option_columns

if TYPE_CHECKING:
    import pandas as pd

Read = Callable[[PlannedTrial, TrialRecord], Any]
_json = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make an encoder for every value
Columns = dict[str, tuple[pa.DataType, Read]]
_TYPES: dict[Any, pa.DataType] = {
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
}


def trials_table(run: Run) -> pa.Table:
    """One row per planned trial with a record, in the order of the plan; missing is null.

    Columns: the names of the trial in the plan; status and reason; each axis and option by its key in the experiment
    file (see ``results.export.options``); each score as ``split.metric``; ``parameters.*``, ``memory.*``,
    ``throughput.*`` and ``data.*`` as in the record; ``phases_s.*``; ``profile.*`` if there is one; time, versions
    (JSON), origin and folder.
    """
    pairs = [(trial, run.records[trial.trial_id]) for trial in run.plan.trials if trial.trial_id in run.records]
    records = [record for _, record in pairs]
    columns = _scores(records)
    for part, schema in (
        ("parameters", Parameters),
        ("memory", Memory),
        ("throughput", Throughput),
        ("data", Data),
    ):
        columns |= _part(part, schema)
    columns |= _phases(records) | _profile(run) | _ending(run)
    return pa.table(
        _read(_named(), pairs) | option_columns([record.spec for record in records]) | _read(columns, pairs)
    )


def _read(columns: Columns, pairs: Sequence[tuple[PlannedTrial, TrialRecord]]) -> dict[str, pa.Array]:
    return {name: pa.array([read(*pair) for pair in pairs], kind) for name, (kind, read) in columns.items()}


def trials_frame(run: Run) -> pd.DataFrame:
    """``trials_table`` as a DataFrame; integers and booleans have pandas' nullable types."""
    import pandas as pd

    nullable = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}
    frame: pd.DataFrame = trials_table(run).to_pandas(types_mapper=nullable.get)
    return frame


def _named() -> Columns:
    text, whole, real = pa.string(), pa.int64(), pa.float64()
    return {
        "trial_id": (text, lambda trial, _: trial.trial_id),
        "experiment": (text, lambda _, record: record.experiment),
        "setting": (text, lambda trial, _: trial.setting),
        "label": (text, lambda trial, _: trial.label),
        "method": (text, lambda trial, _: trial.method),
        "grouping": (text, lambda trial, _: trial.grouping),
        "learning_rate": (real, lambda trial, _: trial.learning_rate),
        "seed": (whole, lambda trial, _: trial.seed),
        "status": (text, lambda _, record: record.status),
        "reason": (text, lambda _, record: record.reason),
        "best_epoch": (whole, lambda _, record: record.best_epoch),
    }


def _scores(records: list[TrialRecord]) -> Columns:
    found = {(split, name) for record in records for split, metrics in record.metrics.items() for name in metrics}

    def reader(split: str, name: str) -> Read:
        return lambda _, record: record.metrics.get(split, {}).get(name)

    return {f"{split}.{name}": (pa.float64(), reader(split, name)) for split, name in sorted(found)}


def _phases(records: Sequence[TrialRecord]) -> Columns:
    """Seconds of each phase: build, train, validate, test."""

    def reader(name: str) -> Read:
        return lambda _, record: record.phases_s.get(name)

    names = dict.fromkeys(name for record in records for name in record.phases_s)
    return {f"phases_s.{name}": (pa.float64(), reader(name)) for name in names}


def _profile(run: Run) -> Columns:
    """The profile of each trial's method: medians and intervals of what was measured apart from training."""

    def reader(name: str, part: str) -> Read:
        def read(trial: PlannedTrial, _: TrialRecord) -> float | None:
            entry = run.profile.entry_of(trial.trial_id) if run.profile else None
            value: Measured | None = getattr(entry, name) if entry else None
            return getattr(value, part) if value else None

        return read

    parts = {"median": "", "low": "_low", "high": "_high"}
    return {
        f"profile.{name}{ending}": (pa.float64(), reader(name, part))
        for name in (PROFILED if run.profile else ())
        for part, ending in parts.items()
    }


def _part(part: str, schema: type[BaseModel]) -> Columns:
    """A column for each plain field; counts by group and lists of fingerprints are JSON."""

    own = attrgetter(part)

    def reader(name: str, plain: bool) -> Read:
        of = attrgetter(name)

        def read(_: PlannedTrial, record: TrialRecord) -> Any:
            owner = own(record)
            value = None if owner is None else of(owner)
            return value if plain or value is None else _json(value)

        return read

    columns: Columns = {}
    for name, field in schema.model_fields.items():
        kind = next((kind for of, kind in _TYPES.items() if field.annotation in (of, of | None)), None)
        columns[f"{part}.{name}"] = (kind or pa.string(), reader(name, kind is not None))
    return columns


def _ending(run: Run) -> Columns:
    text = pa.string()
    return {
        "wall_time_s": (pa.float64(), lambda _, record: record.wall_time_s),
        "started_at": (text, lambda _, record: record.started_at),
        "versions": (text, lambda _, record: _json(record.versions)),
        "git_revision": (text, lambda _, record: record.git_revision),
        "device": (text, lambda _, record: record.device or None),
        "mlflow_run_id": (text, lambda _, record: record.mlflow_run_id),
        "folder": (text, lambda trial, _: str(run.trial_folder(trial.trial_id))),
    }


def write_trials(run: Run, path: Path) -> None:
    """Write the table atomically: a reader, or a crash, sees either the whole old file or the whole new one."""
    with atomic(path) as partial:
        pq.write_table(trials_table(run), partial)
