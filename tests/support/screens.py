"""What rich prints, as text."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console


def console(width: int = 100, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, legacy_windows=False)


def output(of: Console) -> str:
    assert isinstance(of.file, io.StringIO)
    return of.file.getvalue()


def shown(item: Any, width: int = 100) -> str:
    plain = Console(file=io.StringIO(), width=width)
    plain.print(item)
    return output(plain)
