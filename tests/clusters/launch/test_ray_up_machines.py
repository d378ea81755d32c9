"""``ray up`` for real: it starts machines, its autoscaler workers, and a run is stopped and goes on.

The machines are namespaces of processes on this machine (tests/support/machines.py); no cloud has ever been asked.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from moto import server

from harness.core.storage import Folder
from tests.support.machines import HEAD, machines, missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_DEFAULT_REGION": "us-east-1"}
EXPERIMENT = """\
name: grid
task: {name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}
adapters:
  - {method: lora, rank: [2, 4, 8], grouping: [agnostic, specific], learning_rate: 6e-3}
budget: {examples: 24, epochs: 2}
eval: {max_new_tokens: 8, metrics: [first_word]}
resources: {profile: false}
plugins: [metrics/first_word.py]
"""
METRIC = """\
from harness import Metric, Scores


class FirstWord(Metric):
    \"\"\"The share of answers whose first word is that of a reference.\"\"\"

    labels = {"first_word": "First word"}

    def score(self, predictions, references):
        right = {
            key: float(predictions[key].split()[:1] in [text.split()[:1] for text in texts])
            for key, texts in references.items()
        }
        mean = sum(right.values()) / len(right)
        return Scores({"first_word": mean}, {key: {"first_word": value} for key, value in right.items()})
"""
PROFILE = """\
kind: ray_up
storage: s3://bucket/runs
python: {python}
env: {{AWS_ENDPOINT_URL: "{endpoint}", AWS_DEFAULT_REGION: us-east-1}}
ray_up:
  provider: {{type: external, module: tests.support.machines.Machines, folder: {folder}}}
  ssh_user: root
  head: {{node_config: {{}}, resources: {{CPU: 0}}}}
  worker: {{node_config: {{}}, resources: {{CPU: 1}}, max_workers: 2}}
  idle_timeout_minutes: 1
"""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the experiment, on a machine that reaches a cloud and a storage."""
    if why := missing():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="ru", dir="/tmp"))  # short, for sockets
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    monkeypatch.setattr(logging.getLogger("werkzeug"), "disabled", True)  # a line for each of its requests
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "HARNESS_CACHE": str(folder / "cache")}.items():
        monkeypatch.setenv(name, value)
    Folder("s3://bucket/x")._fs.mkdir("bucket")
    files = {"grid.yaml": EXPERIMENT, "metrics/first_word.py": METRIC}
    files["mine.yaml"] = PROFILE.format(python=sys.executable, endpoint=endpoint, folder=folder)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    # As a role of the cloud gives them to its machines.
    keys = "".join(f"{name.lower()} = {value}\n" for name, value in KEYS.items() if "REGION" not in name)
    try:
        with machines(folder, {".aws/credentials": f"[default]\n{keys}"}) as environment:
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            yield folder
    finally:
        moto.stop()
        shutil.rmtree(folder, ignore_errors=True)


def harness(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "harness", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def log_of(folder: Path) -> str:
    path = folder / HEAD / "harness.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def wait_for(reached: Callable[[], bool], folder: Path, timeout_s: float = 400) -> None:
    until = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < until, log_of(folder)
        time.sleep(1)


def alive(folder: Path) -> set[str]:
    return set(json.loads((folder / "machines.json").read_text(encoding="utf-8")))


def test_a_run_on_machines_that_ray_starts_is_stopped_and_goes_on(here: Path) -> None:
    said = harness(here, "launch", "grid.yaml", "--profile", "mine.yaml", "--no-measure")
    assert said.startswith("submitted: ray_up job harness-grid; run folder: ")
    wait_for(lambda: "[1/6]" in log_of(here), here)
    assert "2 of 2 workers, 2 CPUs with the head" in log_of(here)
    assert "6 trials to run; 2 at a time" in log_of(here)
    assert alive(here) == {HEAD, "127.0.0.12", "127.0.0.13"}
    assert "the driver got SIGTERM" in harness(here, "stop", "runs/grid")
    wait_for(lambda: "the workers are let go" in log_of(here), here)
    assert "harness ended with exit code 143" in log_of(here)
    assert " not run" in log_of(here)

    harness(here, "launch", "grid.yaml", "--profile", "mine.yaml", "--no-measure")
    wait_for(lambda: "harness ended with exit code 0" in log_of(here), here)
    text = log_of(here)
    assert "finished before" in text
    assert "6 of 6 trials finished" in text
    assert "6 of 6 trials finished" in harness(here, "logs", "runs/grid")
    assert "6 of 6 trials finished" in harness(here, "status", "s3://bucket/runs/grid")
    wait_for(lambda: alive(here) == {HEAD}, here, 240)  # idle for a minute
