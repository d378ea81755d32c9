"""How often the kernel has killed processes of this machine because there was no memory."""

from __future__ import annotations

from pathlib import Path

_COUNTS = Path("/proc/vmstat")


def oom_kills() -> int | None:
    """How often since the machine started, in all its containers; None: it does not say."""
    try:
        lines = _COUNTS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(count) for name, _, count in (line.partition(" ") for line in lines) if name == "oom_kill"), None)
