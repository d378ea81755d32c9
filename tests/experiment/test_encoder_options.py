"""What an experiment says of an encoder beside its name: read, named, planned, trained, kept apart, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import harness
from harness.core.columns import options_of
from harness.core.errors import UserError
from harness.core.naming import settings
from harness.core.record import TrialRecord
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.model.build import choose_splits, count_parameters
from harness.model.components import make_task
from harness.price.disk import FeatureSpace
from harness.trial.log import LOG
from tests.support.trials import LORA, TASK, examples_of, run, scored_by, spec_of
from tests.support.vision import FAMILIES, save

CHOSEN = {"layer": -2, "select_strategy": "default", "pooling": "2x2", "dtype": "bf16"}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    save(FAMILIES["vit"], folder)
    return str(folder)


def specs_of(encoder: Any, **backbone: Any) -> list[TrialSpec]:
    return expand(Experiment(task=TASK, backbone={"encoders": {"image": encoder}, **backbone}, adapters=[LORA]))


def test_the_name_and_the_options_of_an_encoder_are_in_one_place(vit: str) -> None:
    (spec,) = specs_of({"model": vit, **CHOSEN})
    assert spec.backbone.encoders == {"image": vit}
    assert spec.backbone.encoder_options == {"image": CHOSEN}
    assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec
    assert options_of(spec.model_dump(mode="json"))["backbone.encoders.image.layer"] == -2


def test_defaults_change_no_id_and_everything_else_does(vit: str) -> None:
    (plain,) = specs_of(vit)
    assert "encoder_options" not in plain.backbone.model_dump()
    defaults = {"layer": None, "select_strategy": "full", "pooling": None, "dtype": "fp32"}
    assert [spec.trial_id for spec in specs_of({"model": vit, **defaults})] == [plain.trial_id]
    others = [spec.trial_id for key, value in CHOSEN.items() for spec in specs_of({"model": vit, key: value})]
    assert len({plain.trial_id, *others}) == 5


def test_each_option_is_an_axis_and_names_its_settings(vit: str) -> None:
    specs = specs_of({"model": vit, "layer": [None, -2], "pooling": ["2x2", "1x1"]})
    named = settings({spec.trial_id: spec.model_dump(mode="json") for spec in specs})
    assert list(named.values()) == ["pooling=2x2", "pooling=1x1", "pooling=2x2 layer=-2", "pooling=1x1 layer=-2"]
    mixed = specs_of(["builtin/tiny-vision", {"model": vit, "layer": -2}])
    assert [spec.backbone.encoder_options for spec in mixed] == [{}, {"image": {"layer": -2}}]


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (
            {"model": "./vit", "layr": -2},
            r"backbone\.encoders\.image\.layr: unknown key 'layr'; .*did you mean 'layer'",
        ),
        ({"model": "./vit", "layer": "last"}, r"backbone\.encoders\.image\.layer: .*integer; found 'last'"),
        ({"model": "./vit", "pooling": "4"}, r"backbone\.encoders\.image\.pooling: .*found '4'"),
        ({"model": "./vit", "pooling": "0x4"}, r"backbone\.encoders\.image\.pooling: .*found '0x4'"),
        ({"model": "./vit", "dtype": "fp16"}, r"backbone\.encoders\.image\.dtype: .*'bf16'.*found 'fp16'"),
        ({"model": "./vit", "select_strategy": "cls"}, r"image\.select_strategy: .*'full' or 'default'; found 'cls'"),
        ({"layer": -2}, r"backbone\.encoders\.image\.model: this key is required; allowed: a folder or a hub id"),
        ({"model": "builtin/tiny-vision", "layer": 0}, r"image\.layer: 'builtin/tiny-vision' has no options; allowed:"),
    ],
)
def test_wrong_options_are_refused_with_their_key(encoder: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        specs_of(encoder)


def test_options_of_recordings_are_those_of_recordings() -> None:
    with pytest.raises(UserError, match=r"backbone\.encoders\.audio\.pooling: unknown key 'pooling'; .*layer"):
        Experiment(
            task={"name": "speech", "root": "."},
            backbone={"encoders": {"audio": {"model": "./whisper", "pooling": "2x2"}}},
            adapters=[LORA],
        )


def test_the_field_of_specs_is_no_key_of_experiments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone\.encoder_options: unknown key; .*did you mean 'encoders'"):
        Experiment(task=TASK, backbone={"encoder_options": {"image": CHOSEN}}, adapters=[LORA])


def test_a_layer_that_is_not_there_is_refused_before_compute(vit: str) -> None:
    (spec,) = specs_of({"model": vit, "layer": 12})
    with pytest.raises(UserError, match=r"^backbone\.encoders\.image: layer: found 12; allowed: -3 to 2, one of its"):
        count_parameters(spec)


def trial(folder: Path, cache: Path, encoder: Any) -> tuple[TrialSpec, TrialRecord, str]:
    """A trial with its log."""
    spec = spec_of(folder, budget={"examples": 16, "epochs": 1}, backbone={"encoders": {"image": encoder}})
    record = run(spec, folder, feature_cache=str(cache))
    assert record.status == "finished", record.reason
    return spec, record, (folder / "trials" / record.trial_id / LOG).read_text(encoding="utf-8")


@pytest.mark.e2e
def test_a_trial_trains_on_the_features_asked_for_and_writes_the_same_texts_elsewhere(vit: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    spec, record, log = trial(tmp_path, cache, {"model": vit, **CHOSEN})
    assert "features of image: 40 of 40 files encoded" in log
    assert record.parameters is not None
    assert record.parameters.projector == 32 * 96 + 96
    written = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    task, space = make_task(spec), FeatureSpace()
    task.prepare()
    space.add(spec, choose_splits(spec, task))
    assert space.size_bytes == 40 * 4 * 32 * 2, "four tokens in bf16"
    assert space.size_bytes < written < 2 * space.size_bytes
    # Every option is another encoder to the cache, and nothing else is.
    for changed in ({"dtype": "fp32"}, {"layer": -1}):
        assert "features of image: 40 of 40 files" in trial(tmp_path, cache, {"model": vit, **CHOSEN, **changed})[2]
    exported = harness.export_trial(tmp_path / "trials" / record.trial_id, tmp_path / "out")
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert f"| encoder of image | {vit}, layer=-2, dtype=bf16, select_strategy=default, pooling=2x2 |" in card
    tested = examples_of(tmp_path, record).query("split == 'test'")
    pictures = [json.loads(inputs)[0][2] for inputs in tested.inputs]
    trained = harness.load_trained(exported)
    assert trained.predict([{"image": path} for path in pictures]) == tested.prediction.tolist()


def test_a_projector_of_other_features_is_not_loaded(vit: str, tmp_path: Path) -> None:
    _, record, _ = trial(tmp_path, tmp_path / "cache", {"model": vit, "layer": -2})
    source = str(tmp_path / "trials" / record.trial_id)
    content = {
        "task": TASK,
        "backbone": {"encoders": {"image": {"model": vit, "layer": 1, "pooling": "2x2"}}},
        "adapters": [LORA | {"init_from": {"image": source}}],
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    (spec,) = expand(Experiment.from_yaml(path))
    with pytest.raises(UserError, match=r"different options: encoders\.image\.layer=-2 \(here 1\), .*pooling=None"):
        count_init(scored_by(spec))


def count_init(spec: TrialSpec) -> None:
    from harness.model import assembly
    from harness.model.build import empty_model
    from harness.model.components import empty_encoders

    assembly.check(spec, empty_model(spec, empty_encoders(spec)))
