"""METEOR in one Java process per Python process: 5 seconds and half a gigabyte to start, then 0.6 ms an image.

The process ends at the exit of the interpreter, and by the end of its input when this process is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycocoevalcap.meteor import meteor as library

from tasks.metrics.java import java_command

FOLDER = Path(library.__file__).parent


class _Meteor(library.Meteor):  # type: ignore[misc]  # pycocoevalcap has no types
    """pycocoevalcap's METEOR, its Java process started and ended by us."""

    def __init__(self) -> None:
        # A file: the library makes a pipe that it never reads, and a full pipe would block Java for ever.
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self.lock = threading.Lock()  # compute_score expects it; an error leaves it held
        # `-a`: in a folder whose path has a space or an accent the jar does not find its own paraphrases.
        options = ("-", "-", "-stdio", "-l", "en", "-norm", "-a", "data/paraphrase-en.gz")
        self.meteor_p = subprocess.Popen(
            java_command("-Xmx2G", "-jar", library.METEOR_JAR, *options),
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
        )

    def end(self) -> str:
        """Kill the process and return the end of its error output."""
        self.meteor_p.kill()
        with contextlib.suppress(OSError), self.meteor_p:  # an unsent line breaks the pipe again when closed
            pass
        with self.stderr as file:
            file.seek(0)
            return file.read().decode(errors="replace")[-1000:].strip()

    def __del__(self) -> None:
        """Do nothing: the library's hangs on a lock left held, and after a fork kills the parent's process."""


_lock = threading.Lock()
_process: _Meteor | None = None


def _end() -> str:
    global _process
    ending, _process = _process, None
    return ending.end() if ending is not None else ""


def _forget() -> None:
    # A forked child shares the pipes of its parent's process: two writers would get each other's scores.
    global _lock, _process
    _lock, _process = threading.Lock(), None


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)


def meteor(references: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> tuple[float, list[float]]:
    """Score tokenised captions; safe from several threads.

    Args:
        references: id → tokenised captions, at least one.
        predictions: id → tokenised caption, for the same ids.

    Returns:
        The corpus score, and the score of every example in the order of ``references``; between 0 and 1.

    Raises:
        RuntimeError: Java failed; the next call starts a new process.
    """
    global _process  # noqa: PLW0603
    # "|||" separates the fields of a request. The library strips it from predictions; in a reference it would make two.
    gts = {key: [text.replace("|||", "") for text in texts] for key, texts in references.items()}
    res = {key: [predictions[key]] for key in references}
    with _lock:
        try:
            if _process is None or _process.meteor_p.poll() is not None:
                _end()
                _process = _Meteor()
            corpus, per_example = _process.compute_score(gts, res)
        except BaseException as error:  # an interrupt, too, leaves answers in the pipe that the next call would read
            detail = _end()
            if isinstance(error, OSError | ValueError):
                raise RuntimeError(f"METEOR failed ({error}): {detail or 'no message from Java'}") from error
            raise
    return corpus, per_example
