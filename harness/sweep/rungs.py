"""A trial as Tune's trainable, from rung to rung of halving."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from harness.core.record import waiting_at
from harness.sweep.grace import STOPPED
from harness.sweep.ray_library import tune


def run_to_end(trial: Mapping[str, Any], run: Path, attempt: Callable[[Collection[int]], bool]) -> None:
    """Run a trial, and report where it waits; Tune ends this process's part there, or lets it go on at once.

    A trial that waits already only reports that: what happens then depends on the run folder alone.

    Args:
        trial: as the sweep packed it, with ``trial_id`` and ``rungs``.
        run: the run folder.
        attempt: runs the trial until the next of these rungs or its end; returns whether it was asked to stop.
    """
    rungs = set(trial["rungs"])
    while True:
        if waiting_at(run, trial["trial_id"], rungs) is None:
            stopped = attempt(rungs)
            if stopped:
                tune.report({"fraction": 0.0, "phase": STOPPED})
                return
        rung = waiting_at(run, trial["trial_id"], rungs)
        if rung is None:
            break
        tune.report({"fraction": rung / trial["epochs"], "phase": "paused", "epoch": rung, "rung": rung})
        rungs = {later for later in rungs if later > rung}
    tune.report({"fraction": 1.0, "phase": "done"})
