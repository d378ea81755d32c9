"""The ranks of a test as processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any


def run_ranks(context: BaseContext, ranks: int, target: Callable[..., None], *arguments: Any, timeout_s: float) -> None:
    """Call ``target(rank, *arguments)`` in a process for each rank, and wait until all have ended with exit code 0."""
    started = [context.Process(target=target, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for one in started:
        one.start()
    try:
        for one in started:
            one.join(timeout_s)
        assert [one.exitcode for one in started] == [0] * ranks, "a process failed (see its output) or was too slow"
    finally:
        for one in started:
            one.kill()
