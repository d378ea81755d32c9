"""The progress of a run in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from harness.core.durations import duration
from harness.sweep.live import trial_name
from results.leaderboard.progress import Progress

SHOWN_FAILURES = 10
LARGE = 2_000  # planned trials: of more, the leaderboard takes longer to make and to read than anybody waits for


def progress_lines(progress: Progress, active: bool) -> Iterator[str]:
    """Counts, running trials, the time left, and the first failures."""
    failed = ", ".join(f"{count} {status}" for status, count in progress.failed.items())
    counts = [f"{progress.finished} of {progress.planned} trials finished", failed]
    counts += [f"{count} {word}" for count, word in ((progress.pruned, "pruned"), (progress.paused, "paused")) if count]
    counts += [f"{len(progress.running)} running", f"{progress.waiting} waiting"]
    yield ", ".join(filter(None, counts))
    if not active:
        if progress.waiting or progress.paused:
            yield "no harness is running in this folder: run the experiment again for the remaining trials"
    elif progress.left_s is None:
        yield "a harness is running in this folder; the time left can be estimated once a trial has finished"
    else:
        yield (
            f"{duration(progress.mean_wall_time_s)} a trial, {max(1, len(progress.running))} at a time: "
            f"roughly {duration(progress.left_s)} left"
        )
    yield from (f"running: {trial_name(trial)}" for trial in progress.running)
    for trial, record in progress.failures[:SHOWN_FAILURES]:
        yield f"{record.status.replace('_', ' ')}: {trial_name(trial)}: {record.reason or 'no reason given'}"
    if (rest := len(progress.failures) - SHOWN_FAILURES) > 0:
        yield f"… and {rest} more that did not finish"
