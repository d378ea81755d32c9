"""Brings the run of one trial in MLflow up to what the trial's files say: by whoever, and however often.

A run is looked for before it is made, and a point before it is sent, wherever an earlier attempt may have got through.
So nothing is lost and nothing doubled, whenever the server, this process or the machine dies.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from harness.core.files import write_atomically
from harness.core.record import PlannedTrial, TrialRecord, record_path
from harness.tracking.journal import Journal, Point
from harness.tracking.log import TRIAL_FILES, curves_of, data_of, key_of, params_of, scores_of, status_of, tags_of
from harness.tracking.store import connect, repository_of

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
TRIAL_TAG, RECORD_TAG = "harness.trial_id", "harness.record"
RUN_ID_FILE = "mlflow_run_id"  # of a run folder, and of each trial's folder
_OUTCOME_TAGS = {"harness.status", "harness.reason", "harness.pruned_at_epoch", RECORD_TAG}
_METRICS_PER_CALL, _PARAMS_PER_CALL = 800, 100  # MLflow takes 1,000 values, 100 params and 100 tags at once
_INFINITY = 1.7976931348623157e308  # as which MLflow's databases keep it


@dataclass(frozen=True)
class Destination:
    """A parent run, as a trial needs it.

    Attributes:
        uri: of the store.
        experiment_id: of MLflow's experiment; None: the store did not answer when the run began.
        parent_run_id: of the grid.
    """

    uri: str
    experiment_id: str | None
    parent_run_id: str


class Delivery:
    """The delivery of one trial. Every method raises whatever the store raises, and may be called again then.

    Args:
        to: the parent run.
        planned: the trial's display names.
        spec: the values of its spec, which become params.
        journal: its points.
        looking: whether an earlier process may have made a run whose id the folder lacks.

    Attributes:
        run_id: of the run, once it is known.
    """

    def __init__(
        self,
        to: Destination,
        planned: PlannedTrial,
        spec: Mapping[str, Any],
        journal: Journal,
        looking: bool,
    ) -> None:
        self.run_id: str | None = None
        self._to, self._planned, self._spec, self._journal = to, planned, spec, journal
        self._folder, self._looking = journal.path.parent, looking
        self._client: Any = None
        self._params: dict[str, str] = {}  # that the run lacks
        self._sent = 0  # points of the journal that are surely there
        self._sure = False  # of the points that were to be sent so far, all are there
        self._adopted = False  # the run was there: it may have what this object does not know
        self._run: Any = None

    def open(self) -> None:
        """Make the run, if there is none."""
        if self._client is None:
            self._client = connect(self._to.uri)
        if self._run is None:
            self._open()

    def update(self) -> None:
        """Make the run, if there is none, and send the params and points that it lacks."""
        self.open()
        self._send()

    def end(self, record: TrialRecord) -> None:
        """Send everything, with the scores, tags, data and files of the record, and end the run.

        A call costs about as much as what is in it, so all params, points and tags that are left go in one. That one
        has the tag of the record; a run lacks nothing only if it has this tag and has ended.
        """
        self.open()
        stat = record_path(self._folder.parent.parent, record.trial_id)
        end_ms = int(stat.stat().st_mtime * 1000) if stat.exists() else self._journal.began_ms
        known = {(key, step) for key, _, step, _ in self._journal.points}
        curves = [(key, x, step) for key, x, step in curves_of(record) if (key, step) not in known]
        scores = [(key, x, 0) for key, x in scores_of(record).items()]
        points = [Point(key, float(x), step, end_ms) for key, x, step in (*curves, *scores)]
        self._send(points, tags_of(record) | {RECORD_TAG: digest_of(record)})
        task = record.spec.get("task", {}).get("name")
        if record.data and task and not self._run.inputs.dataset_inputs:
            self._client.log_inputs(self.run_id, data_of(task, record.data))
        artifacts = repository_of(self._run, self._to.uri)
        for path in filter(Path.exists, (self._folder / name for name in TRIAL_FILES)):
            artifacts.log_artifact(str(path))
        self._client.set_terminated(self.run_id, status_of(record), end_ms)

    def _open(self) -> None:
        tags = {
            PARENT_TAG: self._to.parent_run_id,
            "harness.kind": "trial",
            TRIAL_TAG: self._planned.trial_id,
            "harness.label": self._planned.label,
            "harness.setting": self._planned.setting,
        }
        experiment = self._experiment()
        run = self._found(experiment)
        self._adopted = run is not None
        if run is None:
            self._looking = True  # the answer may be lost
            began_ms = self._journal.began_ms
            run = self._client.create_run(experiment, start_time=began_ms, tags=tags, run_name=self._name)
            self._sure = True
            with suppress(OSError):  # a full disk: it is found by its tags
                write_atomically(self._folder / RUN_ID_FILE, str(run.info.run_id))
        self.run_id = str(run.info.run_id)
        if self._adopted:
            self._client.update_run(self.run_id, status="RUNNING", name=self._name)
            if changed := {key: value for key, value in tags.items() if run.data.tags.get(key) != value}:
                self._client.log_batch(self.run_id, tags=_tags(changed))
            for key in _OUTCOME_TAGS & run.data.tags.keys():
                self._client.delete_tag(self.run_id, key)
        # MLflow refuses another value of a param that is there.
        self._params = {key: x for key, x in params_of(self._spec).items() if key not in run.data.params}
        self._run = run

    def _experiment(self) -> str:
        """The experiment; where the store did not answer when the grid began, the grid runs again from now on."""
        if self._to.experiment_id is not None:
            return self._to.experiment_id
        self._client.update_run(self._to.parent_run_id, status="RUNNING")
        return str(self._client.get_run(self._to.parent_run_id).info.experiment_id)

    def _found(self, experiment: str) -> Any:
        """The run of an earlier attempt: the one whose id the folder has, or the latest with the tags of this trial."""
        if known := known_run(self._client, self._folder):
            return known
        if not self._looking:
            return None
        condition = (
            f"tags.`{PARENT_TAG}` = '{self._to.parent_run_id}' and tags.`{TRIAL_TAG}` = '{self._planned.trial_id}'"
        )
        runs = self._client.search_runs([experiment], condition, order_by=["attributes.start_time DESC"], max_results=1)
        return self._client.get_run(runs[0].info.run_id) if runs else None

    @property
    def _name(self) -> str:
        planned = self._planned
        rate = f"lr={planned.learning_rate:g}" if planned.learning_rate else ""
        return " ".join(filter(None, (planned.label, planned.grouping, planned.setting, rate, f"seed={planned.seed}")))

    def _send(self, last: Sequence[Point] = (), tags: Mapping[str, str] | None = None) -> None:
        """Send what was not sent yet of params and journal, then the ``last`` points, and the tags in the last call."""
        from mlflow.entities import Metric, Param

        unsent = self._journal.points[self._sent :]
        points = [
            *(unsent if self._sure else self._missing(unsent)),
            *(self._missing(last) if self._adopted or not self._sure else last),
        ]
        metrics = [Metric(key_of(point.key), point.value, point.at_ms, point.step) for point in points]
        params = [Param(key, value) for key, value in self._params.items()]  # may be sent again
        calls = list(zip_longest(_parts(metrics, _METRICS_PER_CALL), _parts(params, _PARAMS_PER_CALL), fillvalue=()))
        if tags and not calls:
            calls = [((), ())]
        self._sure = False  # until all answers are here, a point may be there or not
        for number, (some_metrics, some_params) in enumerate(calls, 1):
            last_tags = _tags(tags) if tags and number == len(calls) else ()
            self._client.log_batch(self.run_id, metrics=some_metrics, params=some_params, tags=last_tags)
        self._sure, self._params = True, {}
        self._sent += len(unsent)

    def _missing(self, points: Sequence[Point]) -> list[Point]:
        """The points that the run lacks; the time of a point is left aside."""
        there = {
            (key, metric.step, _kept(metric.value))
            for key in {key_of(point.key) for point in points}
            for metric in self._client.get_metric_history(self.run_id, key)
        }
        return [point for point in points if (key_of(point.key), point.step, _kept(point.value)) not in there]


def known_run(client: Any, folder: Path) -> Any:
    """The active run whose id a folder has; None: there is none."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    path = folder / RUN_ID_FILE
    run_id = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise  # no answer: nothing is known
        logger.info("%s: the tracking server has no such run", path)
        return None
    return run if run.info.lifecycle_stage == "active" else None


def digest_of(record: TrialRecord) -> str:
    """What tells whether a run has this record or an earlier one."""
    return hashlib.sha256(record.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:16]


def _kept(value: float) -> str:
    """A value as databases keep it."""
    return repr(math.copysign(_INFINITY, value) if math.isinf(value) else float(value))


def _tags(values: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(key, value) for key, value in values.items()]


def _parts(items: Sequence[Any], size: int) -> Iterable[list[Any]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))
