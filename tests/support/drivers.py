"""``harness run`` as a process that a test kills: the driver, with the Ray and the workers that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def drivers_end() -> Iterator[None]:
    """Nothing that a test has started outlives it: Ray ends when its driver does."""
    yield
    while _started:
        driver = _started.pop()
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()


def start(folder: Path, *options: str, **settings: str) -> subprocess.Popen[str]:
    """Run ``small.yaml`` of a folder, in a process group of its own; ``settings`` are environment variables."""
    driver = subprocess.Popen(
        [sys.executable, "-m", "harness", "run", "small.yaml", *options], cwd=folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        start_new_session=True,
    )  # fmt: skip
    _started.append(driver)
    return driver


def finish(driver: subprocess.Popen[str], code: int | None = 0) -> str:
    """Wait for the end of a driver and check its exit code; returns what it has printed. None: any code."""
    said, _ = driver.communicate(timeout=900)
    assert code is None or driver.returncode == code, said
    return said
