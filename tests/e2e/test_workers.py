"""Trials of two workers through the real Ray, as a person would run them; tests/trial/test_worker.py has the stages."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.core.record import TrialRecord, read_run
from tests.support.vision_language import save

HARNESS = [sys.executable, "-m", "harness"]
EXPERIMENT = """
name: small
task: {{name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}}
backbone: {backbone}
adapters:
  - {adapter}
budget: {{examples: 23, epochs: {epochs}}}
optimizer: {{per_device_train_batch_size: 8}}
eval: {{max_new_tokens: 8}}
resources: {{profile: false, {resources}}}
{more}
"""
TWO = "{method: [none, full], learning_rate: 3e-3}"
PLAIN, WITH_TOWER = "{projector_dropout: 0.0}", "{model: ./model, prompt: Describe it.}"
IN_TOWER = """{method: lora, rank: 2, where: {language: AF, vision: all, connector: all}, learning_rate: 6e-3}
  - {method: full, parts: [language, vision, connector], learning_rate: 3e-3}"""
BREAKS_ON_RANK_1 = '''
from adapters.methods.bitfit import BitFit

class Broken(BitFit):
    """Raises in one worker."""
    name = "broken"
    def delta(self, target, generator):
        from torch import distributed
        if distributed.is_initialized() and distributed.get_rank() == 1:
            raise ValueError("the second worker is broken")
        return super().delta(target, generator)
'''


def write(
    folder: Path, resources: str, adapter: str = TWO, epochs: int = 2, more: str = "", backbone: str = PLAIN
) -> None:
    options = {"adapter": adapter, "epochs": epochs, "resources": resources, "more": more, "backbone": backbone}
    text = EXPERIMENT.format(**options)
    (folder / "small.yaml").write_text(text, encoding="utf-8")


def harness(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: PLW1510 - the caller looks at the exit code
        [*HARNESS, *arguments], cwd=cwd, capture_output=True, text=True, timeout=800
    )


def records(folder: Path, output: str = "runs") -> dict[str, TrialRecord]:
    run = read_run(folder / output / "small")
    assert not run.broken
    methods = {trial.trial_id: trial.method for trial in run.plan.trials}
    return {methods[trial_id]: record for trial_id, record in run.records.items()}


needs_two = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a CPU for each of two workers")


@needs_two
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("adapter", "backbone"), [(TWO, PLAIN), (IN_TOWER, WITH_TOWER)], ids=["plain", "tower"])
def test_records_do_not_depend_on_the_number_of_workers(adapter: str, backbone: str, tmp_path: Path) -> None:
    """fp32, dropout off: 1e-5; both trials run in the same two processes."""
    if backbone == WITH_TOWER:
        save("llava", tmp_path / "model")
    write(tmp_path, "workers: 1", adapter, backbone=backbone)
    assert harness("run", "small.yaml", "-o", "one", cwd=tmp_path).returncode == 0
    write(tmp_path, "workers: 2", adapter, backbone=backbone)
    result = harness("run", "small.yaml", "-o", "two", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line for line in result.stderr.splitlines() if line.strip()] == []
    one, two = records(tmp_path, "one"), records(tmp_path, "two")
    pids = set()
    for method, record in two.items():
        known = one[method]
        assert (record.workers, known.workers) == (2, 1)
        assert record.trial_id == known.trial_id
        assert record.data == known.data
        for mine, theirs in zip(record.history, known.history, strict=True):
            assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
            assert mine.validation_perplexity == pytest.approx(theirs.validation_perplexity, rel=1e-5)
        assert record.metrics["test"] == pytest.approx(known.metrics["test"], rel=1e-5)
        log = tmp_path / "two/small/trials" / record.trial_id / "log.txt"
        pids |= {line.split()[2] for line in log.read_text(encoding="utf-8").splitlines() if "epoch 2 of 2" in line}
    assert len(pids) == 1, "the workers were kept for the second trial, and rank 0 alone writes"


@needs_two
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_trial_whose_worker_is_killed_goes_on_from_its_checkpoint(rank: int, tmp_path: Path) -> None:
    full = "{method: full, learning_rate: 3e-3}"
    write(tmp_path, "workers: 2, checkpoint_interval_s: 0.0", full, epochs=12)
    driver = subprocess.Popen([*HARNESS, "run", "small.yaml"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        checkpoints = tmp_path / "runs/small/trials"
        deadline = time.monotonic() + 600
        while not list(checkpoints.glob("*/checkpoint/state.json")):
            assert driver.poll() is None, "the sweep ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        sorted(_workers(driver.pid), key=lambda process: process.pid)[rank].kill()
        assert driver.wait(timeout=900) == 0
    finally:
        driver.terminate()
    (record,) = records(tmp_path).values()
    assert record.status == "finished"
    assert [epoch.epoch for epoch in record.history] == list(range(1, 13))
    log = (tmp_path / "runs/small/trials" / record.trial_id / "log.txt").read_text(encoding="utf-8")
    assert "resumed after epoch" in log


@needs_two
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_exception_in_one_worker_ends_the_trial_and_names_its_rank(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BREAKS_ON_RANK_1, encoding="utf-8")
    write(tmp_path, "workers: 2", "{method: [broken, none], learning_rate: 3e-3}", more="plugins: [broken.py]")
    result = harness("run", "small.yaml", cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    found = records(tmp_path)
    assert found["none"].status == "finished"
    assert found["broken"].status == "failed"
    assert (found["broken"].reason or "").startswith("rank 1 of 2: ValueError: the second worker is broken")
    log = (tmp_path / "runs/small/trials" / found["broken"].trial_id / "log.txt").read_text(encoding="utf-8")
    assert 'raise ValueError("the second worker is broken")' in log


@pytest.mark.e2e
def test_what_this_machine_lacks_is_said_before_anything_is_written(tmp_path: Path) -> None:
    write(tmp_path, "workers: 5000")
    result = harness("run", "small.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "small.yaml, line 10, resources.workers: found 5000, each with 1 CPUs and" in result.stderr
    assert not (tmp_path / "runs").exists()
    planned = harness("plan", "small.yaml", cwd=tmp_path)
    assert planned.returncode == 0
    assert "not on this machine: small.yaml, line 10, resources.workers: found 5000" in planned.stdout


def _workers(driver: int) -> Iterator[psutil.Process]:
    for process in psutil.Process(driver).children(recursive=True):
        if "ray::Rank" in " ".join(process.cmdline()):
            yield process
