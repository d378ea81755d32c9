"""A run that reaches ``budget.gpu_hours`` in the middle: it ends in order, counts across runs, and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import harness

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

EXPERIMENT = """
name: grid
task: {{name: scenes, train_examples: 256, validation_examples: 8, test_examples: 8}}
adapters: [{{method: none, learning_rate: [1e-2, 1e-3]}}]
budget: {{epochs: 40, gpu_hours: {hours}}}
optimizer: {{per_device_train_batch_size: 4}}
eval: {{max_new_tokens: 4}}
resources: {{max_concurrent_trials: 1, profile: false}}
"""


def run(folder: Path, hours: float) -> subprocess.CompletedProcess[str]:
    file = folder / "grid.yaml"
    file.write_text(EXPERIMENT.format(hours=hours), encoding="utf-8")
    command = [sys.executable, "-m", "harness", "run", str(file), "--output", str(folder / "runs"), "--no-measure"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def spent(folder: Path) -> float:
    return float(json.loads((folder / "runs" / "grid" / "spent.json").read_text(encoding="utf-8"))["device_s"])


def test_a_limit_ends_the_run_in_order_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    first = run(tmp_path, 15 / 3600)
    assert first.returncode == 4, first.stdout + first.stderr
    assert "budget.gpu_hours is reached: finished trials are kept" in first.stdout
    assert 15 <= spent(tmp_path) < 90
    records = harness.load_results(tmp_path / "runs" / "grid").run.records
    again = run(tmp_path, 15 / 3600)  # nothing starts
    assert again.returncode == 4
    assert "device-hours were spent before" in again.stdout
    assert harness.load_results(tmp_path / "runs" / "grid").run.records == records
    last = run(tmp_path, 10)
    assert last.returncode == 0, last.stdout + last.stderr
    after = harness.load_results(tmp_path / "runs" / "grid").run.records
    assert {record.status for record in after.values()} == {"finished"}
    assert {trial_id: after[trial_id] for trial_id in records} == records  # nothing ran twice
    logs = "".join(path.read_text() for path in (tmp_path / "runs" / "grid" / "trials").glob("*/log.txt"))
    assert "stopped: asked to stop" in logs or len(records) == 1  # in order, not by a kill
