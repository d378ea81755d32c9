"""Durations as text, the same in the page, the exported tables and the terminal."""

from __future__ import annotations


def duration(seconds: float | None) -> str:
    """``12.3 s``, ``4 min 05 s``, ``3 h 20 min``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    return f"{minutes} min {rest_s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
