"""One process of a trial that has several, its workers: see ``harness.model.workers``.

A worker never writes the record of a failed trial by itself. Where one dies, the others fail too, because they wait for
it; then the trial is no failure, but starts again. Whoever started the workers hears of all, and decides.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.kept import OF_WORKER
from harness.model.workers import joined
from harness.tracking.tracker import Tracker
from harness.trial.attempt import make_attempt
from harness.trial.log import LOG, log_to
from harness.trial.outcome import Outcome, conclude
from harness.trial.trial import Report, Stop, Trial, never

# How gloo and NCCL say that they lost another process.
_LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Socket Timeout|store.*(closed|reset)", re.IGNORECASE
)


def run_worker(
    spec: TrialSpec,
    experiment: str,
    run: Path,
    resources: Resources,
    tracker: Tracker,
    report: Report,
    rungs: Collection[int] = (),
    stop: Stop = never,
) -> Outcome:
    """Run a trial in this worker and the others of its process group; rank 0 writes the record of one that finishes.

    Args:
        spec: of the trial, and the others as for ``run_trial``.
        experiment: name of the experiment.
        run: the run folder, which all workers see.
        resources: of the trial.
        tracker: of rank 0; the others log nothing.
        report: called by rank 0 with the progress.
        rungs: epochs after which it pauses.
        stop: whether this worker is asked to stop the trial.
    """
    workers, folder = joined(), run / "trials" / spec.trial_id
    with log_to(folder / LOG) if workers.first else nullcontext():
        trial = Trial(spec, folder, resources, tracker, report, workers, rungs, stop, OF_WORKER)
        attempt = make_attempt(trial, experiment)
        if workers.first and attempt.error is None:
            conclude(attempt.record, run, tracker)
    error, record = attempt.error, attempt.record if workers.first else None
    lines = "".join(traceback.format_exception(error)) if error else ""
    lost = isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))
    return Outcome(workers.rank, attempt.record.status, attempt.record.reason, lines, lost, record)
