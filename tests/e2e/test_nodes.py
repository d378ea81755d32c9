"""A sweep on a Ray cluster of several nodes: trials spread, nodes die, and nodes lack folders or code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.core.record import read_run
from tests.support.ray_nodes import RayNodes, bare_python, ray_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a node that does not see a folder needs root (unshare)")
EXPERIMENT = """
name: small
task: {name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}
adapters: [{method: lora, rank: 4, grouping: [agnostic, specific], learning_rate: 6e-3}]
budget: {examples: 24, epochs: 2}
seeds: [0, 1, 2]
optimizer: {per_device_train_batch_size: 8}
eval: {max_new_tokens: 8}
resources: {profile: false}
"""
WRITES = """
from harness import Task, TaskConfig, Example, Part

class Echo(Task):
    \"\"\"Repeats its input.\"\"\"

    contexts = ("text",)
    modalities = {}
    metrics = ("rouge",)

    class Config(TaskConfig):
        pass

    @classmethod
    def sample(cls, folder):
        return {}

    def prepare(self):
        pass

    def examples(self, split):
        words = ("red", "green", "blue", "black")
        return [
            Example(f"{split} {n}", (Part("text", f"{split} {words[n % 4]} {n}"),), (words[n % 4],)) for n in range(16)
        ]
"""


def start(nodes: RayNodes, folder: Path, ship: str = "auto") -> subprocess.Popen[str]:
    (folder / "nodes.yaml").write_text(f"kind: ray\naddress: {nodes.address}\nship_code: {ship}\n", encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "harness", "run", "small.yaml", "--profile", "nodes.yaml"],
        cwd=folder, env={**nodes.environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def processes_of(log: Path) -> list[int]:
    found = re.findall(r"^\S+ \S+ (\d+) ", log.read_text(encoding="utf-8"), re.MULTILINE)
    return [int(process) for process in dict.fromkeys(found)]


def wait_for(trials: Path, pattern: str, count: int, driver: subprocess.Popen[str]) -> list[Path]:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        found = [path for path in trials.glob(pattern) if path.stat().st_size]
        if len(found) >= count:
            return found
        if driver.poll() is not None:
            raise AssertionError(f"the sweep ended early: {driver.communicate()[0]}")
        time.sleep(0.1)
    driver.kill()
    raise AssertionError(f"fewer than {count} {pattern}: {driver.communicate()[0]}")


def test_a_grid_goes_on_after_a_node_has_died(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(EXPERIMENT, encoding="utf-8")
    trials = tmp_path / "runs/small/trials"
    with ray_nodes([1, 1, 1]) as nodes:
        driver = start(nodes, tmp_path)
        logs = wait_for(trials, "*/log.txt", 3, driver)
        ran_on = {log.parent.name: nodes.node_of(processes_of(log)[0]) for log in logs}
        assert set(ran_on.values()) == {0, 1, 2}, "trials spread over the nodes"
        nodes.kill(2)
        said, _ = driver.communicate(timeout=900)
    assert driver.returncode == 0, said
    assert "6 of 6 trials finished" in said
    assert re.search(r"node \S+ has died; its trials start again on another one", said), said
    run = read_run(tmp_path / "runs/small")
    assert sorted(record.status for record in run.records.values()) == ["finished"] * 6
    (lost,) = (trial for trial, node in ran_on.items() if node == 2)
    assert len(processes_of(trials / lost / "log.txt")) == 2, "its trial started again elsewhere"


def test_the_death_of_the_head_is_told(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(EXPERIMENT, encoding="utf-8")
    with ray_nodes([1, 1]) as nodes:
        driver = start(nodes, tmp_path)
        wait_for(tmp_path / "runs/small/trials", "*/log.txt", 1, driver)
        nodes.kill(0)
        said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 1, said
    assert f"Ray's head node ({nodes.address}) has died; finished trials are kept; run the same" in said


@needs_root
def test_a_node_that_does_not_see_the_run_folder_is_told_before_any_trial(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(EXPERIMENT, encoding="utf-8")
    run = tmp_path / "runs"
    run.mkdir()
    with ray_nodes([1]) as nodes:
        nodes.join([run])
        driver = start(nodes, tmp_path)
        said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 2, said
    assert f"node 127.0.0.1: cannot read the run folder {run / 'small'}: No such file or directory; put the" in said
    assert not list(run.glob("small/trials/*"))


def install(folder: Path) -> None:
    """A distribution with the task as an entry point, as pip would install it."""
    package, information = folder / "echo_tasks", folder / "echo_tasks-1.0.dist-info"
    package.mkdir(parents=True)
    information.mkdir()
    (package / "__init__.py").write_text(WRITES, encoding="utf-8")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-tasks\nVersion: 1.0\n", encoding="utf-8")
    (information / "entry_points.txt").write_text("[harness.tasks]\necho = echo_tasks:Echo\n", encoding="utf-8")


@needs_root
@pytest.mark.parametrize("kind", ["file", "installed"])
def test_code_and_plugins_reach_a_node_that_has_neither(kind: str, tmp_path: Path) -> None:
    """Its Python has no harness, and it does not see the folder of the plugin, nor this checkout."""
    plugins = tmp_path / "plugins"
    lines = [line for line in EXPERIMENT.splitlines() if not line.startswith(("task:", "seeds:", "budget:"))]
    lines += ["task: {name: echo}", "budget: {examples: 8}"]
    if kind == "file":
        plugins.mkdir()
        (plugins / "echo.py").write_text(WRITES, encoding="utf-8")
        lines += ["plugins: [plugins/echo.py]"]
    else:
        install(plugins)
    (tmp_path / "small.yaml").write_text("\n".join(lines), encoding="utf-8")
    with ray_nodes([0]) as nodes:
        nodes.join([plugins, Path(__file__).parents[2]], python=bare_python(tmp_path / "bare"))
        nodes.environment["PYTHONPATH"] = str(plugins)  # of the driver
        driver = start(nodes, tmp_path, ship="false")
        said, _ = driver.communicate(timeout=300)
        assert driver.returncode == 2, said
        lacking = "harness, adapters, tasks, results, clusters" + (", echo_tasks" if kind == "installed" else "")
        assert f"node 127.0.0.1: Python packages not found: {lacking}; install" in said
        driver = start(nodes, tmp_path)
        said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    run = read_run(tmp_path / "runs/small")
    assert [record.status for record in run.records.values()] == ["finished"] * 2
    assert {record.spec["task"]["plugin"]["distribution"] for record in run.records.values()} == {
        "echo-tasks" if kind == "installed" else "echo.py"
    }
