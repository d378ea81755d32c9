"""Trials on vision-language models, from the experiment file to the exported model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.core.errors import UserError
from harness.core.record import TrialRecord
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.build import build, choose_splits, count_parameters
from harness.model.components import make_task
from harness.price.footprint import Footprints
from harness.price.memory import memory_of
from harness.price.rows import rows_of
from harness.price.trace import trace
from harness.sweep.packs import packs_of
from harness.sweep.preflight import check_models
from harness.trained.export import export_trial
from harness.trained.model import load_trained
from harness.trial.engine import Engine
from harness.trial.pack import Wanted, run_pack
from tests.support.parity import assert_same_result
from tests.support.trials import Recorder, examples_of, run, spec_of
from tests.support.vision_language import class_of, save

NONE = {"method": "none", "learning_rate": 1e-2}
SPECIFIC = {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 6e-3}
AGNOSTIC = {**SPECIFIC, "grouping": "agnostic"}
DORA = {"method": "dora", "learning_rate": 3e-3}
FULL = {"method": "full", "learning_rate": 3e-3}
ALL = {"language": "AF", "vision": "all", "connector": "all"}
PARTS = {**SPECIFIC, "where": ALL}
FULL_PARTS = {**FULL, "parts": list(ALL)}
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
    [
        (AGNOSTIC, {}),
        (SPECIFIC, {"connector": "trained"}),
        (FULL, {"connector": "trained"}),
        (FULL, {}),
        (PARTS, {}),
        (FULL_PARTS, {}),
    ],
    ids=["agnostic", "specific", "full_with_connector", "full", "parts", "full_of_parts"],
)
def test_a_trial_learns_and_what_it_learned_can_be_used(
    adapter: dict[str, Any], backbone: dict[str, Any], folder: Path
) -> None:
    name = f"{adapter['method']}-{adapter.get('grouping')}-{bool(backbone)}-{bool({'where', 'parts'} & set(adapter))}"
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


# Pictures or prompts that see themselves as a whole, and features that inner layers add.
@pytest.mark.parametrize(
    "kind", ["gemma3", *(pytest.param(name, marks=pytest.mark.e2e) for name in ("paligemma", "paligemma2", "qwen3_vl"))]
)
@pytest.mark.parametrize("where", ["AF", {"language": "AF", "vision": "all"}], ids=["language", "parts"])
def test_a_trial_of_a_class_with_more_than_embeddings_learns_and_is_used(kind: str, where: Any, tmp_path: Path) -> None:
    save(kind, tmp_path / "model")
    budget = {"budget": {**SECTIONS["budget"], "references": "grouped"}}
    connector = "trained" if class_of(kind).rows else "frozen"
    backbone = {"model": "model", "prompt": "Describe it.", "connector": connector}
    spec = spec_of(tmp_path, {**SPECIFIC, "where": where}, backbone=backbone, **SECTIONS | budget)
    record = run(spec, tmp_path / "run")
    assert record.status == "finished", record.reason
    assert record.parameters == count_parameters(spec)
    assert record.history[-1].train_loss < record.history[0].train_loss
    rows = examples_of(tmp_path / "run", record)
    rows = rows[rows.split == "test"].head(3)
    exported = load_trained(export_trial(tmp_path / "run" / "trials" / record.trial_id, tmp_path / "exported"))
    paths = {example.id: example.files[0][1] for example in exported.task.examples("test")}
    assert exported.predict([{"image": paths[key]} for key in rows.example_id]) == list(rows.prediction)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_trial_on_a_quantised_decoder_is_counted_planned_and_used(folder: Path) -> None:
    plain = spec_of(folder, SPECIFIC, backbone={"model": "model", "prompt": "Describe it."}, **SECTIONS)
    spec, record, run_folder = trial(folder, "nf4", SPECIFIC, quantization="nf4")
    assert record.status == "finished", record.reason
    assert record.trial_id != plain.trial_id
    assert record.parameters == count_parameters(spec) == count_parameters(plain)
    assert record.history[-1].train_loss < record.history[0].train_loss
    splits = choose_splits(spec, make_task(spec))
    found, whole = (Footprints().of(one, splits.train) for one in (spec, plain))
    planned, needed = (memory_of(of.stages[-1], spec, Resources(), of.longest) for of in (found, whole))
    assert record.memory is not None
    assert (planned.weights_bytes, planned.gradients_bytes, planned.optimizer_bytes) == (
        record.memory.weights_bytes, record.memory.gradients_bytes, record.memory.optimizer_bytes,
    )  # fmt: skip
    assert planned.weights_bytes < needed.weights_bytes
    out = export_trial(run_folder / "trials" / record.trial_id, folder / "exported-nf4")
    rows = examples_of(run_folder, record)
    rows = rows[rows.split == "test"].head(3)
    exported = load_trained(out)
    paths = {example.id: example.files[0][1] for example in exported.task.examples("test")}
    assert exported.predict([{"image": paths[key]} for key in rows.example_id]) == list(rows.prediction)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_what_needs_the_weights_of_a_quantised_decoder_is_refused_before_compute(folder: Path) -> None:
    quantised = {"model": "model", "quantization": "int8"}
    for adapter, reason in (
        (FULL, "trains the language model's own weights, which int8 has rounded"),
        (DORA, "no weight"),
    ):
        with pytest.raises(UserError, match=reason):
            check_models([spec_of(folder, adapter, backbone=quantised, **SECTIONS)])
    check_models([spec_of(folder, {**FULL, "parts": ["vision", "connector"]}, backbone=quantised, **SECTIONS)])
    with pytest.raises(
        UserError, match=r"backbone\.quantization: found 'gguf' with backbone.model, .*allowed: nf4, int8"
    ):
        spec_of(folder, SPECIFIC, backbone={"model": "model", "quantization": "gguf"})


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
@pytest.mark.parametrize(
    ("adapter", "backbone"),
    [(SPECIFIC, {"connector": "trained"}), (PARTS, {}), (FULL_PARTS, {})],
    ids=["connector", "parts", "full_of_parts"],
)
def test_a_stopped_trial_goes_on_to_the_same_result(
    adapter: dict[str, Any], backbone: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole, first = trial(folder, f"whole-{tmp_path.name}", adapter, **backbone)
    taken = 0
    step = Engine.train_step

    def counted(engine: Engine, batch: Any) -> float:
        nonlocal taken
        taken += 1
        return step(engine, batch)

    monkeypatch.setattr(Engine, "train_step", counted)
    again = tmp_path / "again"
    assert run(spec, again, stop=lambda: taken == 3).status == "cancelled"
    resumed = run(spec, again)
    assert_same_result(resumed, again, whole, first)


@pytest.mark.parametrize("adapter", [PARTS, FULL_PARTS], ids=["parts", "full_of_parts"])
def test_a_step_with_the_tower_is_foretold(adapter: dict[str, Any], folder: Path) -> None:
    spec = spec_of(folder, adapter, backbone={"model": "model", "prompt": "Describe it."}, **SECTIONS)
    rows = rows_of(spec, None)
    (traced,) = trace(spec, rows.first)
    alone = spec_of(folder, SPECIFIC, backbone={"model": "model", "prompt": "Describe it."}, **SECTIONS)
    (other,) = trace(alone, rows_of(alone, None).first)
    counted = count_parameters(spec)
    assert traced.trained == counted.trainable
    assert traced.weights == counted.total
    assert traced.step_flops > other.step_flops
    assert traced.activations_bytes > other.activations_bytes
    known, splits = Footprints(), choose_splits(spec, make_task(spec))
    (of_other,), (of_tower,) = (known.of(one, splits.train).stages for one in (alone, spec))  # of one plan, in turn
    assert (of_tower.trained, of_other.trained) == (traced.trained, other.trained)
    assert of_tower.step_flops > of_other.step_flops


def test_a_step_that_depends_on_pictures_is_not_foretold(tmp_path: Path) -> None:
    save("qwen2_vl", tmp_path / "model")
    spec = spec_of(tmp_path, PARTS, backbone={"model": "model"}, **SECTIONS)
    with pytest.raises(UserError, match=r"a step of Qwen2VLModel takes with its tower in it depends on its inputs"):
        trace(spec, rows_of(spec, None).first)


def test_trials_with_the_tower_in_the_step_are_packed_apart(folder: Path) -> None:
    adapters = [PARTS, {**PARTS, "rank": 3}, SPECIFIC, AGNOSTIC]
    planned = [
        (spec := spec_of(folder, one, backbone={"model": "model"}, **SECTIONS), SimpleNamespace(trial_id=spec.trial_id))
        for one in adapters
    ]
    packs: Any = packs_of(planned, Resources(pack=4), 0.0, 1)  # type: ignore[arg-type]
    assert [[spec.trial_id for spec, _ in pack] for pack in packs] == [
        [spec.trial_id for spec, _ in planned[:2]], [spec.trial_id for spec, _ in planned[2:]]
    ]  # fmt: skip


def test_packed_trials_with_towers_are_as_alone(folder: Path) -> None:
    specs = [
        spec_of(folder, {**PARTS, "rank": rank}, backbone={"model": "model", "prompt": "Describe it."}, **SECTIONS)
        for rank in (2, 3)
    ]
    alone = [run(spec, folder / "alone") for spec in specs]
    wanted = [Wanted(spec, Recorder(), lambda _: None) for spec in specs]
    packed = run_pack(wanted, "unit", folder / "packed", Resources(pack=2))
    for one, other in zip(packed, alone, strict=True):
        assert one.status == other.status == "finished"
        assert one.pack is not None
        assert one.pack.model_dump() == {"members": 2, "alone": None}
        losses = [[epoch.train_loss for epoch in record.history] for record in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_group_starts_from_the_tower_of_another_trial(folder: Path) -> None:
    """VeRA also draws frozen weights, which must be those of the other trial."""
    vera = {"method": "vera", "rank": 4, "where": ALL, "grouping": "specific", "learning_rate": 1e-2}
    _, record, run_folder = trial(folder, "vera", vera)
    source = run_folder / "trials" / record.trial_id
    spec = spec_of(folder, {**vera, "init_from": {"image": str(source)}}, backbone={"model": "model"}, **SECTIONS)
    adapters = dict(build(spec, torch.device("cpu")).model.adapters.named_parameters())
    saved = {
        name.removeprefix("adapters."): x for name, x in load_file(source / "best.safetensors").items()
        if "group_image" in name
    }  # fmt: skip
    assert any("vision_tower" in name for name in saved)
    for name, x in saved.items():
        assert torch.equal(adapters[name], x)
