"""Trials on audio-language models, from the experiment file to the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.model.build import count_parameters
from harness.sweep.preflight import check_models
from harness.trained.export import export_trial
from harness.trained.model import load_trained
from tests.support.audio_language import KINDS, PROMPT, data, each_kind, save
from tests.support.trials import examples_of, run, spec_of

SPECIFIC = {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 6e-3}
PARTS = {**SPECIFIC, "where": {"language": "AF", "audio": "all", "connector": "all"}}
FULL = {"method": "full", "learning_rate": 3e-3, "parts": ["language", "audio", "connector"]}
SECTIONS: dict[str, Any] = {
    "budget": {"examples": 16, "epochs": 2},
    "eval": {"max_new_tokens": 6, "test_examples": 6, "validation_examples": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With recordings, and models that trials name by their relative paths."""
    made = tmp_path_factory.mktemp("trials")
    data(made / "digits", {"train": 16, "validation": 4, "test": 6})
    return made


@each_kind(KINDS, only_first=True)
@pytest.mark.parametrize("adapter", [SPECIFIC, PARTS, FULL], ids=["language", "parts", "full"])
def test_a_trial_learns_and_what_it_learned_can_be_used(kind: str, adapter: dict[str, Any], folder: Path) -> None:
    if not (folder / kind).exists():
        save(kind, folder / kind)
    task = {"name": "speech", "root": "digits"}
    spec = spec_of(folder, adapter, task=task, backbone={"model": kind, "prompt": PROMPT}, **SECTIONS)
    record = run(spec, folder / f"{kind}-{adapter['method']}-{len(adapter)}")
    assert record.status == "finished", record.reason
    assert record.parameters == count_parameters(spec)
    assert record.history[-1].train_loss < record.history[0].train_loss
    run_folder = folder / f"{kind}-{adapter['method']}-{len(adapter)}"
    shown = examples_of(run_folder, record)
    shown = shown[shown.split == "test"].head(3)
    exported = load_trained(export_trial(run_folder / "trials" / record.trial_id, run_folder / "exported"))
    paths = {example.id: example.files[0][1] for example in exported.task.examples("test")}
    texts = exported.predict([{"audio": paths[key]} for key in shown.example_id])
    assert texts == list(shown.prediction)


def test_a_part_that_a_class_does_not_have_is_refused_before_compute(folder: Path) -> None:
    if not (folder / "glmasr").exists():
        save("glmasr", folder / "glmasr")
    wrong = {**PARTS, "where": {"language": "AF", "vision": "all"}}
    task = {"name": "speech", "root": "digits"}
    spec = spec_of(folder, wrong, task=task, backbone={"model": "glmasr"}, **SECTIONS)
    with pytest.raises(UserError, match=r"where: .*vision.*allowed: .*audio"):
        check_models([spec])
