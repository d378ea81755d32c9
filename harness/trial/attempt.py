"""One attempt to run a trial: whatever ends it becomes its record. Does not depend on Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.core.exhaustion import is_out_of_memory
from harness.core.origin import describe
from harness.core.record import Status, TrialRecord
from harness.core.registry import plugins_in
from harness.core.revisions import git_revision
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.kept import Kept
from harness.tracking.tracker import Tracker
from harness.trial import measure
from harness.trial.log import LOG, log_to
from harness.trial.outcome import conclude
from harness.trial.steps import Steps, take_each
from harness.trial.trial import Report, Stop, StoppedError, Trial, never

logger = logging.getLogger(__name__)


def run_trial(
    spec: TrialSpec,
    experiment: str,
    run: Path,
    resources: Resources,
    tracker: Tracker,
    report: Report,
    rungs: Collection[int] = (),
    stop: Stop = never,
    kept: Kept | None = None,
) -> TrialRecord:
    """Run one trial and write its record, also if it fails; only the death of the process leaves no record.

    Args:
        spec: of the trial.
        experiment: name of the experiment, for the record.
        run: the run folder.
        resources: for threads, ZeRO stage and checkpoint interval.
        tracker: receives metrics and the record.
        report: called with the progress, at most about once a second and after every epoch.
        rungs: epochs after which it pauses.
        stop: whether the trial is asked to stop; called before every step, and now and then in other phases.
        kept: what earlier trials of this process have left for it, and it for later ones.

    Returns:
        The record, with status finished, failed or out_of_memory, and the reason; or with status paused, which is
        written as ``paused.json`` and not as the record; or with status cancelled, which is not written, of a trial
        that was asked to stop.
    """
    folder = run / "trials" / spec.trial_id
    trial = Trial(spec, folder, resources, tracker, report, rungs=rungs, stop=stop, kept=kept)
    with log_to(folder / LOG):
        return take_each(steps_to_record(trial, experiment), trial.take)


def steps_to_record(trial: Trial, experiment: str) -> Steps[TrialRecord]:
    """Run a trial of one process to its record, which is written, for who takes its training steps."""
    attempt = yield from steps_of_attempt(trial, experiment)
    conclude(attempt.record, trial.folder.parent.parent, trial.tracker)
    return attempt.record


@dataclass(frozen=True)
class Attempt:
    """A trial that has ended: its record, which is not written yet, and the error that ended it."""

    record: TrialRecord
    error: Exception | None = None


def make_attempt(trial: Trial, experiment: str) -> Attempt:
    """Run a trial; its errors are in the result.

    Args:
        trial: which has not run yet.
        experiment: name of the experiment, for the record.
    """
    return take_each(steps_of_attempt(trial, experiment), trial.take)


def steps_of_attempt(trial: Trial, experiment: str) -> Steps[Attempt]:
    """As ``make_attempt``, for who takes the training steps; an error of one is to be thrown in."""
    spec, tracker = trial.spec, trial.tracker
    started, clock = datetime.now(UTC), time.monotonic()
    plugins = plugins_in(spec.model_dump(mode="json"))
    status: Status = "finished"
    reason = None
    problem: Exception | None = None
    try:
        with trial.kept.dropped_on_error():
            yield from trial.steps()
        if trial.paused:
            status, reason = "paused", f"waits at epoch {len(trial.state.history)} for the others of its row"
    except StoppedError:
        status, reason = "cancelled", f"asked to stop at step {trial.state.step} of {trial.total_steps}"
    except Exception as error:  # a failed trial must not stop the others
        status = "out_of_memory" if is_out_of_memory(error) else "failed"
        reason, problem = describe(error, plugins, trial.folder / LOG), error
        logger.exception("out of memory" if status == "out_of_memory" else "the trial failed")

    def record_of(measured: dict[str, Any]) -> TrialRecord:
        return TrialRecord(
            trial_id=spec.trial_id,
            experiment=experiment,
            status=status,
            reason=reason,
            spec=spec.model_dump(mode="json"),
            seed=spec.seed,
            wall_time_s=sum(trial.state.phases_s.values()) or time.monotonic() - clock,
            phases_s=trial.state.phases_s,
            history=tuple(trial.state.history),
            best_epoch=trial.state.best_epoch,
            started_at=started.isoformat(timespec="seconds"),
            versions=dict(measure.versions()),
            git_revision=git_revision(Path(__file__).parent.parent),
            mlflow_run_id=tracker.run_id,
            warnings=(*trial.warnings, *tracker.warnings),
            workers=trial.workers.count,
            **measured,
        )

    try:
        record = record_of(trial.measured)
    except ValidationError as error:  # the reason must not be lost with the worker process
        status, reason, problem = "failed", describe(error, plugins, trial.folder / LOG), error
        logger.exception("what was measured is no record")
        record = record_of({})
    return Attempt(record, problem)
