"""A trial's log where the disk is full: /dev/full takes nothing."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
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


def test_bitsandbytes_does_not_warn_of_kernels_that_nothing_here_uses() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "import harness, bitsandbytes"], check=True, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("", "")
