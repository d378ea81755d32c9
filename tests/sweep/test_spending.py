"""Device-hours: what is counted, and what happens when ``budget.gpu_hours`` is reached."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import harness
from harness.core.record import TrialRecord
from harness.experiment.plan import expand
from harness.experiment.sections import Resources
from harness.sweep import run, spending
from harness.sweep.spending import FILE_NAME, Metered, devices_of, spent_s
from harness.sweep.stopping import EXIT_CODES, REQUEST, Stopping
from tests.support.profiled import trained
from tests.support.refused import check_refused

SECTIONS: dict[str, Any] = {
    "name": "grid",
    "task": {"name": "scenes", "train_examples": 8, "validation_examples": 4, "test_examples": 4},
    "adapters": [{"method": "none", "learning_rate": 1e-2}],
}


class Shown:
    """A display that remembers."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def opened(self, run: Path, at_once: int) -> None:
        self.seen.append(f"opened {at_once}")

    def noted(self, line: str) -> None:
        self.seen.append(line)

    def abandoned(self, line: str) -> None:
        self.seen.append(line)

    def started(self, trial_id: str, place: str) -> None:
        self.seen.append(f"started {trial_id}")

    def progressed(self, trial_id: str, progress: dict[str, Any]) -> None:
        self.seen.append(f"progressed {trial_id}")

    def ended(self, record: TrialRecord) -> None:
        self.seen.append(f"ended {record.trial_id}")


def record_of(folder: Path) -> TrialRecord:
    return next(iter(harness.load_results(folder).run.records.values()))


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_limit_changes_no_trial() -> None:
    plain, limited = (harness.Experiment(**SECTIONS, budget={"examples": 8, **more}) for more in ({}, {"gpu_hours": 2}))
    assert limited.gpu_hours == 2
    assert [spec.trial_id for spec in expand(plain)] == [spec.trial_id for spec in expand(limited)]
    assert "gpu_hours" not in expand(limited)[0].model_dump_json()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("gpu_hours", "-1", "greater than 0"),
        ("gpu_hours", "[1, 2]", "it limits the whole run, so it has no axis"),
        ("gpu_hour", "4", "gpu_hours"),
    ],
)
def test_a_wrong_limit_is_refused(experiment_file: Callable[[str], Path], key: str, value: str, says: str) -> None:
    text = f"task: scenes\nadapters: [{{method: none, learning_rate: 1e-2}}]\nbudget:\n  {key}: {value}\n"
    check_refused(experiment_file(text), 4, f"budget.{key}", says)


def test_what_counts_as_a_device() -> None:
    assert devices_of(Resources(workers=2), 0) == 1  # a slot
    assert devices_of(Resources(workers=2), 1) == 2
    assert devices_of(Resources(), 0.25) == 0.25


def test_records_and_attempts_count_and_so_does_what_was_killed(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    known = sum(record.wall_time_s for record in harness.load_results(folder).run.records.values())
    assert known > 0
    assert spent_s(folder, 2) == pytest.approx(2 * known)
    one = next(iter(sorted((folder / "trials").iterdir())))
    (one / "attempt-1.json").write_bytes((one / "record.json").read_bytes())
    assert spent_s(folder, 1) == pytest.approx(known + record_of(folder).wall_time_s)
    (folder / FILE_NAME).write_text('{"device_s": 1e6}')
    assert spent_s(folder, 2) == 1e6


def test_trials_are_counted_until_they_end_and_the_run_is_asked_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spending, "_LOOK_S", 0.01)
    folder = trained(tmp_path / "other")
    record, shown = record_of(folder), Shown()
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    metered = Metered(shown, run_folder, 0.4 / 3600, Resources(workers=2), lambda _: 2.0)
    with metered.watching():
        metered.opened(run_folder, 1)
        metered.started(record.trial_id, record.trial_id)
        metered.started(record.trial_id, record.trial_id)  # in another process, as the first one died: its time goes on
        metered.progressed(record.trial_id, {})
        wait_for((run_folder / REQUEST).exists)
        metered.ended(record)
        ended = metered.spent_s
        time.sleep(0.05)
        assert metered.spent_s == ended  # nothing runs, so nothing is spent
    assert 0.4 <= ended < 10
    assert spent_s(run_folder, 1) == pytest.approx(ended, abs=0.01)
    assert shown.seen == ["opened 1", *[f"started {record.trial_id}"] * 2, f"progressed {record.trial_id}",
                          f"ended {record.trial_id}"]  # fmt: skip
    stopping = Stopping(run_folder)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        stopping.handle(15, None)
    assert stopping.reason == "budget"
    assert EXIT_CODES["budget"] == 4


def test_the_trials_of_a_pack_share_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(spending.time, "monotonic", lambda: now[0])
    known = record_of(trained(tmp_path / "other"))
    (tmp_path / "run").mkdir()
    metered = Metered(Shown(), tmp_path / "run", 1.0, Resources(), lambda _: 1.0)
    metered.opened(tmp_path / "run", 1)
    for trial_id in "abc":
        metered.started(trial_id, "a")
    spent = []
    for trial_id in "acb":
        now[0] += 10.0
        metered.ended(known.model_copy(update={"trial_id": trial_id}))
        spent.append(metered.spent_s)
    now[0] += 10.0
    assert [*spent, metered.spent_s] == [10.0, 20.0, 30.0, 30.0]


def test_what_was_spent_before_stays_where_no_cluster_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spending, "_LOOK_S", 0.01)
    monkeypatch.setattr(spending, "_KEEP_S", 0.0)
    (tmp_path / FILE_NAME).write_text('{"device_s": 7200.0}')
    metered = Metered(Shown(), tmp_path, 1.0, Resources(), lambda _: 1.0)
    with metered.watching():
        time.sleep(0.1)  # connecting to the cluster
    assert spent_s(tmp_path, 1) == 7200
    assert not (tmp_path / REQUEST).exists()
    with metered.watching():
        metered.opened(tmp_path, 1)
        wait_for((tmp_path / REQUEST).exists)
    assert spent_s(tmp_path, 1) == 7200


def test_nothing_starts_where_the_limit_was_reached_before(
    tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grid").mkdir()
    (tmp_path / "mlflow.db").write_bytes(mlflow_database.read_bytes())
    (tmp_path / "grid" / FILE_NAME).write_text('{"device_s": 7200}')
    shown = io.StringIO()
    experiment = harness.Experiment(**SECTIONS, budget={"gpu_hours": 2})
    results = harness.run_experiment(experiment, tmp_path, console=Console(file=shown, width=200))
    assert (results.stopped, results.complete) == ("budget", False)
    assert "2 of 2 device-hours were spent before" in shown.getvalue()
    assert "budget.gpu_hours is reached: finished trials are kept; run the same experiment again with a larger" in (
        shown.getvalue()
    )
    started: list[object] = []
    monkeypatch.setattr("harness.sweep.tune.sweep", lambda *given: started.append(given))
    larger = harness.Experiment(**SECTIONS, budget={"gpu_hours": 3})
    harness.run_experiment(larger, tmp_path, console=Console(file=shown), measure=False)
    assert len(started) == 1
    assert run.prepare(larger, tmp_path).folder == tmp_path / "grid"
