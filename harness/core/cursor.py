"""Where in the user's input something is: what every message about it starts with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Cursor:
    """A place in an experiment file, or in values that were passed from Python.

    ``str(cursor / "adapters" / 2 / "rank")`` is ``grid.yaml, line 7, adapters[2].rank``. The line is that of the
    innermost part of the path that is in the file.
    """

    origin: str = ""  # the file; empty for values from Python
    path: KeyPath = ()
    lines: Mapping[KeyPath, int] = field(default_factory=dict, repr=False)  # of every key path in the file
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
        """``adapters[2].rank``."""
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).removeprefix(".")

    @property
    def is_written(self) -> bool:
        """Whether the file has this key."""
        return self.path in self.lines
