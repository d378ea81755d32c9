"""System metrics that never delay a trial, and a page that names everything that is logged."""

from __future__ import annotations

import gc
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from harness.core.files import write_atomically
from harness.core.record import Memory, write_record
from harness.tracking.grid import Grid, close_grid
from harness.tracking.system import SystemMetrics
from harness.tracking.tracker import MlflowTracker
from tests.support.tracking import Trial, artifacts, finished_record, four_trials, new_grid

PAGE = Path(__file__).parents[2] / "docs" / "mlflow.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(mlflow_database, folder)
    return folder


@pytest.fixture(scope="module")
def grid(runs: Path) -> Grid:
    return new_grid(runs, "grid")


@pytest.fixture(scope="module")
def client(grid: Grid) -> MlflowClient:
    return MlflowClient(grid.uri)


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return four_trials()


def samplers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_sample" in thread.name]


@pytest.mark.e2e
def test_trials_one_after_another_in_a_process_each_sample_their_own_run(
    grid: Grid, client: MlflowClient, runs: Path, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    for trial in trials[:2]:
        folder = runs / "grid" / "trials" / trial[1].trial_id
        tracker = MlflowTracker(grid, *trial, folder)
        began, cpu = time.monotonic(), time.process_time()
        while time.monotonic() < began + 1.6:  # a busy process
            pass
        share = min(1.0, (time.process_time() - cpu) / 1.6)  # of a core: less on a busy machine
        tracker.finish(finished_record(trial[1], tracker.run_id), folder)
        assert tracker.warnings == ()
        assert samplers() == []
        run_id = str(tracker.run_id)
        values = client.get_run(run_id).data.metrics
        busy = client.get_metric_history(run_id, "system/process_cpu_utilization_percentage")
        assert busy[0].value > 20 * share
        assert busy[0].step in (1, 2)
        assert 0 < values["system/cpu_utilization_percentage"] <= 100
        assert 50 < values["system/process_memory_megabytes"] < values["system/system_memory_usage_megabytes"] + 4000


def test_they_can_be_disabled(grid: Grid, trials: list[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    MlflowTracker(grid, *trials[2], tmp_path)
    assert samplers() == []


def sampler(add: Callable[..., Any]) -> SystemMetrics:
    return SystemMetrics(add, int(time.time() * 1000))


@pytest.mark.e2e
def test_collectors_that_hang_or_fail_do_not_delay_the_trial(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    monkeypatch.setattr(SystemMetricsMonitor, "__init__", quick_monitor)
    answered = threading.Event()
    hanging = sampler(lambda *_: answered.wait(30))
    failing = sampler(lambda *_: 1 / 0)
    time.sleep(1.3)
    began = time.monotonic()
    failing.stop()
    assert time.monotonic() - began < 1
    hanging.stop()
    assert 1.5 < time.monotonic() - began < 5
    (thread,) = samplers()
    assert thread.daemon  # it does not keep a worker from exiting
    answered.set()
    thread.join(5)
    assert [record.getMessage() for record in caplog.records] == ["system metrics stopped"]
    assert "ZeroDivisionError" in caplog.text


def quick_monitor(self: Any, *_: Any, **__: Any) -> None:
    self.sampling_interval, self.monitors = 1, []


def test_sampling_ends_when_a_tracker_is_deleted_unfinished() -> None:
    given_up = sampler(lambda *_: None)
    (thread,) = samplers()
    del given_up
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


FAMILY = ("…", "<metric>", "<phase>")  # endings of names on the page that stand for several


def test_the_page_names_everything_that_is_logged(
    grid: Grid, client: MlflowClient, runs: Path, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, planned = trials[3]
    folder = runs / "grid" / "trials" / planned.trial_id
    tracker = MlflowTracker(grid, spec, planned, folder)
    history = {"train_loss": 1.0, "validation_perplexity": 2.0, "learning_rate": 1e-3}
    tracker.metrics(history, step=1)
    time.sleep(1.1)
    memory = Memory(**dict.fromkeys(Memory.model_fields, 1))
    record = finished_record(planned, tracker.run_id, memory=memory, status="failed", reason="killed")
    write_record(runs / "grid", record)
    for name in ("examples.parquet", "attention.safetensors", "log.txt"):
        write_atomically(folder / name, "")
    tracker.finish(record, folder)
    assert tracker.warnings == ()
    write_atomically(runs / "grid" / "experiment.yaml", "")
    close_grid(new_grid(runs, "grid"), complete=False, artifacts=[])
    child, parent = client.get_run(str(tracker.run_id)), client.get_run(grid.parent_run_id)

    named = set(re.findall(r"`([^`\n]+)`", PAGE.read_text(encoding="utf-8")))
    families = {
        name.removesuffix("…").removesuffix("<metric>").removesuffix("<phase>")
        for name in named
        if name.endswith(FAMILY)
    }
    metrics = {
        name
        for run in (child, parent)
        for name in run.data.metrics
        if not name.startswith(("test/", "validation/", "system/phases_s/"))
    }
    assert {"test/", "validation/", "system/phases_s/"} <= families
    assert len([name for name in metrics if name.count("/") == 1 and name.startswith("system/")]) == 12
    assert metrics - named == set()
    tags = {tag for run in (child, parent) for tag in run.data.tags} - {"mlflow.runName"}
    assert tags - named == set()
    assert set(artifacts(client, child.info.run_id)) - named == set()
    assert set(artifacts(client, parent.info.run_id)) - named == set()
    assert child.info.status in named
    plain = {param for param in child.data.params if "." not in param}
    assert {"method", "rank", "seed"} <= plain <= named
    parts = {param.partition(".")[0] for param in child.data.params if "." in param}
    assert all(any(name.startswith(f"{part}.") for name in named) for part in parts)
