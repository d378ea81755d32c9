"""Entry points of distributions that are not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint

import pytest

from harness.core import registry


def replace_entry_points(monkeypatch: pytest.MonkeyPatch, found: Callable[..., Iterable[EntryPoint]]) -> None:
    """Let ``found(group=…)`` be the entry points of a group, read anew at each look."""
    monkeypatch.setattr(registry, "entry_points", found)
    monkeypatch.setattr(registry, "installed", registry.installed.__wrapped__)
