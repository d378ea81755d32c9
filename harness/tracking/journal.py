"""What a trial has measured and MLflow may lack: a file of the trial, which is there until MLflow has all of it.

One line for each moment, only ever appended. A line that a crash or a full disk has cut is left out, and no other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

JOURNAL = "mlflow.jsonl"  # in a trial's folder
SYSTEM = "system"  # what is below it MLflow shows on its page "System metrics", apart from losses and scores
_MAX_BYTES = 64 * 2**20  # about a month of samples of the system; then these are left out


class Point(NamedTuple):
    """One value of a metric."""

    key: str
    value: float
    step: int
    at_ms: int


class Journal:
    """The points of one trial.

    Args:
        folder: the trial's.

    Attributes:
        points: all of them, in order.
        began_ms: when the first process began the trial.
        earlier: whether an earlier process had begun it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        lines = _lines(self.path)
        self.earlier = bool(lines)
        self.began_ms = next((int(line["began_ms"]) for line in lines if "began_ms" in line), _now_ms())
        self.points = [point for line in lines for point in _points_of(line)]
        self._known = {(key, step, repr(value)) for key, value, step, _ in self.points}
        self._bytes = self.path.stat().st_size if lines else 0
        self._file: Any = None

    def begin(self) -> None:
        """Open it for writing.

        Raises:
            OSError: it cannot be written to.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        self._file = self.path.open("ab", buffering=0)
        if torn:
            self._file.write(b"\n")
        if not self.earlier:
            self._write({"began_ms": self.began_ms})

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of this moment, without those that are there already: a resumed trial repeats an epoch.

        Raises:
            OSError: they could not be written; they are in ``points`` all the same.
        """
        new = {key: value for key, value in values.items() if (key, step, repr(value)) not in self._known}
        if not new or (self._bytes > _MAX_BYTES and all(key.startswith(f"{SYSTEM}/") for key in new)):
            return
        line = {"at_ms": _now_ms(), "step": step, "metrics": new}
        self.points += _points_of(line)
        self._known |= {(key, step, repr(value)) for key, value in new.items()}
        self._write(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the file: MLflow has all of it."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            content = json.dumps(line).encode() + b"\n"
            self._bytes += len(content)
            if self._file.write(content) < len(content):
                raise OSError(f"{self.path}: written in part: the disk is full")


def _now_ms() -> int:
    return int(time.time() * 1000)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in content.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _points_of(line: Mapping[str, Any]) -> list[Point]:
    try:
        return [
            Point(str(k), float(v), int(line["step"]), int(line["at_ms"])) for k, v in line.get("metrics", {}).items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []
