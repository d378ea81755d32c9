"""What is known of input files: that they decode, and the SHA-256 of their content, remembered by size and time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from harness.record import write_atomically

FILE_NAME = "inputs.json"


class Inputs:
    """The input files of a run folder, as ``inputs.json`` remembers them.

    Reading a large data set takes minutes, so the driver reads every file once and the trials use what it found.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / FILE_NAME
        self._known: dict[str, list[object]] = {}
        if self.path.exists():
            self._known = json.loads(self.path.read_text(encoding="utf-8"))

    def unread(self, paths: Iterable[Path]) -> list[Path]:
        """Those not read since they were last changed, each once."""
        return [path for path in dict.fromkeys(paths) if self._known.get(str(path), [])[:2] != _stamp(path)]

    def read(self, path: Path, decode: Callable[[Path], object]) -> None:
        """Decode a file and remember its digest; raises what ``decode`` raises."""
        decode(path)
        self._known[str(path)] = [*_stamp(path), _digest(path)]

    def save(self) -> None:
        """Write ``inputs.json``."""
        write_atomically(self.path, json.dumps(self._known))

    def digest(self, path: Path) -> str:
        """SHA-256 of the file's content: remembered, or computed now if the file is not known or has changed."""
        known = self._known.get(str(path), [])
        return str(known[2]) if known[:2] == _stamp(path) else _digest(path)


def _stamp(path: Path) -> list[object]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
