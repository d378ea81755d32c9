"""``harness prepare`` in this process."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from harness.cli.prepare import prepare
from harness.core.errors import UserError


def checked(target: str | Path, *options: str, check: bool = True) -> tuple[bool, str]:
    """Whether no problem was found, and the output, on a console wide enough not to wrap it."""
    screen = io.StringIO()
    try:
        prepare(str(target), options, check, Console(file=screen, width=300))
    except UserError as error:
        if not str(error).endswith("listed above"):
            raise
        return False, f"{screen.getvalue()}{error}"
    return True, screen.getvalue()
