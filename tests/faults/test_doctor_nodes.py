"""``harness doctor`` on a real cluster of two nodes: each is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ray_nodes import ray_nodes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def test_every_node_is_asked(tmp_path: Path) -> None:
    with ray_nodes([1, 1]) as nodes:
        profile = tmp_path / "mine.yaml"
        profile.write_text(f"kind: ray\naddress: {nodes.address}\n", encoding="utf-8")
        command = [sys.executable, "-m", "harness", "doctor", "--profile", str(profile), "-o", str(tmp_path / "runs")]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=500, check=False, env=nodes.environment, cwd=tmp_path
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"sees and writes {tmp_path / 'runs'}") == 2
    assert done.stdout.count("from this machine's") == 3  # of the storage, and of each node
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []
