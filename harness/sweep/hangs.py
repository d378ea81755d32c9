"""Trials that make no progress: a deadlock, a file system that does not answer, a loop without an end.

A stuck process can do nothing about itself, so the driver ends it; in the worker, a thread of the interpreter that
needs none of Python's locks writes before that where it is stuck.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_START, _START_S = "start", 300.0  # the phase in which a process reads its libraries, and how long it has at least
_WRITE_S = 2.0  # for the worker, which has the same limit, to write its stacks
_STEP_S = 10.0  # a driver that itself stood still for longer, in a sleeping laptop, counts no more


class Hangs:
    """How long each running trial has made no progress.

    Args:
        limit_s: how long one may; None: without limit.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._quiet_s: dict[str, float] = {}
        self._phase: dict[str, str] = {}
        self._looked = time.monotonic()

    def progressed(self, trial_id: str, phase: str = _START) -> None:
        """A trial has started, without a phase, or reported something."""
        self._phase[trial_id] = phase
        self._quiet_s[trial_id] = self._looked - time.monotonic()  # the next look adds what was before, too

    def ended(self, trial_id: str) -> None:
        """A trial runs no more."""
        self._quiet_s.pop(trial_id, None)

    def stuck(self, running: Sequence[str]) -> dict[str, str]:
        """The running trials that are stuck, and since when in which phase; to be asked every few seconds."""
        now = time.monotonic()
        step, self._looked = min(now - self._looked, _STEP_S), now
        found = {}
        for trial_id in running:
            self._quiet_s[trial_id] = self._quiet_s.get(trial_id, 0.0) + step
            phase = self._phase.get(trial_id, _START)
            limit_s = None if self._limit_s is None else max(self._limit_s, _START_S if phase == _START else 0.0)
            if limit_s is not None and self._quiet_s[trial_id] >= limit_s + _WRITE_S:
                found[trial_id] = f"no progress for {limit_s:g} s (in phase {phase})"
        return found


@contextmanager
def stack_if_stuck(log: Path, limit_s: float | None) -> Iterator[Callable[[], None]]:
    """Write where each thread of this process is into a trial's log, if it makes no progress for too long.

    Args:
        log: of the trial.
        limit_s: how long; None: never.

    Yields:
        To be called with every progress.
    """
    if limit_s is None:
        yield lambda: None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:

        def progressed() -> None:
            faulthandler.dump_traceback_later(limit_s, file=file)

        progressed()
        try:
            yield progressed
        finally:
            faulthandler.cancel_dump_traceback_later()
