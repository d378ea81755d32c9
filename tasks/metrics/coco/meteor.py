"""METEOR in one Java process per Python process: seconds and half a gigabyte to start, then less than 1 ms an image.

The process ends when the interpreter exits, or with its input when this process is killed.

It runs without ``-norm``, which would normalise every reference again for every prediction, a third of its time. The
same normaliser is run once beforehand on the captions that it may change: see ``normalise``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray
from pycocoevalcap.meteor import meteor as library

from tasks.metrics.coco.java import java_command, map_lines

FOLDER = Path(library.__file__).parent
JAR: str = library.METEOR_JAR
PARAPHRASES = "data/paraphrase-en.gz"
Floats = NDArray[np.float64]
# Requests in flight. Their answers, of some 200 bytes each, must fit into a pipe; otherwise Java would wait for us to
# read them, and we for Java to read the requests.
_AT_ONCE = 64
# Parameters of METEOR 1.5 for English: the weight of content words (delta), and of words that match exactly, by their
# stem, as synonyms, and as paraphrases.
_CONTENT = 0.75
_WAYS = (1.0, 0.6, 0.8, 0.6)
_UNCHANGED = re.compile("[a-z0-9 ]*")  # the normaliser leaves words of letters and digits as they are


def files() -> tuple[Path, ...]:
    """What METEOR reads: its jar, which holds its stemmer, synonyms and function words, and its paraphrases."""
    return (FOLDER / JAR, FOLDER / PARAPHRASES)


class _Meteor:
    """A running METEOR and its protocol: ``SCORE`` returns the statistics of an image, ``EVAL`` the scores."""

    def __init__(self) -> None:
        # A file: nothing reads a pipe meanwhile, and a full one would block Java forever.
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        # `-a`: in a folder whose path has a space or an accent the jar does not find its own paraphrases.
        options = ("-", "-", "-stdio", "-l", "en", "-a", PARAPHRASES)
        self.java = subprocess.Popen(
            java_command("-Xmx2G", "-jar", JAR, *options),
            cwd=FOLDER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
        )
        self.requests, self.answers = cast(IO[bytes], self.java.stdin), cast(IO[bytes], self.java.stdout)

    def score(self, requests: Sequence[str]) -> tuple[float, list[float], Floats]:
        """Score requests, each ``reference ||| … ||| prediction``: the corpus score, the score of each, the counts."""
        statistics: list[str] = []
        for start in range(0, len(requests), _AT_ONCE):
            chunk = requests[start : start + _AT_ONCE]
            self._send("".join(f"SCORE ||| {request}\n" for request in chunk))
            statistics += [self._answer() for _ in chunk]
        self._send(" ||| ".join(["EVAL", *statistics]) + "\n")
        counts = _counts(statistics)  # while Java works
        per_example = [float(self._answer()) for _ in requests]
        return float(self._answer()), per_example, counts

    def _send(self, text: str) -> None:
        self.requests.write(text.encode())
        self.requests.flush()

    def _answer(self) -> str:
        line = self.answers.readline().decode().strip()
        float(line.split(" ", 1)[0])  # anything but a number is an error message and must not be taken for statistics
        return line

    def end(self) -> str:
        """Kill the process and return the end of its error output."""
        self.java.kill()
        with contextlib.suppress(OSError), self.java:  # an unsent line breaks the pipe again when closed
            pass
        with self.stderr as file:
            file.seek(0)
            return file.read().decode(errors="replace")[-1000:].strip()


def _counts(statistics: Sequence[str]) -> Floats:
    """The terms of METEOR's formula, (I, 6), from its output lines.

    A line is: words of the prediction and of the reference, function words of both, four numbers for each kind of match
    (content words of both, function words of both), chunks, matched words of both. Over the corpus METEOR adds no chunk
    for a prediction that is matched whole, as is its reference, in one chunk.
    """
    lines = np.loadtxt(statistics).reshape(len(statistics), 23)
    words, function_words, (chunks, *matched) = lines[:, :2], lines[:, 2:4], lines[:, 20:].T
    content, function = np.moveaxis(lines[:, 4:20].reshape(-1, 4, 2, 2), 2, 0)  # each (I, ways, prediction, reference)
    whole = np.all(np.sum(content + function, axis=1) == words, axis=1) & (chunks == 1)
    matches = np.tensordot(_CONTENT * content + (1 - _CONTENT) * function, _WAYS, (1, 0))
    lengths = _CONTENT * (words - function_words) + (1 - _CONTENT) * function_words
    both = np.stack([matches, lengths], axis=2).reshape(-1, 4)
    return np.column_stack([both, np.where(whole, 0, chunks), np.mean(matched, axis=0)])


_lock = threading.Lock()
_process: _Meteor | None = None


def _end() -> str:
    global _process
    ending, _process = _process, None
    return ending.end() if ending is not None else ""


def _forget() -> None:
    # A forked child shares the pipes of its parent's Java process: two writers would read each other's scores.
    global _lock, _process
    _lock, _process = threading.Lock(), None


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)


def start() -> None:
    """Start the process unless it runs, without waiting until it has read its data.

    Raises:
        OSError: Java could not be started.
    """
    with _lock:
        _running()


def _running() -> _Meteor:
    """The process, started if there is none; call it with the lock."""
    global _process  # noqa: PLW0603
    if _process is None or _process.java.poll() is not None:
        _end()
        _process = _Meteor()
    return _process


def normalise(captions: Iterable[str]) -> dict[str, str]:
    """Normalise captions as METEOR's option ``-norm`` does: "close-up" becomes "close up".

    Returns:
        Caption → normalised, for those with other characters than lower-case letters, digits and spaces. The others
        are unchanged and omitted.

    Raises:
        RuntimeError: Java failed.
    """
    # "|||" separates the fields of a request. The library strips it from predictions; in a reference it would make two.
    odd = {caption: caption.replace("|||", "") for caption in captions if not _UNCHANGED.fullmatch(caption)}
    if not odd:
        return {}
    arguments = ("-cp", JAR, "edu.cmu.meteor.util.Normalizer", "en", "true")
    return dict(zip(odd, map_lines("METEOR normaliser", arguments, FOLDER, list(odd.values())), strict=True))


def meteor(
    references: Sequence[Sequence[str]], predictions: Sequence[str], normalised: Mapping[str, str] | None = None
) -> tuple[float, list[float], Floats]:
    """Score tokenised captions; safe from several threads.

    Args:
        references: for every example its tokenised captions, at least one.
        predictions: for every example its tokenised prediction.
        normalised: the result of ``normalise`` for the references, if known.

    Returns:
        The corpus score, and the score of every example; between 0 and 1. And (I, 6) the counts whose sums give the
        corpus score: matches and length of the prediction, matches and length of the reference, all weighted; chunks,
        and matched words.

    Raises:
        RuntimeError: Java failed; the next call starts a new process.
    """
    forms = dict(normalised) if normalised is not None else normalise(text for texts in references for text in texts)
    forms |= normalise(predictions)
    requests = [
        " ||| ".join(forms.get(text, text) for text in (*texts, prediction))
        for texts, prediction in zip(references, predictions, strict=True)
    ]
    with _lock:
        try:
            return _running().score(requests)
        except BaseException as error:  # an interrupt, too, leaves answers in the pipe that the next call would read
            detail = _end()
            if isinstance(error, OSError | ValueError):
                raise RuntimeError(f"METEOR failed ({error}): {detail or 'no message from Java'}") from error
            raise
