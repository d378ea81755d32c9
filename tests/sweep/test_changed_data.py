"""Data that change under their name are seen by a run, also by one that has nothing left to do."""

from __future__ import annotations

import json
from pathlib import Path

import harness
from harness.experiment.plan import TrialSpec, expand
from harness.model.budget import content_fingerprint
from harness.model.build import choose_splits
from harness.model.components import make_task
from harness.model.inputs import Inputs
from harness.sweep.changed_data import changes, state_of_data
from tests.support.runs import fake_plan, fake_record

SPLITS = ("train", "validation", "test")


def write(folder: Path, split: str, word: str) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": f"{split} {n}?", "completion": f" {word} {n}."}) for n in range(4)]
    (folder / f"{split}.jsonl").write_text("\n".join(lines))


def planned(folder: Path) -> list[TrialSpec]:
    for split in SPLITS:
        write(folder / "runs's data", split, "it is")
    files = {split: f"{split}.jsonl" for split in SPLITS[1:]}
    experiment = harness.Experiment(
        name="grid", task={"name": "text", "root": str(folder / "runs's data"), **files}, seeds=(0, 1),
        adapters=[{"method": "none", "learning_rate": 1e-2}],
    )  # fmt: skip
    return expand(experiment)


def test_what_changed_is_said_with_its_task(tmp_path: Path) -> None:
    specs = planned(tmp_path)
    splits, digest = choose_splits(specs[0], make_task(specs[0])), Inputs(tmp_path).digest
    record = fake_record(fake_plan().trials[0], 1, 0.5)
    assert record.data is not None
    data = record.data.model_copy(
        update={
            "examples_fingerprint": content_fingerprint(splits.train, digest),
            "evaluation_fingerprint": content_fingerprint([*splits.validation, *splits.test], digest),
        }
    )
    records = {spec.trial_id: record.model_copy(update={"data": data}) for spec in specs}
    assert changes(specs, records, tmp_path) == []
    write(tmp_path / "runs's data", "test", "it was")
    (line,) = changes(specs, records, tmp_path)
    assert line.startswith(
        "task text: the data have changed under their name since trials finished (2 of this run): eval"
    )
    assert "training" not in line
    write(tmp_path / "runs's data", "train", "it was")
    assert "training examples and evaluation examples differ" in changes(specs, records, tmp_path)[0]
    assert changes(specs, {}, tmp_path) == []


def test_a_file_that_was_written_again_is_another_state(tmp_path: Path) -> None:
    specs = planned(tmp_path)
    before = list(state_of_data(specs, tmp_path / "runs"))
    assert len(before) == len(SPLITS)
    assert before == list(state_of_data(specs, tmp_path / "runs"))
    write(tmp_path / "runs's data", "validation", "it is")
    assert before != list(state_of_data(specs, tmp_path / "runs"))


def test_the_run_folder_in_a_folder_of_data_is_no_data(tmp_path: Path) -> None:
    specs = planned(tmp_path)
    before = list(state_of_data(specs, tmp_path / "runs's data" / "runs"))
    (tmp_path / "runs's data" / "runs" / "grid").mkdir(parents=True)
    (tmp_path / "runs's data" / "runs" / "grid" / "settled.json").touch()
    assert before == list(state_of_data(specs, tmp_path / "runs's data" / "runs"))
