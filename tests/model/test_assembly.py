"""``init_from``: groups of two trained trials in a third one, bit for bit; mismatches are errors before any compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from harness.core.errors import UserError
from harness.core.record import MetricInfo, TrialRecord, read_record, write_record
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, describe, expand
from harness.experiment.sections import Evaluation
from harness.model import assembly
from harness.model.build import Built, build, empty_model
from harness.model.components import empty_encoders
from harness.sweep.preflight import check_models
from harness.trial.engine import load_weights
from harness.trial.evaluate import Evaluator
from tests.support.trials import run, scored_by, spec_of

CPU = torch.device("cpu")
SIZES = {"train_examples": 8, "validation_examples": 4, "test_examples": 4}
SCENES, TRENDS = {"name": "scenes", **SIZES}, {"name": "trends", **SIZES}
MIXTURE = {"name": "mixture", "tasks": [SCENES, TRENDS]}
LORA: dict[str, Any] = {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 6e-3}
SECTIONS: dict[str, Any] = {"budget": {"examples": "all", "epochs": 2}, "eval": {"max_new_tokens": 4}}


def made(folder: Path, task: Any, adapter: Any = LORA, **sections: Any) -> TrialSpec:
    """The specs of an experiment with the stand-in metric for every task."""
    spec = spec_of(folder, adapter, metric="", task=task, **(SECTIONS | sections))
    return scored_by(spec)


def assembled(folder: Path, init_from: Any, task: Any = MIXTURE, adapter: Any = LORA, **sections: Any) -> TrialSpec:
    return made(folder, task, {**adapter, "init_from": init_from}, **sections)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "best.safetensors")


def save_as_finished(spec: TrialSpec, run_folder: Path) -> Path:
    """Save a model that was built but not trained as a finished trial; returns its folder."""
    folder = run_folder / "trials" / spec.trial_id
    folder.mkdir(parents=True)
    model = empty_model(spec, empty_encoders(spec)).to_empty(device="cpu")
    tensors = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    safetensors.torch.save_file(tensors, folder / "best.safetensors")
    record = TrialRecord(
        trial_id=spec.trial_id, experiment="unit", status="finished", spec=spec.model_dump(mode="json"), seed=spec.seed,
        wall_time_s=1.0, started_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    write_record(run_folder, record)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two trained trials: images and series."""
    folder = tmp_path_factory.mktemp("sources")
    found = []
    for task in (SCENES, TRENDS):
        spec = made(folder, task)
        record = run(spec, folder)
        assert record.status == "finished", record.reason
        found.append(folder / "trials" / spec.trial_id)
    return found[0], found[1]


@pytest.fixture
def copy(sources: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the image trial's folder, to be modified."""
    return Path(shutil.copytree(sources[0], tmp_path / "elsewhere" / "copy"))


@pytest.fixture(scope="module")
def init_from(sources: tuple[Path, Path]) -> dict[str, str]:
    scenes, trends = map(str, sources)
    return {"image": scenes, "series": trends, "text": scenes}


@pytest.fixture(scope="module")
def built(init_from: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(assembled(tmp_path_factory.mktemp("assembled"), init_from), CPU)


# ── What is loaded


def test_groups_and_projectors_are_the_trained_ones_bit_for_bit(built: Built, sources: tuple[Path, Path]) -> None:
    scenes, trends = map(weights, sources)
    for name, p in built.model.named_parameters():
        if p.requires_grad:
            source = trends if "series" in name else scenes
            assert torch.equal(p, source[name]), name
            assert p.abs().max() > 0


def test_groups_without_a_source_are_initialised_as_usual(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """Also if the group has another name in the source; its projector is loaded too."""
    adapter = {**LORA, "grouping": {"image": "vision", "series": "series", "text": "text"}}
    origin = {"vision": {"trial": str(sources[0]), "group": "image"}}
    model = build(assembled(tmp_path, origin, adapter=adapter), CPU).model
    fresh = dict(build(made(tmp_path, MIXTURE, adapter), CPU).model.named_parameters())
    scenes, taken = weights(sources[0]), 0
    for name, p in model.named_parameters():
        if "group_vision" in name or name.startswith("projectors.image."):
            taken += 1
            assert torch.equal(p, scenes[name.replace("group_vision", "group_image")]), name
        else:
            assert torch.equal(p, fresh[name]), name
    assert taken == sum("image" in name for name in scenes)


def test_groups_that_differ_are_assembled_of_trials_of_different_methods(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """LoRA of rank 3 comes first, so that of rank 2 has another name here than in its own trial."""
    (tmp_path / "bitfit").mkdir()
    bitfit = save_as_finished(made(tmp_path / "bitfit", SCENES, {"method": "bitfit", "learning_rate": 1e-2}), tmp_path)
    lora = {"method": "lora", "rank": 2}
    groups = {"image": {"method": "lora", "rank": 3}, "series": lora, "text": {"method": "bitfit"}}
    entry = {"groups": groups, "learning_rate": 1e-2}
    origin = {"series": str(sources[1]), "text": {"trial": str(bitfit), "group": "all"}}
    spec = made(tmp_path, MIXTURE, {**entry, "init_from": origin})
    model, trends = build(spec, CPU).model, weights(sources[1])
    loaded = {name: p for name, p in model.named_parameters() if "group_series" in name}
    assert len(loaded) == len([name for name in trends if "group_series" in name])
    for name, p in loaded.items():
        assert torch.equal(p, trends[name.replace("changes.lora_2.", "changes.lora.")]), name
    assert not any(p.any() for name, p in model.named_parameters() if "group_text" in name)  # saved as zeros
    with pytest.raises(UserError, match=r"init_from\.image: .*different options: rank=2 \(here 3\)"):
        made(tmp_path, MIXTURE, {**entry, "init_from": {"image": str(sources[0])}})
    with pytest.raises(UserError, match=r"init_from\.text: .*trained with method lora; allowed: bitfit"):
        made(tmp_path, MIXTURE, {**entry, "init_from": {"text": str(sources[0])}})


def test_a_shared_group_is_initialised_from_a_trial_with_one_group(sources: tuple[Path, Path], tmp_path: Path) -> None:
    stacked = {**LORA, "grouping": "shared+specific"}
    origin = {"shared": {"trial": str(sources[0]), "group": "image"}, "text": str(sources[0])}
    model, scenes = build(made(tmp_path, SCENES, {**stacked, "init_from": origin}), CPU).model, weights(sources[0])
    for name, p in model.named_parameters():
        if p.requires_grad and "group_image" not in name and not name.startswith("projectors."):
            assert torch.equal(p, scenes[name.replace("group_shared", "group_image")]), name


def test_images_are_described_as_in_the_source_trial(built: Built, sources: Any, tmp_path: Path) -> None:
    source, fresh = build(made(tmp_path, SCENES), CPU), build(made(tmp_path, MIXTURE), CPU)
    load_weights(sources[0] / "best.safetensors", {n: p for n, p in source.model.named_parameters() if p.requires_grad})
    nll = {}
    for name, one in (("source", source), ("assembled", built), ("fresh", fresh)):
        one.model.eval()
        examples = sorted((e for e in one.splits.test if e.member in {"", "scenes"}), key=lambda e: e.id)
        nll[name] = Evaluator(one.model, one.batches, Evaluation(), CPU).likelihood(examples).nll
        assert len(nll[name]) == 4
    np.testing.assert_allclose(nll["assembled"], nll["source"], rtol=1e-6)
    assert not np.allclose(nll["fresh"], nll["source"], rtol=1e-2)


def test_training_continues_from_the_sources_and_the_record_has_their_digests(
    init_from: dict[str, str], sources: Any, tmp_path: Path
) -> None:
    spec = assembled(tmp_path, init_from)
    record = run(spec, tmp_path)
    assert record.status == "finished", record.reason
    scenes, trends = map(weights, sources)
    trained = weights(tmp_path / "trials" / record.trial_id)
    for name, tensor in trained.items():
        source = (trends if "series" in name else scenes)[name]
        assert not torch.equal(tensor, source), name
        if "lora_A" in name:  # initialised with large values, and changed little by training
            assert (tensor - source).norm() < source.norm(), name
    origins = read_record(tmp_path / "trials" / record.trial_id / "record.json").spec["adapter"]["init_from"]
    assert {group: (origin["trial"], origin["group"]) for group, origin in origins.items()} == {
        group: (folder, group) for group, folder in init_from.items()
    }
    assert [origins[group]["projectors"] for group in init_from] == [["image"], ["series"], []]
    assert record.spec["adapter"]["label"] == "LoRA r=2 assembled"


# ── Which trial it is


def test_the_trial_id_depends_on_the_weights_and_not_on_the_folder(
    sources: tuple[Path, Path], copy: Path, tmp_path: Path
) -> None:
    scenes = sources[0]
    ids = [assembled(tmp_path, {"image": str(folder)}).trial_id for folder in (scenes, copy)]
    assert ids[0] == ids[1]
    tensors = weights(copy)
    next(iter(tensors.values())).add_(1)
    safetensors.torch.save_file(tensors, copy / "best.safetensors")
    other = assembled(tmp_path, {"image": str(copy)}).trial_id
    text = assembled(tmp_path, {"image": {"trial": str(scenes), "group": "text"}}).trial_id
    assert len({ids[0], other, text, made(tmp_path, MIXTURE).trial_id}) == 4


def test_the_leaderboard_has_separate_rows_with_and_without_init_from(
    sources: tuple[Path, Path], experiment_file: Callable[[str], Path]
) -> None:
    """An axis of three: without sources, with the image group, with both groups."""
    given = [None, {"image": str(sources[0])}, {"image": str(sources[0]), "series": str(sources[1])}]
    path = experiment_file(yaml.safe_dump({"task": MIXTURE, "adapters": [{**LORA, "init_from": given}]}))
    specs = expand(Experiment.from_yaml(path))
    perplexity = MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False)
    labels = [trial.label for trial in describe(Experiment.from_yaml(path), specs, (perplexity,), "").trials]
    image, series = (
        f"{group}={folder.name}:{group}" for group, folder in zip(("image", "series"), sources, strict=True)
    )
    assert labels == [
        "LoRA r=2",
        f"LoRA r=2 assembled init_from={image}",
        f"LoRA r=2 assembled init_from={image}, {series}",
    ]


# ── Wrong input, when the experiment is read


@pytest.mark.parametrize(
    ("init_from", "reason"),
    [
        ("SCENES", r"init_from: found '.*'; allowed: group → folder of a finished trial"),
        ({}, r"init_from: found {}; allowed: group → folder"),
        ({"image": 3}, r"init_from\.image: found 3; allowed: a trial's folder, or trial and group"),
        ({"imge": "SCENES"}, r"init_from\.imge: no such adapter group; allowed: image, series, text; did you mean 'im"),
        ({"image": {"trial": "SCENES", "grup": "a"}}, r"image\.grup: unknown key 'grup'; .*did you mean 'group'"),
        ({"image": {"trial": "SCENES", "group": "imag"}}, r"no adapter group 'imag'; allowed: image, text; did you"),
        ({"series": "SCENES"}, r"init_from\.series: .*: that trial has no adapter group 'series'; allowed: im"),
        ({"image": "nowhere"}, r"init_from\.image: /.*/nowhere: contains no trial record; allowed: <run"),
        ({"image": "RUN"}, r"contains no trial record; this run has /.*/trials/\w{12}, /"),
    ],
)  # fmt: skip
def test_an_invalid_init_from_is_an_error_with_its_location(
    init_from: Any, reason: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    text = json.dumps(init_from).replace("SCENES", str(sources[0])).replace("RUN", str(sources[0].parent.parent))
    with pytest.raises(UserError, match=rf"experiment.yaml, line \d+, adapters\[0\]\..*{reason}"):
        assembled(tmp_path, json.loads(text))


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({**LORA, "rank": 3, "dropout": 0.1}, r"different options: rank=2 \(here 3\), dropout=0.0 \(here 0.1\)"),
        ({"method": "dora", "grouping": "specific", "learning_rate": 1.0}, "method lora; allowed: dora"),
        ({"method": "full", "learning_rate": 1.0}, "init_from: full has no adapter groups"),
    ],
)  # fmt: skip
def test_another_method_or_other_options_are_errors(adapter: Any, reason: str, sources: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        assembled(tmp_path, {"image": str(sources[0])}, adapter=adapter)


def test_an_unfinished_or_broken_trial_is_an_error(copy: Path, tmp_path: Path) -> None:
    record = read_record(copy / "record.json")
    old = record.model_copy(update={"spec": {"adapter": {"method": "lora"}}})
    (copy / "record.json").write_text(old.model_dump_json())
    with pytest.raises(UserError, match=r"record.json: .* incompatible version"):
        assembled(tmp_path, {"image": str(copy)})
    (copy / "record.json").write_text(record.model_dump_json())
    (copy / "best.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"best.safetensors: cannot be read: "):
        assembled(tmp_path, {"image": str(copy)})
    (copy / "best.safetensors").unlink()
    with pytest.raises(UserError, match=r"best.safetensors: no such file"):
        assembled(tmp_path, {"image": str(copy)})
    failed = record.model_copy(update={"status": "failed", "reason": "lightning"})
    (copy / "record.json").write_text(failed.model_dump_json())
    with pytest.raises(UserError, match=r"the trial is failed \(lightning\); allowed: a finished trial"):
        assembled(tmp_path, {"image": str(copy)})
    (copy / "record.json").write_text("{}")
    with pytest.raises(UserError, match=r"record.json: not a trial record"):
        assembled(tmp_path, {"image": str(copy)})


# ── Wrong input, before a trial is started


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ({"language_model": "OTHER"}, r"language_model='/.*' \(here 'builtin/tiny-llama'\)"),
        ({"encoders": {"image": "OTHER"}}, r"encoders.image='/.*' \(here 'builtin/tiny-vision'\)"),
        ({"projector": "mlp", "projector_positions": 16},
         r"projector='mlp' \(here 'linear'\), projector_positions=16 \(here None\)"),
        ({"roles": {"x": "q"}}, r"roles={'x': 'q'} \(here None\)"),
    ],
)  # fmt: skip
def test_another_backbone_is_an_error_with_both_values(
    there: dict[str, Any], reason: str, copy: Path, tmp_path: Path
) -> None:
    content = json.loads((copy / "record.json").read_text())
    content["spec"]["backbone"] |= json.loads(json.dumps(there).replace("OTHER", str(tmp_path)))
    content["spec"]["fingerprints"] = {}  # of other weights: names of one fingerprint are names of the same
    (copy / "record.json").write_text(json.dumps(content))
    spec = assembled(tmp_path, {"image": str(copy)}, SCENES)
    with pytest.raises(UserError, match=rf"adapters: LoRA r=2 assembled: init_from.image: .*options: {reason}"):
        check_models([spec])


@pytest.mark.parametrize("key", ["language_model", "encoders.image"])
def test_other_weights_of_the_same_backbone_are_an_error(key: str, copy: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "record.json").read_text())
    content["spec"]["fingerprints"][key] = f"sha256:{'0' * 64}"
    (copy / "record.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"init_from\.image: .*other weights of backbone\.{key} \(0{{12}}, "):
        check_models([assembled(tmp_path, {"image": str(copy)}, SCENES)])


def test_the_encoder_and_projector_do_not_matter_to_a_group_of_text(copy: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "record.json").read_text())
    content["spec"]["backbone"] |= {"projector": "mlp", "encoders": {"image": "another"}}
    content["spec"]["fingerprints"].pop("encoders.image")
    (copy / "record.json").write_text(json.dumps(content))
    check_models([assembled(tmp_path, {"text": str(copy)}, SCENES)])
    with pytest.raises(UserError, match=r"different options: encoders\.image="):
        check_models([assembled(tmp_path, {"image": str(copy)}, SCENES)])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop(next(n for n in tensors if "group_image" in n)),
         r"missing: adapters.layers\S+ \(1 tensors\)"),
        (lambda tensors: tensors.update({"projectors.image.more": torch.zeros(1)}),
         r"unexpected: projectors.image.more"),
        (lambda tensors: tensors.update({"projectors.image.layers.1.bias": torch.zeros(5)}),
         r"projectors.image.layers.1.bias has shape \(5,\); allowed: \(96,\)"),
    ],
)  # fmt: skip
def test_missing_unexpected_and_reshaped_tensors_are_errors(
    change: Any, reason: str, copy: Path, tmp_path: Path
) -> None:
    tensors = weights(copy)
    change(tensors)
    safetensors.torch.save_file(tensors, copy / "best.safetensors")
    with pytest.raises(UserError, match=rf"init_from.image: .*best.safetensors: {reason}"):
        check_models([assembled(tmp_path, {"image": str(copy)}, SCENES)])


def test_weights_that_changed_since_the_plan_are_not_loaded(sources: Any, copy: Path, tmp_path: Path) -> None:
    spec = assembled(tmp_path, {"image": str(copy)}, SCENES)
    shutil.copy(sources[1] / "best.safetensors", copy / "best.safetensors")
    with pytest.raises(UserError, match=r"best.safetensors: the weights have changed"):
        build(spec, CPU)


@pytest.mark.parametrize(
    ("adapter", "seed", "reason"),
    [
        ({"method": "moka", "rank": 2}, 0, r"moka: all groups share \S*lora_B"),
        ({"method": "lora+full", "rank": 2}, 0, "full trains the language model itself"),
        ({"method": "vera", "rank": 4}, 1, r"frozen weights from the seed \(shared.\S+\), .* seed 0; allowed: .* 1"),
        ({"method": "vera", "rank": 4}, 0, None),
        ({"method": "soft_prompt"}, 1, None),
        ({"method": "lora+bitfit", "rank": 2}, 1, None),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_methods_whose_groups_share_weights_are_refused(
    adapter: Any, seed: int, reason: str | None, tmp_path: Path
) -> None:
    adapter = {"grouping": "specific", "learning_rate": 1.0, **adapter}
    source = save_as_finished(made(tmp_path, SCENES, adapter), tmp_path / "source")
    spec = assembled(tmp_path, {"image": str(source)}, SCENES, adapter, seeds=[seed])
    if reason is not None:
        with pytest.raises(UserError, match=rf"adapters: .* assembled: init_from.image: .*{reason}"):
            check_models([spec.model_copy(update={"seed": 0}), spec] if seed else [spec])
        return
    check_models([spec])
    model = build(spec, CPU).model
    taken = [p for name, p in model.named_parameters() if "group_image" in name]
    assert taken
    assert all(not p.any() for p in taken)  # the saved values
    assert any(p.any() for name, p in model.named_parameters() if "group_text" in name)


def test_frozen_weights_must_equal_those_of_the_source_trial(tmp_path: Path) -> None:
    """With a bottleneck beside it, VeRA's projections depend on how many groups were drawn before."""
    adapter = {**LORA, "method": "bottleneck+vera", "bottleneck_size": 2}
    source = save_as_finished(made(tmp_path, SCENES, adapter), tmp_path / "source")
    spec = assembled(tmp_path, {"image": str(source)}, adapter=adapter)
    with pytest.raises(UserError, match=r"frozen weights that bottleneck\+vera drew differ here \(shared.\S*vera_A\)"):
        assembly.load(spec, build(made(tmp_path, MIXTURE, adapter), CPU).model)
    same = assembled(tmp_path, {"image": str(source)}, task=SCENES, adapter=adapter)
    assembly.load(same, build(made(tmp_path, SCENES, adapter), CPU).model)
