"""How MLflow is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOOK = """
from harness.tracking import store
store.import_libraries("sqlite:///x.db")
from mlflow.telemetry import get_telemetry_client
print(get_telemetry_client())
"""


def test_mlflow_does_not_report_what_a_run_calls(tmp_path: Path) -> None:
    """In a process of its own: under pytest and in a CI, MLflow reports nothing anyway."""
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "HOME")}
    command = [sys.executable, "-c", LOOK]
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "None"
