"""Ends a run early, in order: SIGTERM, or a request in the run folder (``harness stop``), is handled like Ctrl-C.

Slurm sends SIGTERM before it takes nodes away, Kubernetes before it removes a pod. The request is a file, which reaches
a driver on another machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal

from harness.core.files import write_atomically

REQUEST = "stop"  # the file in the run folder
POLL_S = 2.0  # how often the driver looks for it
Reason = Literal["signal", "request", "interrupt", "budget"]
# 128 + number of the signal, as a shell has it
EXIT_CODES: dict[Reason, int] = {"request": 3, "budget": 4, "signal": 143, "interrupt": 130}
_BUDGET = "budget.gpu_hours"  # begins a request that was not made by hand


class Stopping:
    """Whether a run was asked to end early.

    Attributes:
        folder: the run folder.
        reason: None until it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reason: Reason | None = None

    @property
    def text(self) -> str:
        """What ended the run, for a message."""
        texts = {
            "signal": "ended by SIGTERM",
            "request": "ended by harness stop",
            "interrupt": "interrupted",
            "budget": f"{_BUDGET} is reached",
        }
        return texts[self.reason or "interrupt"]

    @property
    def advice(self) -> str:
        """What is kept, and how the run goes on."""
        larger = f" with a larger {_BUDGET}" if self.reason == "budget" else ""
        return f"finished trials are kept; run the same experiment again{larger} to continue"

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM as Ctrl-C at this moment; once only, so that the report is written in peace.

        Raises:
            KeyboardInterrupt: unless something else handles Ctrl-C now, as Tune does while trials run.
        """
        if self.reason is not None:
            return
        self.reason = _requested(self.folder / REQUEST) or "signal"
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)
        else:  # ignored, as in the background of a shell script
            raise KeyboardInterrupt


@contextmanager
def handler_kept() -> Iterator[None]:
    """Keep the handler of SIGTERM around ``ray.init``, which replaces it by one that exits with the signal's number."""
    handler = signal.getsignal(signal.SIGTERM)
    ended = False
    try:
        yield
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        ended = True
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    if ended:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Restore the handler of Ctrl-C after ``Tuner.fit``, which leaves its own: the next Ctrl-C would have no effect."""
    numbers = [signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def last_words(line: str) -> Iterator[Callable[[], None]]:
    """Print a line on standard error if this process ends inside of the block, by Ray or by a signal.

    Ray ends it without a word of what to do when the node process (raylet) dies. A shell waits for the end of a pipe
    that only this process holds. Yields what to call if there is nothing more to say.
    """
    waits = ["sh", "-c", 'read -r word || printf "%s\n" "$0" >&2', line]
    with subprocess.Popen(waits, stdin=subprocess.PIPE, start_new_session=True) as shell:

        def keep_quiet() -> None:
            if shell.stdin and not shell.stdin.closed:
                with suppress(OSError):  # somebody has ended the shell
                    shell.stdin.write(b"\n")
                    shell.stdin.close()

        try:
            yield keep_quiet
        finally:
            keep_quiet()


def request_stop(folder: Path, reason: Literal["request", "budget"] = "request") -> None:
    """Ask the driver of a run, wherever it runs, to end it."""
    begin = f"{_BUDGET} is reached" if reason == "budget" else "requested"
    write_atomically(folder / REQUEST, f"{begin} at {datetime.now(UTC).isoformat(timespec='seconds')}\n")


def _requested(request: Path) -> Reason | None:
    """What asked for the end of the run; None: nothing did."""
    try:
        return "budget" if request.read_text(encoding="utf-8").startswith(_BUDGET) else "request"
    except FileNotFoundError:
        return None


@contextmanager
def stoppable(folder: Path) -> Iterator[Stopping]:
    """Listen to SIGTERM and to requests in a run folder, which this process has locked; an older request is removed.

    Outside the main thread, which gets the signals, nothing is listened to.

    Raises:
        SystemExit: the run was ended before it had anything to report.
    """
    stopping = Stopping(folder)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    (folder / REQUEST).unlink(missing_ok=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, over), daemon=True)
    signal.signal(signal.SIGTERM, stopping.handle)
    watcher.start()
    try:
        yield stopping
    except KeyboardInterrupt:
        if stopping.reason is None:
            raise
        raise SystemExit(EXIT_CODES[stopping.reason]) from None
    finally:
        over.set()
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def is_requested(folder: Path, request: str = REQUEST) -> bool:
    """Whether there is a request in a run folder.

    The folder is listed, because of a single file NFS remembers for up to a minute that it was not there.
    """
    try:
        return any(path.name == request for path in folder.iterdir())
    except OSError:  # a file system that does not answer now
        return False


def _watch(folder: Path, over: threading.Event) -> None:
    while not over.wait(POLL_S):
        if is_requested(folder):
            os.kill(os.getpid(), signal.SIGTERM)
            return
