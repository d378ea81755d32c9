"""Errors that are found before any trial starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.sweep import preflight


def test_a_missing_bash_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preflight.check_shell()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"PATH={tmp_path}: bash not found"):
        preflight.check_shell()
