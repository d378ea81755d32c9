"""Locations in the user's input, used as the prefix of error messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Cursor:
    """A location in an experiment file, or in values passed from Python.

    ``str(cursor / "adapters" / 2 / "rank")`` is ``grid.yaml, line 7, adapters[2].rank``. The line number is that of the
    longest prefix of the path that exists in the file.
    """

    origin: str = ""  # file name; empty for values from Python
    path: KeyPath = ()
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False)  # line number of every key path in the file
    # The text of values from environment variables, which look like a number where an option may take text.
    texts: Mapping[KeyPath, str] = field(default_factory=dict, repr=False)

    def __truediv__(self, key: str | int) -> Cursor:
        return Cursor(self.origin, (*self.path, key), self.lines, self.texts)

    def __str__(self) -> str:
        known = next((self.path[:n] for n in range(len(self.path), -1, -1) if self.path[:n] in self.lines), None)
        line = "" if known is None else f"line {self.lines[known]}"
        return ", ".join(filter(None, (self.origin, line, self.key)))

    @property
    def key(self) -> str:
        """The path as text: ``adapters[2].rank``."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).removeprefix(".")

    @property
    def is_written(self) -> bool:
        """Whether the file contains this key."""
        return self.path in self.lines
