"""A pack of trials in a Ray worker, where it is one trial of Tune."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.record import PlannedTrial
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.kept import OF_WORKER
from harness.sweep.grace import StopRequest
from harness.sweep.hangs import stack_if_stuck
from harness.sweep.ray_library import tune
from harness.tracking.grid import Grid
from harness.tracking.tracker import MlflowTracker
from harness.trial.log import LOG
from harness.trial.pack import Wanted, run_pack
from harness.trial.trial import REPORT_INTERVAL_S, Progress


class PackReport:
    """Reports to Tune how far the trials of a pack are, all at once: each report waits for the driver.

    Args:
        send: gets the reports.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None] = tune.report) -> None:
        self._send = send
        self._members: dict[str, dict[str, Any]] = {}
        self._sent = 0.0

    def progressed(self, trial_id: str, progress: Progress) -> None:
        """A trial has progressed."""
        self._members[trial_id] = vars(progress)
        if time.monotonic() - self._sent >= REPORT_INTERVAL_S:
            self._flush(progress.phase)

    def ended(self, trial_id: str) -> None:
        """A trial has ended; its record is written."""
        self._members.pop(trial_id, None)
        self._flush("train", ended=[trial_id])

    def _flush(self, phase: str, **more: Any) -> None:
        self._send({"phase": phase, "members": dict(self._members), **more})
        self._members.clear()
        self._sent = time.monotonic()


def attempt_pack(
    members: Sequence[Mapping[str, Any]],
    rungs: Mapping[str, Collection[int]],
    experiment: str,
    run: Path,
    resources: Resources,
    grid: Grid,
    stop: StopRequest,
) -> bool:
    """Run trials to their ends or to their next rungs; returns whether they were asked to stop.

    Args:
        members: as the sweep packed them, with ``trial_id``, ``spec`` and ``planned``.
        rungs: of each, the epochs after which it pauses.
        experiment: its name.
        run: the run folder.
        resources: of a trial.
        grid: where they are logged.
        stop: whether they are asked to stop.
    """
    report = PackReport()
    log = run / "trials" / members[0]["trial_id"] / LOG
    with stop.listening(), stack_if_stuck(log, resources.trial_timeout_s) as progressed:

        def wanted(member: Mapping[str, Any]) -> Wanted:
            spec = TrialSpec.model_validate_json(member["spec"])
            planned = PlannedTrial.model_validate_json(member["planned"])

            def tell(progress: Progress) -> None:
                progressed()
                report.progressed(planned.trial_id, progress)

            tracker = MlflowTracker(grid, spec, planned, run / "trials" / planned.trial_id)
            return Wanted(spec, tracker, tell, tuple(rungs[planned.trial_id]), lambda: report.ended(planned.trial_id))

        records = run_pack([wanted(member) for member in members], experiment, run, resources, stop, OF_WORKER)
    return any(record.status == "cancelled" for record in records)
