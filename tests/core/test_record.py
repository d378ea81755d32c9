"""Records: atomic writes, strict reads, and nothing in a run folder is skipped silently."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from harness.core.files import write_atomically
from harness.core.record import (
    MetricInfo,
    Plan,
    PlannedTrial,
    TrialRecord,
    read_record,
    read_run,
    record_path,
    write_record,
)

pytestmark = pytest.mark.quick


def record(trial_id: str = "abc", **changes: Any) -> TrialRecord:
    fields: dict[str, Any] = {
        "trial_id": trial_id,
        "experiment": "made-up",
        "status": "finished",
        "spec": {"seed": 0},
        "seed": 0,
        "metrics": {"test": {"perplexity": 7.5}},
        "wall_time_s": 1.5,
        "started_at": "2026-01-01T00:00:00+00:00",
    }
    return TrialRecord(**fields | changes)


def write_plan(folder: Path, *trial_ids: str) -> None:
    trials = tuple(
        PlannedTrial(trial_id=i, label="none", method="none", grouping="", setting="", seed=0) for i in trial_ids
    )
    info = MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False)
    plan = Plan(experiment="e", experiment_file="e.yaml", primary_metric="perplexity", metrics=(info,), trials=trials)
    write_atomically(folder / "plan.json", plan.model_dump_json())


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    epoch = {"epoch": 1, "step": 4, "train_loss": 2.0, "validation_perplexity": 9.0, "learning_rate": 1e-3}
    written = record(history=(epoch,))
    write_record(tmp_path, written)
    assert read_record(record_path(tmp_path, "abc")) == written
    assert [path.name for path in (tmp_path / "trials" / "abc").iterdir()] == ["record.json"]


def test_writing_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    write_atomically(path, "old, and much longer than the new one")
    write_atomically(path, "new ·")
    assert path.read_text(encoding="utf-8") == "new ·"


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, record(wall_time_s=1.0))

    def crash(self: Path, target: Path) -> Path:
        # The file that is about to replace the old one is already complete.
        assert TrialRecord.model_validate_json(self.read_bytes()).wall_time_s == 2.0
        raise OSError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(OSError, match="the power went"):
            write_record(tmp_path, record(wall_time_s=2.0))
    assert read_record(record_path(tmp_path, "abc")).wall_time_s == 1.0
    write_plan(tmp_path, "abc")
    assert read_run(tmp_path).broken == ()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_metric_is_nan_or_infinite(value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        record(metrics={"test": {"perplexity": value}})
    with pytest.raises(ValidationError, match="finite number"):
        record(wall_time_s=value)


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(record().model_dump_json()) | changes)


WRONG = {
    "nan": (changed(metrics={"test": {"perplexity": math.nan}}), "finite number"),
    "half a file": (record().model_dump_json()[:-40], "Invalid JSON"),
    "empty": ("", "Invalid JSON"),
    "a list": ("[]", "should be an object"),
    "unknown key": (changed(score=1.0), "Extra inputs are not permitted"),
    "unknown status": (
        changed(status="done"),
        "'finished', 'failed', 'out_of_memory', 'pruned', 'cancelled' or 'paused'",
    ),
    "another schema": (changed(schema_version=2), "Input should be 1"),
    "missing key": ('{"trial_id": "abc"}', "Field required"),
    "text for a metric": (changed(metrics={"test": {"perplexity": "low"}}), "valid number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_reading_is_strict_and_names_the_file(tmp_path: Path, case: str) -> None:
    text, says = WRONG[case]
    path = tmp_path / "record.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a trial record: ") + f".*{re.escape(says)}"):
        read_record(path)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'record.json'}: not a trial record: ")):
        read_record(tmp_path / "record.json")


def test_a_run_folder_names_broken_and_foreign_files(tmp_path: Path) -> None:
    write_plan(tmp_path, "one", "two", "three")
    write_record(tmp_path, record("one"))
    write_record(tmp_path, record("old"))
    broken = record_path(tmp_path, "two")
    write_atomically(broken, "{")
    run = read_run(tmp_path)
    assert (run.folder, list(run.records), run.foreign) == (tmp_path, ["one"], ("old",))
    assert len(run.broken) == 1
    assert run.broken[0].startswith(f"{broken}: not a trial record: ")
    assert [trial.trial_id for trial in run.plan.trials] == ["one", "two", "three"]


def test_every_kind_of_broken_record_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    names = ["folder", "link", "latin", "cut", "version", "moved", "whole"]
    write_plan(tmp_path, *names)
    record_path(tmp_path, "folder").mkdir(parents=True)
    for name in names[1:]:
        write_record(tmp_path, record(name))
    record_path(tmp_path, "link").unlink()
    record_path(tmp_path, "link").symlink_to(tmp_path / "nowhere")
    text = record_path(tmp_path, "latin").read_bytes()
    record_path(tmp_path, "latin").write_bytes(text.replace(b"made-up", b"made-\xfcp"))
    record_path(tmp_path, "cut").write_bytes(text[:-20])
    record_path(tmp_path, "version").write_bytes(text.replace(b'"schema_version": 1', b'"schema_version": 2'))
    write_atomically(record_path(tmp_path, "moved"), record("whole").model_dump_json())
    run = read_run(tmp_path)
    assert list(run.records) == ["whole"]
    assert len(run.broken) == 6
    said = dict(message.split(": ", 1) for message in run.broken)
    expected = {
        "folder": "not a trial record: [Errno 21] Is a directory",
        "link": "not a trial record: a link, which is not followed",
        "latin": "not a trial record: Invalid JSON: invalid unicode code point",
        "cut": "not a trial record: Invalid JSON: EOF while parsing",
        "version": "not a trial record: schema_version: Input should be 1",
        "moved": "contains the record of another trial, whole",
    }
    for name, message in expected.items():
        assert said[str(record_path(tmp_path, name))].startswith(message)


def test_trials_that_are_a_file_are_named(tmp_path: Path) -> None:
    write_plan(tmp_path, "abc")
    (tmp_path / "trials").write_text("", encoding="utf-8")
    assert read_run(tmp_path).broken == (f"{tmp_path / 'trials'}: not a folder of trials",)


def test_a_copy_of_a_record_never_replaces_the_record(tmp_path: Path) -> None:
    write_plan(tmp_path, "abc")
    write_record(tmp_path, record("abc", wall_time_s=1.0))
    copy = record_path(tmp_path, "abc-copy")
    write_atomically(copy, record("abc", wall_time_s=2.0).model_dump_json())
    run = read_run(tmp_path)
    assert run.records["abc"].wall_time_s == 1.0
    assert str(copy) in "".join(run.broken)


def test_a_folder_without_a_plan_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("plan.json")):
        read_run(tmp_path)


def test_a_plan_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{path}: not the plan of a run: ") + ".*Is a directory"):
        read_run(tmp_path)
    path.rmdir()
    path.write_bytes(b'{"experiment": "\xff"}')
    with pytest.raises(ValueError, match=re.escape(f"{path}: not the plan of a run: Invalid JSON")):
        read_run(tmp_path)


def test_a_plan_is_read_strictly(tmp_path: Path) -> None:
    write_plan(tmp_path, "abc")
    path = tmp_path / "plan.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"experiment":', '"experimant":'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan\.json: not the plan of a run: experiment: Field required"):
        read_run(tmp_path)
