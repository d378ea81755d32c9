"""Attention, the profile and a trained model take features from the cache on disk that a trial has filled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest

import harness
from harness.cli.attention import attention_of, restore
from harness.core.record import TrialRecord
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.model.on_disk import SIZE_VARIABLE
from harness.sweep.profile_worker import Worker
from harness.trial.profile import Job
from tasks.modalities.encoders.pretrained_vision import PretrainedVision
from tests.support.trials import LORA, examples_of, run, spec_of
from tests.support.vision import FAMILIES, save

pytestmark = pytest.mark.e2e


class Filled(NamedTuple):
    """A run whose trial has filled a cache."""

    folder: Path
    spec: TrialSpec
    record: TrialRecord
    resources: Resources


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    folder = tmp_path_factory.mktemp("run")
    save(FAMILIES["vit"], folder / "vit")
    backbone = {"encoders": {"image": {"model": str(folder / "vit"), "pooling": "2x2"}}}
    resources = {"feature_cache": str(folder / "cache")}
    spec = spec_of(folder, LORA, backbone=backbone, budget={"examples": 16, "epochs": 1}, resources=resources)
    record = run(spec, folder, **resources)
    assert record.status == "finished", record.reason
    return Filled(folder, spec, record, Resources(**resources))


def never(*_: Any) -> NoReturn:
    raise AssertionError("it was encoded again")


def test_attention_is_that_to_the_trials_own_features(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    built = restore(filled.spec, filled.folder / "trials" / filled.record.trial_id)
    monkeypatch.setattr(PretrainedVision, "encode", never)
    recorded, _ = attention_of(built, built.splits.test[0], "a red ball")
    assert (recorded.leading, recorded.rows, recorded.columns) == (1, 2, 2)


def test_a_profile_measures_on_the_trials_features(filled: Filled, tmp_path: Path) -> None:
    """What it has to encode it keeps, so it can be seen in the cache."""
    other = filled.resources.model_copy(update={"feature_cache": str(tmp_path / "cache")})
    made = []
    with Worker(tmp_path / "log") as worker:
        for resources in (filled.resources, other):
            cache = Path(str(resources.feature_cache))
            before = set(cache.rglob("*.safetensors"))
            job = Job(specs=(filled.spec,), resources=resources, run=str(filled.folder), memory=(0,))
            answers = [answer for answer in worker.ask(job) if not answer.begun]
            assert [answer.reason for answer in answers] == [None]
            made.append(len(set(cache.rglob("*.safetensors")) - before))
    assert made == [0, 1]


def test_a_picture_is_encoded_once_for_all_predictions_as_long_as_it_is_the_same(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    exported = harness.export_trial(filled.folder / "trials" / filled.record.trial_id, tmp_path / "out")
    tested = examples_of(filled.folder, filled.record).query("split == 'test'")
    pictures = [Path(json.loads(inputs)[0][2]) for inputs in tested.inputs]
    calls: list[int] = []
    plain = PretrainedVision.encode

    def counted(self: PretrainedVision, items: Any) -> Any:
        calls.append(len(items) if self.device.type != "meta" and items[0].size != (64, 48) else 0)
        return plain(self, items)

    monkeypatch.setattr(PretrainedVision, "encode", counted)
    for expected in (len(pictures), 0):
        calls.clear()
        trained = harness.load_trained(exported)
        assert trained.predict([{"image": path} for path in pictures]) == tested.prediction.tolist()
        assert sum(calls) == expected
    changing = tmp_path / "picture.png"
    texts = tested.prediction.tolist()
    other = next(number for number, text in enumerate(texts) if text != texts[0])
    for number in (0, other, 0):
        shutil.copyfile(pictures[number], changing)
        assert trained.predict([{"image": changing}]) == [tested.prediction.iloc[number]]


def test_a_prediction_needs_no_cache(filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = harness.export_trial(filled.folder / "trials" / filled.record.trial_id, tmp_path / "out")
    tested = examples_of(filled.folder, filled.record).query("split == 'test'")
    picture = json.loads(tested.inputs.iloc[0])[0][2]
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name, value in (("HARNESS_CACHE", str(tmp_path / "file")), (SIZE_VARIABLE, "0")):
        monkeypatch.setenv(name, value)
        assert harness.load_trained(exported).predict([{"image": picture}]) == [tested.prediction.iloc[0]]
