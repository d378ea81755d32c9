"""`harness status` says which files are no longer as they were when the run read them."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from rich.console import Console

import harness
from harness.core.record import write_record
from harness.experiment.plan import expand
from harness.model import inputs
from harness.sweep import input_files, run
from harness.sweep.changed_data import state_of_data
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


def test_digests_of_decoded_files_have_a_file_of_their_own(grid: Path) -> None:
    kept = inputs.Inputs(grid)
    kept.save()
    assert json.loads((grid / inputs.FILE_NAME).read_text()) == {}
    assert changed_files(grid) == []
    assert json.loads((grid / input_files.FILE_NAME).read_text())["named"]


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


def test_what_a_link_in_the_data_leads_to_is_data(texts: harness.Experiment, tmp_path: Path) -> None:
    """Pictures are on a large disk, and the data set's folder has a link to them; one of the links leads back."""
    disk, folder = tmp_path / "disk" / "pictures", tmp_path / "runs" / "grid"
    disk.mkdir(parents=True)
    (disk / "1.jpg").write_bytes(b"1")
    (tmp_path / "texts" / "pictures").symlink_to(disk)
    (disk / "back").symlink_to(tmp_path / "texts")
    folder.mkdir(parents=True)
    before = list(state_of_data(expand(texts), tmp_path / "runs"))
    keep_files(folder, see_files(expand(texts), [], folder), changed=[])
    assert changed_files(folder) == []
    (disk / "1.jpg").write_bytes(b"another")
    line = f"task.root: files in {tmp_path / 'texts'} have changed since this run read them; {ASK}"
    assert changed_files(folder) == [line]
    assert list(state_of_data(expand(texts), tmp_path / "runs")) != before


def test_a_link_that_leads_to_other_data_is_a_change(texts: harness.Experiment, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "texts", second := tmp_path / "second")
    (tmp_path / "texts").rename(first := tmp_path / "first")
    (tmp_path / "texts").symlink_to(first)
    (folder := tmp_path / "runs" / "grid").mkdir(parents=True)
    keep_files(folder, see_files(expand(texts), [], folder), changed=[])
    assert changed_files(folder) == []
    (tmp_path / "texts").unlink()
    (tmp_path / "texts").symlink_to(second)
    line = f"task.root: files in {tmp_path / 'texts'} have changed since this run read them; {ASK}"
    assert changed_files(folder) == [line]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/" + "a" * 100_000, "aaaa is gone"),
        ("", ". in {}/input_files.json is no absolute path"),
        ("/a\0b", "/a\0b is gone"),
        ("/dev/zero", "/dev/zero is gone"),
    ],
    ids=["long", "empty", "NUL", "device"],
)
def test_paths_that_cannot_be_are_said(tmp_path: Path, path: str, says: str) -> None:
    item = {"key": "task.root", "path": path, "files": 1, "digest": "0"}
    content = json.dumps({"host": socket.gethostname(), "named": [item]})
    (tmp_path / input_files.FILE_NAME).write_text(content)
    (line,) = changed_files(tmp_path)
    assert line.startswith("task.root: ")
    assert says.format(tmp_path) in line


def test_a_long_list_is_not_looked_at_for_ever(tmp_path: Path) -> None:
    items = [{"key": "task.root", "path": f"/nothing/{n}", "files": 1, "digest": "0"} for n in range(100_000)]
    (tmp_path / input_files.FILE_NAME).write_text(json.dumps({"host": socket.gethostname(), "named": items}))
    lines = changed_files(tmp_path)
    assert len(lines) == 21
    assert lines[-1] == f"99980 other files or folders were not looked at; {ASK}"


def test_a_module_that_a_plugin_imports_from_its_folder_is_read(texts: harness.Experiment, tmp_path: Path) -> None:
    (plugin := tmp_path / "metric.py").write_text("import beside\n")
    (beside := tmp_path / "beside.py").write_text("x = 1\n")
    (folder := tmp_path / "runs" / "grid").mkdir(parents=True)
    keep_files(folder, see_files(expand(texts), [plugin], folder), changed=[])
    beside.write_text("x = 22\n")
    assert changed_files(folder) == [f"plugins: {beside} has changed since this run read it; {ASK}"]


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
    assert "input_files.json: not what a run has read" in line


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
