"""`harness status` says which files are no longer as they were when the run read them."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import harness
from harness.core.record import write_record
from harness.experiment.plan import expand
from harness.sweep import input_files, run
from harness.sweep.input_files import changed_files, keep_files, see_files
from tests.support.cli import caller
from tests.support.models import tiny_llama
from tests.support.runs import fake_record

SPLITS = ("train", "validation", "test")
ASK = "`harness run` says whether examples, models or plugins are others"


def write(folder: Path, split: str, word: str) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": f"{split} {n}?", "completion": f" {word} {n}."}) for n in range(4)]
    (folder / f"{split}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def texts(tmp_path: Path) -> harness.Experiment:
    """An experiment with data of its own, in ``texts``."""
    for split in SPLITS:
        write(tmp_path / "texts", split, "it is")
    files = {split: f"{split}.jsonl" for split in SPLITS[1:]}
    return harness.Experiment(
        name="grid", task={"name": "text", "root": str(tmp_path / "texts"), **files},
        adapters=[{"method": "lora", "rank": 2, "learning_rate": 1e-2}],
    )  # fmt: skip


@pytest.fixture
def grid(texts: harness.Experiment, tmp_path: Path) -> Path:
    """The run folder of a run that has read them."""
    folder = tmp_path / "runs" / "grid"
    folder.mkdir(parents=True)
    keep_files(folder, see_files(expand(texts), [], folder), changed=[])
    return folder


def test_a_file_that_changed_in_a_folder_of_data_is_said(grid: Path, tmp_path: Path) -> None:
    assert changed_files(grid) == []
    write(tmp_path / "texts", "test", "it was")
    assert changed_files(grid) == [
        f"task.root: files in {tmp_path / 'texts'} have changed since this run read them; {ASK}"
    ]


def test_a_file_that_is_new_or_gone_is_a_change(grid: Path, tmp_path: Path) -> None:
    (new := tmp_path / "texts" / "notes.txt").write_text("new")
    assert len(changed_files(grid)) == 1
    new.unlink()
    assert changed_files(grid) == []
    (tmp_path / "texts" / "train.jsonl").unlink()
    assert len(changed_files(grid)) == 1


def test_compiled_and_hidden_files_are_no_data(grid: Path, tmp_path: Path) -> None:
    for name in (".cache", "__pycache__"):
        (tmp_path / "texts" / name).mkdir()
        (tmp_path / "texts" / name / "file").touch()
    assert changed_files(grid) == []


def test_data_that_are_gone_are_said_with_the_machine_that_read_them(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(data := tmp_path / "texts")
    assert changed_files(grid) == [f"task.root: {data} is gone"]
    monkeypatch.setattr("socket.gethostname", lambda: "laptop")
    host = json.loads((grid / input_files.FILE_NAME).read_text())["host"]
    assert changed_files(grid) == [f"task.root: {data} is gone, or not on this machine: {host} read it"]


def test_what_takes_too_long_is_said_and_not_waited_for(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_files, "_LIMIT_S", -1.0)
    (line,) = changed_files(grid)
    assert line.endswith(f"texts: 3 files take too long to look at; {ASK}")


def test_models_and_plugins_are_files_that_a_run_reads(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(language_model := tmp_path / "model")
    (plugin := tmp_path / "metric.py").write_text("")
    experiment = harness.Experiment(
        name="grid", task="scenes", backbone={"language_model": str(language_model)},
        adapters=[{"method": "none", "learning_rate": 1e-2}],
    )  # fmt: skip
    folder = tmp_path / "runs" / "grid"
    folder.mkdir(parents=True)
    keep_files(folder, see_files(expand(experiment), [plugin], folder), changed=[])
    assert changed_files(folder) == []
    plugin.write_text("# changed")
    os.utime(language_model / "model.safetensors", ns=(1, 1))
    first, second = changed_files(folder)
    assert first == f"plugins: {plugin} has changed since this run read it; {ASK}"
    assert second.startswith(f"backbone.language_model: files in {language_model} have changed since this run read")


def test_a_broken_file_of_states_is_said(grid: Path) -> None:
    (grid / input_files.FILE_NAME).write_text("{")
    (line,) = changed_files(grid)
    assert "inputs.json: not what a run has read" in line


def test_a_run_keeps_the_state_that_finished_trials_have_read(
    texts: harness.Experiment, tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")

    def finish_all(prepared: run.Prepared, *_: object) -> None:
        for spec, planned in prepared.unfinished():
            record = fake_record(planned, 1, 0.5)
            write_record(prepared.folder, record.model_copy(update={"spec": spec.model_dump(mode="json")}))

    monkeypatch.setattr(run, "_run_unfinished", finish_all)
    status = caller(monkeypatch, capsys, "status")

    def again() -> str:
        shown = io.StringIO()
        harness.run_experiment(texts, tmp_path, measure=False, console=Console(file=shown, width=1000))
        return shown.getvalue()

    again()
    assert "changed since this run read" not in status(tmp_path / "grid").out
    write(tmp_path / "texts", "test", "it was")
    line = f"task.root: files in {tmp_path / 'texts'} have changed since this run read them; {ASK}"
    assert line in status(tmp_path / "grid").out.splitlines()
    # The fake's examples are no task's, so the run finds the finished trial's data changed, and what it read stays.
    assert "the data have changed under their name" in again()
    assert line in status(tmp_path / "grid").out.splitlines()
