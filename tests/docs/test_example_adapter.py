"""The adapter method of examples/adapter_plugin, installed as a package: listed, planned, held to the contract."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "adapter_plugin"
HARNESS = Path(sys.executable).with_name("harness")
EXPERIMENT = """
task: {name: scenes, train_examples: 16, validation_examples: 4, test_examples: 4}
adapters:
  - {method: ssf, grouping: specific, learning_rate: 1e-2}
  - {method: ssf+bitfit, train: scale, learning_rate: 1e-2}
"""
# tiny-llama: 4 layers; q, k, v, o and down put out 96 features, gate and up 256.
SCALES = 4 * (5 * 96 + 2 * 256)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder the package was installed into; without a network, and the checkout is left as it is."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "adapter_plugin")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", folder, source], check=True, timeout=120)
    return folder


def start(installed: Path, *command: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """A process in which the package is installed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COLUMNS"))}
    env |= {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def output(process: subprocess.Popen[str]) -> str:
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 0, text
    return text


def numbers(text: str, name: str) -> list[int]:
    """The numbers in the first printed row that begins with a name; a plan's second table is what it predicts."""
    line = next(line for line in text.splitlines() if line.strip().startswith(f"{name} "))
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", line.strip().removeprefix(name))]


def test_it_imports_the_harness_by_its_front_door() -> None:
    tree = ast.parse((EXAMPLE / "ssf_adapter.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"__future__", "typing", "torch", "harness"}


@pytest.mark.slow
def test_installed_it_is_listed_planned_and_held_to_the_contract(installed: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "ssf.yaml"
    experiment.write_text(EXPERIMENT, encoding="utf-8")
    listing = start(installed, HARNESS, "adapters", "ssf", "--model", "builtin/tiny-llama", cwd=tmp_path)
    plan = start(installed, HARNESS, "plan", experiment, cwd=tmp_path)
    checks = start(installed, HARNESS, "check", "ssf-adapter", cwd=tmp_path)

    listed = output(listing)
    assert re.search(r"^    from: ssf-adapter 0\.1\.0, ssf_adapter:SSF$", listed, re.MULTILINE)
    assert re.search(r"^    train +both +scale, shift, both$", listed, re.MULTILINE)
    assert numbers(listed, "all") == [2 * SCALES, 2 * 2 * SCALES]

    planned = output(plan)
    assert numbers(planned, "SSF specific")[2] == 2 * 2 * SCALES
    assert numbers(planned, "SSF scale only")[2] == 2 * SCALES  # a scale each, and BitFit's bias each

    assert re.search(r"^1[0-9] checks passed, 0 failed$", output(checks), re.MULTILINE)


@pytest.mark.slow
def test_a_trial_trains_it(installed: Path, tmp_path: Path) -> None:
    experiment = tmp_path / "ssf.yaml"
    experiment.write_text(EXPERIMENT + "budget: {examples: 8}\n", encoding="utf-8")
    output(start(installed, HARNESS, "run", experiment, "-o", tmp_path / "runs", cwd=tmp_path))
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "ssf" / "trials").glob("*/record.json")]
    assert [record["status"] for record in records] == ["finished"] * 2
    assert sorted(record["parameters"]["adapter"] for record in records) == [2 * SCALES, 4 * SCALES]
