"""What is found before any trial is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.sweep import preflight


def test_without_bash_ray_would_wait_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preflight.check_shell()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"PATH={tmp_path}: bash not found"):
        preflight.check_shell()
