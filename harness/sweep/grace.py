"""Lets running trials save where they are before they end: if their run is ended early, or their process.

The driver of a run asks its trials by a file in the run folder, which they see on any node. A process is ended by
SIGTERM, as a machine sends it that goes away; its trial goes on in another one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from harness.core.files import write_atomically
from harness.core.storage import Folder, StorageError
from harness.sweep.members import members_of
from harness.sweep.stopping import interrupts_kept, is_requested

REQUEST = "stopping"  # the file
STOPPED = "stopped"  # the phase of a trial that was asked to stop
_LOOK_S = 1.0  # how often a trial looks for the request
_LOOK_AT_URL_S = 5.0  # the same where that is a request to a storage


class PreemptedError(Exception):
    """The process of a trial got SIGTERM; the trial has saved where it is."""


# ── In the process of a trial

_terminated = threading.Event()
_at_work = 0  # trials of this process


def save_at_sigterm() -> None:
    """End the trial that runs in this process at the first SIGTERM; to be called in the main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        if _at_work and not _terminated.is_set():
            _terminated.set()
        elif callable(before):
            before(number, frame)
        else:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, handle)


class StopRequest:
    """Whether a trial is asked to stop; a call costs no more than a look at the clock, except once a second.

    Args:
        run: the run folder.
        url: of the run folder, if it is at one; it is asked in a thread.
    """

    def __init__(self, run: Path, url: str | None = None) -> None:
        self._run, self._url = run, url
        self._asked = False
        self._looked = 0.0

    def __call__(self) -> bool:
        """Whether it is."""
        if self.preempted:
            return True
        now = time.monotonic()
        if not self._asked and self._url is None and now - self._looked >= _LOOK_S:
            self._looked, self._asked = now, is_requested(self._run, REQUEST)
        return self._asked

    @property
    def preempted(self) -> bool:
        """Whether only this process is ended."""
        return _terminated.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while a trial runs."""
        global _at_work  # noqa: PLW0603 - of the process, as signals are
        over = threading.Event()
        if self._url is not None:
            threading.Thread(target=self._watch, args=(Folder(self._url), over), daemon=True).start()
        _at_work += 1
        try:
            yield
        finally:
            _at_work -= 1
            over.set()

    def _watch(self, folder: Folder, over: threading.Event) -> None:
        while not over.wait(_LOOK_AT_URL_S):
            with suppress(StorageError):
                self._asked = self._asked or folder.read(REQUEST) is not None


# ── In the driver


@dataclass(frozen=True)
class Request:
    """The request to the trials of a run to stop.

    Attributes:
        run: the run folder.
        there: where its copy is, if it is at a URL.
    """

    run: Path
    there: Folder | None = None

    def make(self) -> None:
        """Ask them; those who cannot see it are ended when their time is over."""
        write_atomically(self.run / REQUEST, "the run ends\n")
        if self.there:
            with suppress(StorageError):
                self.there.write(REQUEST, b"the run ends\n")

    def withdraw(self) -> None:
        """Remove it, also one of a driver that was killed.

        Raises:
            StorageError: the storage cannot be written to.
        """
        (self.run / REQUEST).unlink(missing_ok=True)
        if self.there:
            self.there.remove([REQUEST])


class Grace:
    """Ends a sweep at Ctrl-C, or at what is handled like it, once running trials have saved where they are.

    Args:
        grace_s: how long that may take.
        request: to the trials.
        note: told what is waited for.
    """

    def __init__(self, grace_s: float, request: Request, note: Callable[[str], None]) -> None:
        self.grace_s, self._request, self._note = grace_s, request, note
        self._since: float | None = None
        self._awaited: list[Any] | None = None  # the trials that ran when they were asked

    def __getstate__(self) -> dict[str, Any]:
        """Return no state: Tune pickles its scheduler, which asks this, and displays are unpicklable."""
        return {}

    @property
    def ending(self) -> bool:
        """Whether no other trial should start."""
        return self._since is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle Ctrl-C while ``Tuner.fit`` runs, instead of Tune, which stops all trials at once.

        Raises:
            StorageError: an earlier request could not be removed.
        """
        self._request.withdraw()
        with interrupts_kept():
            if threading.current_thread() is threading.main_thread():
                before = signal.getsignal(signal.SIGINT)
                signal.signal(signal.SIGINT, lambda *_: self._interrupted(before))
            try:
                yield
            finally:
                with suppress(StorageError):
                    self._request.withdraw()

    def _interrupted(self, before: Any) -> None:
        if self._since is None:
            self._since = time.monotonic()
        else:  # a second time
            signal.signal(signal.SIGINT, before)
            _end_tune()

    def check(self, trials: Sequence[Any]) -> None:
        """Ask the trials to stop, or end the sweep, if it is time.

        Args:
            trials: of Tune.
        """
        if self._since is None:
            return
        if self._awaited is None:
            self._awaited = [trial for trial in trials if trial.status == "RUNNING"]
            self._request.make()
            if running := sum(len(members_of(trial)) for trial in self._awaited):
                count = f"{running} running trial{'s' * (running > 1)}"
                self._note(f"{count} may save where they are, for {self.grace_s:g} s; Ctrl-C ends them at once")
        running = any(trial.status == "RUNNING" for trial in self._awaited)
        if not running or time.monotonic() - self._since >= self.grace_s:
            _end_tune()


def _end_tune() -> None:
    """Make ``Tuner.fit`` stop all trials and return; Tune listens to this signal beside Ctrl-C.

    Raises:
        KeyboardInterrupt: Tune has not begun to listen, so the signal would kill this process.
    """
    if not callable(signal.getsignal(signal.SIGUSR1)):
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGUSR1)
