"""Features on disk: every trial is the same bytes with the cache on, off, cold and warm, and encoding is paid once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from harness.core.record import TrialRecord
from harness.experiment.sections import Resources
from harness.model.build import read_data
from harness.model.kept import Kept
from harness.model.on_disk import disk_of
from harness.trial.log import LOG
from harness.trial.trial import Progress
from tasks.modalities.encoders.pretrained_audio import WhisperEncoder
from tasks.modalities.encoders.pretrained_vision import PretrainedVision
from tasks.modalities.encoders.tiny_vision import TinyVision
from tests.support.trials import LORA, TASK, outcome, run, spec_of

BUDGET = {"examples": 16, "epochs": 1}
OTHER = {"method": "none", "learning_rate": 3e-3}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many items each call of an encoder had."""
    calls: list[int] = []
    for kind in (TinyVision, PretrainedVision, WhisperEncoder):
        plain = kind.encode

        def counted(self: Any, items: Sequence[Any], plain: Any = plain) -> Any:
            grey = getattr(items[0], "size", None) == (
                64,
                48,
            )  # which a pretrained encoder is tried on when it is loaded
            if self.device.type != "meta" and not grey:
                calls.append(len(items))
            return plain(self, items)

        monkeypatch.setattr(kind, "encode", counted)
    return calls  # type: ignore[return-value]


def trial(folder: Path, cache: Path | None, adapter: Mapping[str, Any] = LORA, **sections: Any) -> TrialRecord:
    """A trial whose features are in a folder; None: in memory."""
    folder.mkdir(exist_ok=True)
    on_disk = {"feature_cache": str(cache)} if cache else {"feature_cache_gib": 0.0}
    options = {key: sections.pop(key) for key in ("kept", "report") if key in sections}
    record = run(spec_of(folder, adapter, **{"budget": BUDGET, **sections}), folder, **options, **on_disk)
    assert record.status == "finished", record.reason
    return record


def vision(folder: Path, seed: int = 0) -> Path:
    """A folder with a small ViT drawn from a seed."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "own",
    [pytest.param(False, id="built-in"), pytest.param(True, id="pretrained", marks=pytest.mark.slow)],
)
def test_a_trial_is_the_same_with_the_cache_on_off_cold_and_warm(own: bool, encoded: list[int], tmp_path: Path) -> None:
    sections: dict[str, Any] = {"backbone": {"encoders": {"image": str(vision(tmp_path / "vit"))}}} if own else {}
    folder, cache = tmp_path / "run", tmp_path / "cache"
    off = trial(folder, None, **sections)
    assert sum(encoded) == 40
    expected = outcome(folder, off)
    encoded.clear()
    for state in ("cold", "warm"):
        record = trial(folder, cache, **sections)
        assert record.trial_id == off.trial_id
        assert outcome(folder, record) == expected, state
    assert sum(encoded) == 40, "once"
    kept = Kept()
    for _ in range(2):
        assert outcome(folder, trial(folder, None, kept=kept, **sections)) == expected
    assert sum(encoded) == 80, "a worker's memory has them for its second trial"


def test_a_second_trial_and_a_second_run_encode_nothing(encoded: list[int], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    trial(tmp_path / "one", cache)
    first = sum(encoded)
    record = trial(tmp_path / "one", cache, OTHER)
    trial(tmp_path / "two", cache, OTHER, optimizer={"per_device_train_batch_size": 4})
    assert sum(encoded) == first == 40
    assert "features of image: 0 of 40 files encoded" in (
        tmp_path / "one" / "trials" / record.trial_id / LOG
    ).read_text(encoding="utf-8")


@pytest.mark.e2e
def test_other_seeds_and_budgets_encode_what_they_add(encoded: list[int], tmp_path: Path) -> None:
    """An encoder that takes one item at a time."""
    backbone: dict[str, Any] = {"backbone": {"encoders": {"image": str(vision(tmp_path / "vit"))}}}
    cache = tmp_path / "cache"
    trial(tmp_path / "run", cache, budget={"examples": 64, "epochs": 1}, **backbone)
    assert (len(encoded), sum(encoded)) == (88, 88)
    trial(tmp_path / "run", cache, seeds=[1], **backbone)
    trial(tmp_path / "run", cache, budget={"examples": 24, "epochs": 1}, **backbone)
    assert sum(encoded) == 88


@pytest.mark.slow
def test_other_weights_at_the_same_place_are_another_encoder(encoded: list[int], tmp_path: Path) -> None:
    cache, backbone = tmp_path / "cache", {"backbone": {"encoders": {"image": str(vision(tmp_path / "vit"))}}}
    one = outcome(tmp_path / "run", trial(tmp_path / "run", cache, **backbone))
    shutil.rmtree(tmp_path / "vit")
    vision(tmp_path / "vit", seed=1)
    other = outcome(tmp_path / "run", trial(tmp_path / "run", cache, **backbone))
    assert sum(encoded) == 80
    assert one[1:] != other[1:]
    shutil.copytree(tmp_path / "vit", tmp_path / "copy")  # the same weights elsewhere are the same encoder
    trial(tmp_path / "run", cache, backbone={"encoders": {"image": str(tmp_path / "copy")}})
    assert sum(encoded) == 80


@pytest.mark.slow
def test_an_input_that_has_changed_is_another_input(encoded: list[int], tmp_path: Path) -> None:
    data, cache = pictures(tmp_path), tmp_path / "cache"
    backbone: dict[str, Any] = {"backbone": {"encoders": {"image": str(vision(tmp_path / "vit"))}}}
    task: dict[str, Any] = {
        "task": {"name": "coco_captions", "root": str(data)},
        "budget": {"examples": 8, "epochs": 1},
    }
    trial(tmp_path / "run", cache, **task, **backbone)
    first = sum(encoded)
    changed, same = sorted((data / "train2017").iterdir())[:2]
    shutil.copyfile(sorted((data / "val2017").iterdir())[0], changed)
    os.utime(same)  # the same content, so the same features
    trial(tmp_path / "run", cache, **task, **backbone)
    assert sum(encoded) == first, "its new content was encoded as another file"


def pictures(folder: Path) -> Path:
    from tasks.captioning import CocoCaptions

    (folder / "data").mkdir()
    CocoCaptions.sample(folder / "data")
    return folder / "data"


def test_augmented_views_are_encoded_once_for_all_methods(encoded: list[int], tmp_path: Path) -> None:
    data, cache, folder = pictures(tmp_path), tmp_path / "cache", tmp_path / "run"
    task = {"name": "coco_captions", "root": str(data), "augmentation": {"crop_scale": [0.5, 1.0]}}
    sections: dict[str, Any] = {"task": task, "budget": {"examples": 8, "epochs": 2}}
    off = outcome(folder, trial(folder, None, **sections))
    encoded.clear()
    assert outcome(folder, trial(folder, cache, **sections)) == off
    first = sum(encoded)
    assert first == 8 + 2 * 8, "evaluation, and two views of each training picture"
    assert outcome(folder, trial(folder, cache, **sections)) == off
    trial(folder, cache, OTHER, **sections)
    assert sum(encoded) == first
    trial(folder, cache, seeds=[1], **sections)
    assert sum(encoded) == first + 2 * 8, "another seed draws other views"


@pytest.mark.slow
def test_a_corrupted_file_is_encoded_again_and_changes_nothing(encoded: list[int], tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "run"
    expected = outcome(folder, trial(folder, cache))
    path = next(cache.rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    record = trial(folder, cache)
    assert outcome(folder, record) == expected
    assert sum(encoded) > 40
    log = (folder / "trials" / record.trial_id / LOG).read_text(encoding="utf-8")
    assert f"{path}: its checksum is another one, so it is corrupted; it is removed and made again" in log


def test_a_cache_that_is_full_of_what_is_used_fails_the_trial_with_what_would_work(tmp_path: Path) -> None:
    record = run(spec_of(tmp_path), tmp_path, feature_cache=str(tmp_path / "cache"), feature_cache_gib=1e-6)
    assert record.status == "failed"
    assert "resources.feature_cache_gib to what it may take; 0 keeps features in memory" in str(record.reason)


def test_progress_says_how_long_encoding_takes(tmp_path: Path) -> None:
    backbone: dict[str, Any] = {"backbone": {"encoders": {"image": str(vision(tmp_path / "vit"))}}}
    told: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.trial.trial.REPORT_INTERVAL_S", 0.0)
        trial(tmp_path / "run", tmp_path / "cache", report=told.append, task=TASK, **backbone)
    phases = [progress.phase for progress in told if progress.phase.startswith("encode")]
    assert phases[0].startswith("encode image 2%, ")
    assert phases[-1] == "encode image 100%, 0.0 s left"


@pytest.mark.real_data
@pytest.mark.slow
def test_whisper_hears_spoken_digits_once(encoded: list[int], tmp_path: Path) -> None:
    models, recordings = os.environ.get("REAL_MODELS"), os.environ.get("FSDD_ROOT")
    if not (models and recordings):
        pytest.skip("REAL_MODELS or FSDD_ROOT is not set")
    sections: dict[str, Any] = {
        "task": {"name": "speech", "root": recordings},
        "backbone": {"encoders": {"audio": f"{models}/whisper-tiny.en"}},
        "budget": {"examples": 16, "epochs": 1},
        "eval": {"validation_examples": 4, "test_examples": 4, "max_new_tokens": 4},
    }
    cache = tmp_path / "cache"
    one = trial(tmp_path / "one", cache, **sections)
    assert encoded == [1] * 24
    two = trial(tmp_path / "two", cache, **sections)
    trial(tmp_path / "two", cache, OTHER, **sections)
    assert encoded == [1] * 24, "paid once"
    assert outcome(tmp_path / "one", one)[1:] == outcome(tmp_path / "two", two)[1:]
    print({name: record.phases_s["encode"] for name, record in (("first", one), ("second", two))})  # noqa: T201


def test_an_encoder_computes_with_the_threads_that_its_features_are_named_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = TinyVision.encode

    def counted(self: Any, items: Sequence[Any]) -> Any:
        seen.append(torch.get_num_threads())
        return plain(self, items)

    monkeypatch.setattr(TinyVision, "encode", counted)
    before = torch.get_num_threads()
    spec = spec_of(tmp_path, budget=BUDGET)
    for threads in (1, 2):
        asked = Resources(feature_cache=str(tmp_path / "cache"), cpus_per_worker=threads)
        data = read_data(spec, torch.device("cpu"), disk=disk_of(asked, tmp_path))
        data.features.of(data.splits.test[:1])
        data.features.flush()
    assert (seen, torch.get_num_threads()) == ([1, 2], before), "and neither is the other's"
