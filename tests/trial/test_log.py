"""A trial's log where the disk is full: /dev/full takes nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from harness.trial.log import _Patient, log_to

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    with log_to(FULL) as log:
        log.info("a line that does not fit")
    assert capfd.readouterr().err == ""
    assert not [one for one in logging.getLogger().handlers if isinstance(one, _Patient)]


def test_another_error_of_a_line_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = _Patient(tmp_path / "log.txt")
    handler.handle(logging.LogRecord("harness", logging.INFO, "file.py", 1, "%d", ("no number",), None))
    handler.close()
    assert "--- Logging error ---" in capsys.readouterr().err
