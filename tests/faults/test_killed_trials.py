"""Trials lose their process, a rank, Ray or a node in the middle of an epoch, or are stopped there, and go on.

What they record is, bit by bit, that of a run that nobody disturbed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from harness.core.record import TrialRecord, read_run
from tests.support.drivers import drivers_end, finish, start  # noqa: F401 - a fixture of every test here
from tests.support.parity import assert_same_result
from tests.support.ray_nodes import ray_nodes

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

EXPERIMENT = """
name: small
task: {{name: scenes, train_examples: 64, validation_examples: 8, test_examples: 8}}
adapters:
  - {{method: lora, rank: 2, dropout: 0.2, grouping: specific, learning_rate: 6e-3}}
budget: {{examples: 64, epochs: 2, references: all}}
seeds: {seeds}
optimizer: {{per_device_train_batch_size: 8, gradient_accumulation_steps: 2}}
eval: {{max_new_tokens: 8}}
resources: {{profile: false, checkpoint_interval_s: 0.3, {resources}}}
"""
INSIDE = "checkpoint/epoch-*-step-*"
needs_two = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a CPU for each of two workers")


def write(folder: Path, seeds: str = "[0, 1]", resources: str = "max_concurrent_trials: 2") -> Path:
    (folder / "small.yaml").write_text(EXPERIMENT.format(seeds=seeds, resources=resources), encoding="utf-8")
    return folder


def trials_of(folder: Path) -> Path:
    return folder / "runs/small/trials"


def wait_inside_an_epoch(folder: Path, driver: subprocess.Popen[str], count: int = 1) -> list[Path]:
    """The folders of trials that have a checkpoint inside an epoch; the first may have been replaced meanwhile."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert driver.poll() is None, f"the run ended before a checkpoint: {driver.communicate()[0]}"
        found = {path.parents[1] for path in trials_of(folder).glob(f"*/{INSIDE}")}
        if len(found := {trial for trial in found if (trial / "checkpoint/state.json").exists()}) >= count:
            return sorted(found)
        time.sleep(0.02)
    driver.kill()
    raise AssertionError("no checkpoint inside an epoch")


def processes_of(trial: Path) -> list[int]:
    found = re.findall(r"^\S+ \S+ (\d+) ", (trial / "log.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return [int(process) for process in dict.fromkeys(found)]


def records(folder: Path) -> dict[str, TrialRecord]:
    run = read_run(folder / "runs/small")
    assert not run.broken
    return dict(run.records)


def assert_undisturbed(folder: Path, whole: Path) -> None:
    expected, found = records(whole), records(folder)
    assert set(found) <= set(expected)
    assert {record.status for record in found.values()} == {"finished"}
    for trial_id, record in found.items():
        assert_same_result(record, folder / "runs/small", expected[trial_id], whole / "runs/small")


def resumed_inside(trial: Path) -> bool:
    return bool(re.search(r"resumed after epoch \d, step \d+, batch \d+ of epoch", (trial / "log.txt").read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of both seeds."""
    folder = write(tmp_path_factory.mktemp("whole"))
    finish(start(folder))
    return folder


@pytest.fixture(scope="module")
def whole_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of a trial of two processes."""
    folder = write(tmp_path_factory.mktemp("two"), "[0]", "workers: 2")
    finish(start(folder))
    return folder


def test_a_killed_worker(whole: Path, tmp_path: Path) -> None:
    driver = start(write(tmp_path))
    killed = wait_inside_an_epoch(tmp_path, driver)[0]
    os.kill(processes_of(killed)[-1], signal.SIGKILL)
    finish(driver)
    assert len(processes_of(killed)) == 2
    assert resumed_inside(killed)
    assert_undisturbed(tmp_path, whole)


def test_a_worker_that_gets_sigterm_saves_and_its_trial_goes_on_in_another(whole: Path, tmp_path: Path) -> None:
    """It counts as no failure: as a node that is taken away does."""
    driver = start(write(tmp_path, "[0]", "max_failures: 0"))
    (ended,) = wait_inside_an_epoch(tmp_path, driver)
    os.kill(processes_of(ended)[-1], signal.SIGTERM)
    finish(driver)
    log = (ended / "log.txt").read_text(encoding="utf-8")
    stopped = re.search(r"stopped: asked to stop at step (\d+) of", log)
    assert stopped is not None, log
    assert f"step {stopped[1]}, batch" in log.partition(stopped[0])[2], "nothing was lost"
    assert len(processes_of(ended)) == 2
    assert_undisturbed(tmp_path, whole)


@needs_two
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(rank: int, whole_by_two: Path, tmp_path: Path) -> None:
    driver = start(write(tmp_path, "[0]", "workers: 2"))
    (trial,) = wait_inside_an_epoch(tmp_path, driver)
    sorted(ranks_of(driver), key=lambda process: process.pid)[rank].kill()
    finish(driver)
    assert resumed_inside(trial)
    assert_undisturbed(tmp_path, whole_by_two)


def ranks_of(driver: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    for process in psutil.Process(driver.pid).children(recursive=True):
        if "ray::Rank" in " ".join(process.cmdline()):
            yield process


def test_the_killed_raylet(whole: Path, tmp_path: Path) -> None:
    """Ray ends the driver without a word, so a shell says what to do; the same command finishes."""
    driver = start(write(tmp_path))
    trial = wait_inside_an_epoch(tmp_path, driver)[0]
    (raylet,) = [p for p in psutil.Process(driver.pid).children(recursive=True) if p.name() == "raylet"]
    raylet.kill()
    said = finish(driver, code=None)
    assert driver.returncode != 0, said
    assert "finished trials are kept; run the same experiment again to continue" in said
    finish(start(tmp_path))
    assert resumed_inside(trial)
    assert_undisturbed(tmp_path, whole)


@pytest.mark.slow
def test_a_killed_node(whole: Path, tmp_path: Path) -> None:
    write(tmp_path)
    with ray_nodes([1, 1, 1]) as nodes:
        (tmp_path / "nodes.yaml").write_text(f"kind: ray\naddress: {nodes.address}\n", encoding="utf-8")
        settings = {name: value for name, value in nodes.environment.items() if name.startswith("RAY_")}
        driver = start(tmp_path, "--profile", "nodes.yaml", **settings)
        trials = wait_inside_an_epoch(tmp_path, driver, 2)
        ran_on = {trial: nodes.node_of(processes_of(trial)[-1]) for trial in trials}
        lost, node = next((trial, node) for trial, node in ran_on.items() if node)  # 0 is the head
        nodes.kill(node)
        said = finish(driver)
    assert re.search(r"node \S+ has died; its trials start again on another one", said), said
    assert resumed_inside(lost)
    assert_undisturbed(tmp_path, whole)


def send_sigterm(driver: subprocess.Popen[str], folder: Path) -> None:
    driver.send_signal(signal.SIGTERM)


def press_ctrl_c(driver: subprocess.Popen[str], folder: Path) -> None:
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does, to all processes of its foreground


def ask(driver: subprocess.Popen[str], folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "harness", "stop", "runs/small"], cwd=folder, check=True, capture_output=True)


STOPS = [
    (send_sigterm, 143, "ended by SIGTERM"),
    (press_ctrl_c, 130, "interrupted"),
    (ask, 3, "ended by harness stop"),
]


@pytest.mark.parametrize(("stop", "code", "text"), STOPS)
def test_a_run_that_is_stopped_loses_nothing(
    stop: Callable[..., None], code: int, text: str, whole: Path, tmp_path: Path
) -> None:
    driver = start(write(tmp_path))
    wait_inside_an_epoch(tmp_path, driver, 2)
    began = time.monotonic()
    stop(driver, tmp_path)
    said = finish(driver, code)
    took = time.monotonic() - began
    assert f"{text}: finished trials are kept" in said
    assert "2 running trials may save where they are, for 30 s; Ctrl-C ends them at once" in said
    assert took < 30, "it waits for the trials, not for the time to be over"
    finish(start(tmp_path))
    for trial in trials_of(tmp_path).iterdir():
        log = (trial / "log.txt").read_text(encoding="utf-8")
        stopped = re.search(r"stopped: asked to stop at step (\d+) of", log)
        assert stopped is not None, log
        assert re.search(rf"resumed after epoch \d, step {stopped[1]}\b", log.partition(stopped[0])[2])
    assert_undisturbed(tmp_path, whole)
