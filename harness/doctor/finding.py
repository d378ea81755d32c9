"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        what: that was looked at: ``Java``, ``disk``.
        level: ``fail``: trials cannot run, or lose something; ``warn``: they run, but not as they could.
        found: in words.
        advice: what to do; empty if nothing is wrong.
    """

    what: str
    level: Level
    found: str
    advice: str = ""


def ok(what: str, found: str) -> Finding:
    """Nothing is wrong."""
    return Finding(what, "ok", found)


def warn(what: str, found: str, advice: str) -> Finding:
    """Trials run, but not as they could."""
    return Finding(what, "warn", found, advice)


def fail(what: str, found: str, advice: str) -> Finding:
    """Trials cannot run, or lose something."""
    return Finding(what, "fail", found, advice)
