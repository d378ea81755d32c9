"""A run that has nothing left to do is not done again, until something that it depends on changes."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import harness
from harness.core.record import record_path, write_record
from harness.sweep import run, settled
from harness.sweep.settled import read_settled, settle
from tests.support.runs import fake_plan, fake_record, write_examples, write_run


def experiment(seeds: tuple[int, ...] = (0,)) -> harness.Experiment:
    return harness.Experiment(
        name="grid",
        task={"name": "scenes", "train_examples": 8, "validation_examples": 4, "test_examples": 4},
        adapters=[{"method": "none", "learning_rate": 1e-2}],
        seeds=seeds,
    )


@pytest.fixture
def runs(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parent of a run folder in which all has been done."""
    shutil.copy(mlflow_database, tmp_path)

    def finish_all(prepared: run.Prepared, *_: object) -> None:
        for spec, planned in prepared.unfinished():
            dump = spec.model_dump(mode="json")
            # Without data: those of the fake are not those of the task, which a run would say.
            write_record(prepared.folder, fake_record(planned, 1, 0.5).model_copy(update={"spec": dump, "data": None}))
            write_examples(prepared.folder, spec.trial_id, ["a circle"], tmp_path)

    monkeypatch.setattr(run, "_run_unfinished", finish_all)
    again(tmp_path)
    return tmp_path


def again(runs: Path, seeds: tuple[int, ...] = (0,), measure: bool = False) -> tuple[harness.Results, str]:
    shown = io.StringIO()
    found = harness.run_experiment(experiment(seeds), runs, measure=measure, console=Console(file=shown))
    return found, shown.getvalue()


def test_a_run_with_nothing_left_to_do_checks_and_writes_nothing(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    monkeypatch.setattr(run, "_conclude", lambda *_: pytest.fail("the report was written again"))
    found, shown = again(runs)
    assert shown == "the trial has already finished; nothing to compute\n"
    assert (found.settled, found.complete, found.tracking_problem, len(found.trials)) == (True, True, None, 1)
    assert found.report == runs / "grid" / "report" / "index.html"
    assert str(found.tracking_link).startswith("#/experiments/")
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()} == files


def test_another_experiment_or_option_is_not_settled(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_profile", lambda *_: False)  # as after an error
    assert not again(runs, measure=True)[0].settled
    assert not again(runs, measure=True)[0].settled, "the profile is tried again"
    assert not again(runs, seeds=(0, 1))[0].settled
    assert again(runs, seeds=(0, 1))[0].settled
    (runs / "mlflow.db").unlink()
    assert not again(runs, seeds=(0, 1))[0].settled


def touched(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "the plan": lambda folder, _: touched(folder / "plan.json"),
    "a record": lambda folder, trial: touched(record_path(folder, trial.name)),
    "a record is gone": lambda folder, trial: record_path(folder, trial.name).unlink(),
    "a record is replaced by one as long and as old": lambda folder, trial: replaced(record_path(folder, trial.name)),
    "the scores of examples": lambda _, trial: touched(trial / "examples.parquet"),
    "a foreign record": lambda folder, trial: shutil.copytree(trial, folder / "trials" / "other"),
    "the report": lambda folder, _: touched(folder / "report" / "index.html"),
    "a file of the report is gone": lambda folder, _: (folder / "report" / "leaderboard.csv").unlink(),
    "points that MLflow lacks": lambda _, trial: (trial / "mlflow.jsonl").touch(),
    "a profile": lambda folder, _: (folder / "profile.json").touch(),
    "a preview": lambda folder, _: (folder / "previews" / "b.png").touch(),
    "the file is torn": lambda folder, _: (folder / "settled.json").write_text("{"),
}


def replaced(path: Path) -> None:
    status, content = path.stat(), path.read_bytes()
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


@pytest.mark.quick
@pytest.mark.parametrize("case", CHANGES)
def test_whatever_changes_the_run_is_no_longer_settled(tmp_path: Path, case: str) -> None:
    folder = write_run(tmp_path, fake_plan(seeds=(0,)))
    trial = next((folder / "trials").iterdir())
    write_examples(folder, trial.name, ["a circle"], tmp_path)
    for name in ("report/index.html", "report/leaderboard.csv", "previews/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    settle(folder, ["asked"], "#/link")
    found = read_settled(folder, ["asked"])
    assert found is not None
    assert found.tracking_link == "#/link"
    assert read_settled(folder, ["asked for more"]) is None
    (trial / "log.txt").touch()  # no part of the report
    assert read_settled(folder, ["asked"]) == found
    CHANGES[case](folder, trial)
    assert read_settled(folder, ["asked"]) is None


@pytest.mark.quick
def test_other_code_is_another_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", fake_plan(seeds=(0,)))
    monkeypatch.setattr(settled, "_ROOT", tmp_path)
    code = tmp_path / "results" / "page" / "page.py"
    code.parent.mkdir(parents=True)
    code.touch()
    settle(folder, [], None)
    (code.parent / "__pycache__").mkdir()
    (code.parent / "__pycache__" / "page.pyc").touch()
    assert read_settled(folder, []) is not None
    touched(code)
    assert read_settled(folder, []) is None
