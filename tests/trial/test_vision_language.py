"""Trials on vision-language models, from the experiment file to the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.record import TrialRecord
from harness.experiment.plan import TrialSpec
from harness.model.build import count_parameters
from harness.price.rows import rows_of
from harness.price.trace import trace
from harness.trained.export import export_trial
from harness.trained.model import load_trained
from harness.trial.engine import Engine
from tests.support.parity import assert_same_result
from tests.support.trials import examples_of, run, spec_of
from tests.support.vision_language import save

NONE = {"method": "none", "learning_rate": 1e-2}
SPECIFIC = {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 6e-3}
AGNOSTIC = {**SPECIFIC, "grouping": "agnostic"}
FULL = {"method": "full", "learning_rate": 3e-3}
SECTIONS: dict[str, Any] = {"budget": {"examples": 16, "epochs": 2}, "eval": {"max_new_tokens": 6, "test_examples": 6}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a saved model, whose trials name it by its relative path."""
    made = tmp_path_factory.mktemp("trials")
    save("llava", made / "model")
    return made


def trial(folder: Path, name: str, adapter: dict[str, Any], **backbone: Any) -> tuple[TrialSpec, TrialRecord, Path]:
    spec = spec_of(folder, adapter, backbone={"model": "model", "prompt": "Describe it.", **backbone}, **SECTIONS)
    return spec, run(spec, folder / name), folder / name


@pytest.mark.parametrize(
    ("adapter", "backbone"),
    [(AGNOSTIC, {}), (SPECIFIC, {"connector": "trained"}), (FULL, {"connector": "trained"}), (FULL, {})],
    ids=["agnostic", "specific", "full_with_connector", "full"],
)
def test_a_trial_learns_and_what_it_learned_can_be_used(
    adapter: dict[str, Any], backbone: dict[str, Any], folder: Path
) -> None:
    name = f"{adapter['method']}-{adapter.get('grouping')}-{bool(backbone)}"
    spec, record, run_folder = trial(folder, name, adapter, **backbone)
    assert record.status == "finished"
    assert record.parameters == count_parameters(spec)
    assert record.history[-1].train_loss < record.history[0].train_loss
    found = examples_of(run_folder, record)
    exported = load_trained(export_trial(run_folder / "trials" / record.trial_id, folder / f"exported-{name}"))
    shown = found[found.split == "test"].head(3)
    paths = {example.id: example.files[0][1] for example in exported.task.examples("test")}
    assert not (folder / f"exported-{name}" / "adapter").exists()
    texts = exported.predict([{"image": paths[key]} for key in shown.example_id])
    assert texts == list(shown.prediction)


def test_a_trial_without_an_adapter_trains_the_connector(folder: Path) -> None:
    spec, record, _ = trial(folder, "none", NONE, connector="trained")
    assert record.status == "finished"
    assert record.parameters is not None
    assert record.parameters.trainable == record.parameters.projector > 0
    assert record.history[-1].train_loss < record.history[0].train_loss
    rows = rows_of(spec, None)
    assert rows.longest >= rows.first.token_ids_BT.shape[1]
    for _ in range(2):  # a model is built without values again for each method of a plan
        (traced,) = trace(spec, rows.first)
        assert traced.trained == record.parameters.trainable


def test_an_export_in_a_form_that_names_layers_is_refused(folder: Path) -> None:
    _, record, run_folder = trial(folder, "agnostic", AGNOSTIC)
    with pytest.raises(UserError, match="whose layers have other names outside a trial; allowed: an export without"):
        export_trial(run_folder / "trials" / record.trial_id, folder / "merged", merge=True)
    assert not (folder / "merged").exists()


@pytest.mark.e2e
def test_a_stopped_trial_goes_on_to_the_same_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, whole, _ = trial(folder, "whole", SPECIFIC, connector="trained")
    taken = 0
    step = Engine.train_step

    def counted(engine: Engine, batch: Any) -> float:
        nonlocal taken
        taken += 1
        return step(engine, batch)

    monkeypatch.setattr(Engine, "train_step", counted)
    again = folder / "again"
    assert run(spec, again, stop=lambda: taken == 3).status == "cancelled"
    resumed = run(spec, again)
    assert_same_result(resumed, again, whole, folder / "whole")
