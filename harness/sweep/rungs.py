"""A trial as Tune's trainable, from rung to rung of halving."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness.core.record import record_path, waiting_at
from harness.sweep.grace import STOPPED
from harness.sweep.ray_library import tune

Rungs = dict[str, set[int]]  # trial id → epochs after which it pauses


def run_to_end(trial: Mapping[str, Any], run: Path, attempt: Callable[[Rungs], bool]) -> None:
    """Run a trial of Tune, and report where it waits; Tune ends this process's part there, or lets it go on at once.

    A trial that waits already only reports that: what happens then depends on the run folder alone. Of a pack, those go
    on that are behind the others, until all wait or have ended.

    Args:
        trial: as the sweep packed it, with ``members``, which have a ``trial_id``, ``rungs`` and ``epochs``.
        run: the run folder.
        attempt: runs these trials until the next of their rungs or their ends; returns whether they were asked to stop.
    """
    left: Rungs = {member["trial_id"]: set(member["rungs"]) for member in trial["members"]}
    while left:
        waiting = _waiting(run, left)
        if behind := {key: rungs for key, rungs in left.items() if key not in waiting}:
            if attempt(behind):
                tune.report({"fraction": 0.0, "phase": STOPPED})
                return
            waiting = _waiting(run, left)
            left = {key: rungs for key, rungs in left.items() if key in waiting}
        if not waiting:
            break
        rung = min(waiting.values())
        there = [key for key, own in waiting.items() if own == rung]
        place = {"epoch": rung, "rung": rung, "waiting": there, "others": len(left) - len(there)}
        tune.report({"fraction": rung / trial["epochs"], "phase": "paused", **place})
        for key in there:
            left[key] = {later for later in left[key] if later > rung}
        left = {key: rungs for key, rungs in left.items() if not record_path(run, key).exists()}  # pruned
    tune.report({"fraction": 1.0, "phase": "done"})


def _waiting(run: Path, left: Rungs) -> dict[str, int]:
    """Trial id → the rung at which it waits."""
    found = {key: waiting_at(run, key, rungs) for key, rungs in left.items()}
    return {key: rung for key, rung in found.items() if rung is not None}
