"""The main job through the real Ray Tune, DeepSpeed, MLflow and pycocoevalcap, as a person would call it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from harness.core.record import Run, TrialRecord, read_run
from tasks.metrics.coco import spice

pytestmark = pytest.mark.timeout(2000)  # the first test waits for two whole runs, on a busy machine too

ROOT = Path(__file__).resolve().parents[2]
HARNESS = [sys.executable, "-m", "harness"]
EXPERIMENT = """
name: small
task: {{name: scenes, train_examples: 32, validation_examples: 8, test_examples: 8}}
adapters:
{adapters}
budget: {{examples: 24, epochs: 2}}
optimizer: {{per_device_train_batch_size: 8}}
eval: {{max_new_tokens: 8}}
resources: {{profile: false, {resources}}}
"""
FOUR_ONE_OF_WHICH_FAILS = """\
  - {method: none, learning_rate: 3e-3}
  - {method: full, learning_rate: 1e30}
  - {method: lora, rank: 4, grouping: [agnostic, specific], learning_rate: 6e-3}"""
CAPTION_METRICS = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "cider_d"}
TWO = "  - {method: lora, rank: 4, grouping: [agnostic, specific], learning_rate: 6e-3}"


def harness(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the command line in a separate folder."""
    return subprocess.run(  # noqa: PLW1510 - the caller looks at the exit code
        [*HARNESS, *arguments], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )


def write_experiment(folder: Path, resources: str, adapters: str = FOUR_ONE_OF_WHICH_FAILS) -> None:
    text = EXPERIMENT.format(adapters=adapters, resources=resources)
    (folder / "small.yaml").write_text(text, encoding="utf-8")


@dataclass
class Grid:
    """A grid of four trials, the second of which diverges; its driver was killed after it, and the grid run again."""

    folder: Path
    kept: dict[Path, bytes]  # the first two records at the kill
    result: subprocess.CompletedProcess[str]  # of the second run


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    folder = tmp_path_factory.mktemp("grid")
    write_experiment(folder, "max_concurrent_trials: 1")  # each worker starts METEOR: 8 s of CPU time
    driver = subprocess.Popen(
        [*HARNESS, "run", "small.yaml"], cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True
    )
    first = _wait_for_records(folder / "runs/small/trials", driver, 2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {path: path.read_bytes() for path in first}
    return Grid(folder, kept, harness("run", "small.yaml", cwd=folder))


def records(folder: Path) -> dict[str, TrialRecord]:
    """The records of the run by method and grouping."""
    run: Run = read_run(folder / "runs" / "small")
    assert not run.broken
    found = {trial.trial_id: f"{trial.method} {trial.grouping}".strip() for trial in run.plan.trials}
    return {found[trial_id]: record for trial_id, record in run.records.items()}


@pytest.mark.e2e
def test_killed_half_way_and_run_again_runs_what_is_missing_and_what_failed(grid: Grid) -> None:
    assert len(grid.kept) < 4
    assert "3 of 4 trials finished" in grid.result.stdout
    for path, content in grid.kept.items():
        finished = json.loads(content)["status"] == "finished"
        assert (path.read_bytes() == content) == finished
        assert path.with_name("attempt-1.json").exists() != finished


@pytest.mark.e2e
def test_a_failing_trial_leaves_the_others_running_and_is_told(grid: Grid) -> None:
    folder, result = grid.folder, grid.result
    assert result.returncode == 1, result.stderr
    found = records(folder)
    status = {name: record.status for name, record in found.items()}
    assert status == {"none": "finished", "lora agnostic": "finished", "lora specific": "finished", "full": "failed"}
    assert "FloatingPointError" in (found["full"].reason or "")
    assert "FloatingPointError" in result.stdout
    assert "3 of 4 trials finished" in result.stdout
    page = (folder / "runs/small/report/index.html").read_text(encoding="utf-8")
    assert "FloatingPointError" in page


@pytest.mark.e2e
def test_every_finished_trial_is_measured_in_full(grid: Grid) -> None:
    folder = grid.folder
    finished = {name: record for name, record in records(folder).items() if record.status == "finished"}
    assert len(finished) == 3
    for name, record in finished.items():
        perplexities = {"perplexity", "perplexity_one_reference", "perplexity_wrong_input"}
        assert set(record.metrics["test"]) - {"spice"} == perplexities | CAPTION_METRICS, name
        missing = spice.missing()
        assert ("spice" in record.metrics["test"]) is (missing is None)
        assert [line for line in record.warnings if "SPICE" in line] == ([missing] if missing else [])
        assert record.metrics["test"]["bleu_1"] > 0
        assert record.history[1].train_loss < record.history[0].train_loss
        assert record.metrics["validation"]["perplexity"] == min(e.validation_perplexity for e in record.history)
        assert record.parameters is not None
        assert record.parameters.trainable == record.parameters.adapter + record.parameters.projector
        assert record.memory is not None
        assert record.throughput is not None
        assert record.throughput.examples_per_s > 0
        examples = pd.read_parquet(folder / "runs/small/trials" / record.trial_id / "examples.parquet")
        assert len(examples) == 16
        assert set(examples.columns) >= CAPTION_METRICS
    data = {record.data.order_fingerprint for record in records(folder).values() if record.data}
    assert len(data) == 1, "every method saw the same examples in the same order"


@pytest.mark.e2e
def test_the_terminal_is_quiet_and_ends_with_what_to_do_next(grid: Grid) -> None:
    result = grid.result
    assert "report:  runs/small/report/index.html" in result.stdout
    assert "mlflow ui --backend-store-uri sqlite:///" in result.stdout
    noise = [line for line in result.stderr.splitlines() if line.strip()]
    assert noise == []


@pytest.mark.e2e
def test_mlflow_has_a_parent_run_and_a_child_for_every_trial(grid: Grid) -> None:
    folder = grid.folder
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if run.data.tags["harness.kind"] == "grid"]
    children = [run for run in runs if run.data.tags["harness.kind"] == "trial"]
    assert len(parents) == 1
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    by_id = {run.data.tags["harness.trial_id"]: run for run in children}
    for record in records(folder).values():
        run = by_id[record.trial_id]
        assert run.info.status == ("FINISHED" if record.status == "finished" else "FAILED")
        for name, value in record.metrics.get("test", {}).items():
            assert run.data.metrics[f"test/{name}"] == pytest.approx(value)
    report = client.list_artifacts(parents[0].info.run_id, "report")
    assert {artifact.path for artifact in report} >= {"report/index.html"}


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_is_started_again(tmp_path: Path) -> None:
    write_experiment(tmp_path, "max_concurrent_trials: 1", adapters=TWO)
    driver = subprocess.Popen([*HARNESS, "run", "small.yaml"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    _wait_for_records(tmp_path / "runs/small/trials", driver)
    for worker in _workers(driver.pid):
        worker.kill()
    assert driver.wait(timeout=600) == 0
    assert {record.status for record in records(tmp_path).values()} == {"finished"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_slot_of_a_killed_worker_is_filled_again(tmp_path: Path) -> None:
    """With trials shorter than the start of a worker: the other worker must not take over each that starts."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two trials at once")
    write_experiment(tmp_path, "max_concurrent_trials: 2", adapters=TWO)
    with (tmp_path / "small.yaml").open("a", encoding="utf-8") as file:
        file.write("seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n")
    driver = subprocess.Popen([*HARNESS, "run", "small.yaml"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        ended = _wait_for_records(tmp_path / "runs/small/trials", driver, seconds=800)
        between_trials = set().union(*(_pids_in(path.with_name("log.txt")) for path in ended))
        first = {worker.pid: worker for worker in _workers(driver.pid)}
        next(worker for pid, worker in first.items() if pid not in between_trials or len(ended) > 1).kill()
        assert driver.wait(timeout=900) == 0
    finally:
        driver.terminate()
    found = read_run(tmp_path / "runs/small").records.values()
    assert [record.status for record in found] == ["finished"] * 20
    later = [_pids_in(path) - first.keys() for path in (tmp_path / "runs/small/trials").glob("*/log.txt")]
    assert sum(map(bool, later)) >= 2, "a new worker ran trial after trial"  # 0 if each that starts is stopped


@pytest.mark.slow
def test_a_sweep_whose_ray_is_killed_ends_with_the_reason(tmp_path: Path) -> None:
    """Ray's node dies with its DashboardAgent; Tune would wait for another node without a word.

    If Ray's library in the driver is asked for anything before we ask for the nodes, it ends the process at once
    (``QuickExit``), after its own message.
    """
    write_experiment(tmp_path, "max_concurrent_trials: 1", adapters=TWO)
    driver = subprocess.Popen(
        [*HARNESS, "run", "small.yaml"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    _wait_for_records(tmp_path / "runs/small/trials", driver)
    (agent,) = [p for p in psutil.Process(driver.pid).children(recursive=True) if "DashboardAgent" in p.cmdline()[0]]
    agent.kill()
    said, _ = driver.communicate(timeout=200)
    assert driver.returncode == 1, said
    if "Ray has died" in said:
        assert "one of its processes (raylet, DashboardAgent, RuntimeEnvAgent) was killed; finished" in said
        assert "1 of 2 trials finished" in said
    else:
        assert "has been marked dead because the detector has missed too many heartbeats" in said
    assert harness("run", "small.yaml", cwd=tmp_path).returncode == 0


def _pids_in(log: Path) -> set[int]:
    """The processes that wrote a trial's log."""
    return {int(pid) for pid in re.findall(r"^\S+ \S+ (\d+) ", log.read_text(encoding="utf-8"), re.MULTILINE)}


def _wait_for_records(trials: Path, driver: subprocess.Popen[Any], count: int = 1, seconds: float = 600) -> list[Path]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = list(trials.glob("*/record.json"))
        if len(found) >= count:
            return found
        assert driver.poll() is None, f"the sweep ended before it had {count} records"
        time.sleep(0.1)
    raise AssertionError(f"not {count} records in {seconds} s")


def _workers(driver: int) -> Iterator[psutil.Process]:
    for process in psutil.Process(driver).children(recursive=True):
        # A function of Tune's, or the class that the harness makes of it.
        if any(f"ray::{name}" in " ".join(process.cmdline()) for name in ("ImplicitFunc", "ResourceTrainable")):
            yield process


@pytest.mark.real_data
def test_real_coco_images_run_end_to_end(tmp_path: Path) -> None:
    """Only that it runs right is claimed: models this small do not caption photographs."""
    if not os.environ.get("COCO_ROOT"):
        pytest.skip("COCO_ROOT is not set: it names a folder in COCO's own layout")
    result = harness("run", str(ROOT / "experiments/coco_mini.yaml"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = read_run(tmp_path / "runs/coco_mini")
    assert {record.status for record in run.records.values()} == {"finished"}
    assert len(run.records) == 3
    for record in run.records.values():
        assert {"bleu_4", "meteor", "rouge_l", "cider"} <= set(record.metrics["test"])
        perplexities = [epoch.validation_perplexity for epoch in record.history]
        assert perplexities == sorted(perplexities, reverse=True), "it learns"


@pytest.mark.real_data
def test_real_spoken_digits_are_learnt_and_heard_in_a_voice_never_heard(tmp_path: Path) -> None:
    """One method of experiments/fsdd.yaml, 200 recordings of one speaker; chance is 10 %."""
    if not os.environ.get("FSDD_ROOT"):
        pytest.skip("FSDD_ROOT is not set: it names the Free Spoken Digit Dataset")
    content = yaml.safe_load((ROOT / "experiments/fsdd.yaml").read_text(encoding="utf-8"))
    content["adapters"] = [a | {"grouping": "specific"} for a in content["adapters"] if a["method"] == "lora"]
    (tmp_path / "fsdd.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    result = harness("run", "fsdd.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (record,) = read_run(tmp_path / "runs/fsdd").records.values()
    assert record.status == "finished"
    assert record.metrics["test"]["exact_match"] > 0.5
    assert record.metrics["test"]["wer"] < 0.5
    assert record.metrics["test"]["perplexity_wrong_input"] > 1.5 * record.metrics["test"]["perplexity"]
    examples = pd.read_parquet(next((tmp_path / "runs/fsdd/trials").glob("*/examples.parquet")))
    speakers = {split: set(rows["example_id"].str.split("_").str[1]) for split, rows in examples.groupby("split")}
    assert speakers["test"] == {"yweweler"}
    assert not speakers["test"] & speakers["validation"]
