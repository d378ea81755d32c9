"""docs/plugins.md: its files and commands work, and its list of checks is complete."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.registry import ADAPTERS
from harness.check import adapter as adapter_checks
from harness.check import encoder as encoder_checks
from harness.check import metric as metric_checks
from harness.check import modality as modality_checks
from harness.check import task as task_checks
from harness.check.plugins import promise
from harness.check.process import another_process_agrees
from harness.cli.app import app
from harness.core.record import read_run
from tasks.registry import METRICS, MODALITIES, TASKS

TEXT = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "console" for line in text.splitlines()]
RUN = "harness run sums.yaml"
PACKAGE = ("pip install .", "harness check my-plugins")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with all files of the document; what they register is removed afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for registry in (TASKS, MODALITIES, METRICS, ADAPTERS):
        monkeypatch.setattr(registry, "added", [])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process(*command: str | Path) -> str:
    """What a command prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COLUMNS"))}
    done = subprocess.run(command, env=env, text=True, encoding="utf-8", capture_output=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_is_a_file_or_commands_that_are_called_here() -> None:
    assert set(FILES) == {"sums.py", "sums.yaml", "dots.py", "dots.yaml", "first_word.py", "pyproject.toml"}
    assert len(BLOCKS) == len(FILES) + sum(language == "console" for language, _ in BLOCKS)
    called = {line for line in COMMANDS if line.startswith(("harness check", "harness plan", "python "))}
    assert set(COMMANDS) == called | {RUN, *PACKAGE}


def test_the_commands_on_files_work(folder: Path) -> None:
    for line in COMMANDS:
        words = shlex.split(line)
        if line == RUN:
            words[1] = "plan"  # the run itself takes longer, below
        if line in PACKAGE:
            continue
        if words[0] == "python":
            process(sys.executable, *words[1:])
            continue
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        if words[1] == "check":
            assert " checks passed, 0 failed" in result.output
        else:
            assert f"{words[2].removesuffix('.yaml')}: 2 trials" in result.output


def test_the_package_is_installed_and_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for name in ("sums.py", "dots.py", "first_word.py", "pyproject.toml"):
        shutil.move(folder / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    process(*pip, "--no-build-isolation", "--target", target, source)
    monkeypatch.syspath_prepend(target)
    monkeypatch.setenv("PYTHONPATH", str(target))  # of the process in which tasks are read again
    checked = CliRunner().invoke(app, shlex.split(PACKAGE[1])[1:], catch_exceptions=False)
    for name in ("sums", "dots", "first_word"):
        sys.modules.pop(name)  # imported as installed modules
    assert checked.exit_code == 0, checked.output
    for plugin in ("task sums", "task dots", "modality grid", "metric first_word"):
        assert f"{plugin}  my-plugins 0.1.0" in checked.output
    assert " checks passed, 0 failed" in checked.output


@pytest.mark.slow
def test_the_run_finishes(folder: Path) -> None:
    process(sys.executable, "-m", *shlex.split(RUN))
    run = read_run(folder / "runs" / "sums")
    assert [record.status for record in run.records.values()] == ["finished"] * 2
    assert all("exact_match" in record.metrics["test"] for record in run.records.values())


def test_the_list_of_checks_is_complete() -> None:
    modules = {
        "A task": task_checks,
        "A modality": modality_checks,
        "An encoder": encoder_checks,
        "A metric": metric_checks,
        "An adapter method": adapter_checks,
    }
    for kind, module in modules.items():
        (listed,) = re.findall(rf"^{kind}:\n\n((?:- .*\n)+)", TEXT, re.MULTILINE)
        checks = [*module.FIRST, *module.THEN, *([another_process_agrees] if kind == "A task" else [])]
        assert listed.splitlines() == [f"- {promise(check)}." for check in checks]
