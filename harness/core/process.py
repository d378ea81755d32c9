"""Which process on which machine this is, and whether such a process is alive."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")
_SAME_START_S = 1.0  # a process's start, from the clock of its machine, may be computed a little differently each time


def this_process() -> dict[str, Any]:
    """The identity of this process, as plain values.

    A process id means something on one machine, since its last start, and in one container alone: so all are in it.
    """
    return {"machine": _machine(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_dead(process: Mapping[str, Any]) -> bool | None:
    """Whether a process has ended.

    Args:
        process: from ``this_process``, there.

    Returns:
        True or False for a process of this machine; None: it was on another one, and nothing is known.
    """
    try:
        machine, pid, started = process["machine"], int(process["pid"]), float(process["started"])
    except (KeyError, TypeError, ValueError):
        return None
    if machine != _machine():
        return None
    try:
        found = psutil.Process(pid)
        gone = found.status() == psutil.STATUS_ZOMBIE
        return bool(gone or abs(found.create_time() - started) > _SAME_START_S)
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return None


def _machine() -> str:
    parts = [socket.gethostname()]
    if _BOOT.exists():
        parts.append(_BOOT.read_text(encoding="ascii").strip())
    if _NAMESPACE.is_symlink():
        parts.append(os.readlink(_NAMESPACE))  # noqa: PTH115 - no path: pid:[4026531836]
    return " ".join(parts)
