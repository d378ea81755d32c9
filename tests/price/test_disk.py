"""What features take in the cache on disk, against what trials write there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from harness.experiment.plan import TrialSpec
from harness.model.build import choose_splits
from harness.model.components import make_task
from harness.price.disk import FeatureSpace
from tests.support.trials import run, spec_of

BUDGET = {"examples": 16, "epochs": 1}


def vision(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def predicted(*specs: TrialSpec) -> int:
    space = FeatureSpace()
    for spec in specs:
        task = make_task(spec)
        task.prepare()
        space.add(spec, choose_splits(spec, task))
    assert space.size_bytes is not None
    return space.size_bytes


@pytest.mark.parametrize("own", [False, True], ids=["built-in", "pretrained"])
def test_the_prediction_is_what_trials_write(own: bool, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"budget": BUDGET}
    if own:
        sections["backbone"] = {"encoders": {"image": str(vision(tmp_path / "vit"))}}
    specs = [spec_of(tmp_path, seeds=[seed], **sections) for seed in (0, 1)]
    cache = tmp_path / "cache"
    for spec in specs:
        run(spec, tmp_path, feature_cache=str(cache))
    written = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    assert predicted(*specs) == pytest.approx(written, rel=0.1)
    each = 17 * 32 * 4 if own else 16 * 96 * 4
    assert predicted(specs[0]) == 40 * each


def test_encoding_is_counted_once_for_every_file(tmp_path: Path) -> None:
    sections: dict[str, Any] = {"budget": BUDGET, "backbone": {"encoders": {"image": str(vision(tmp_path / "vit"))}}}
    space, specs = FeatureSpace(), [spec_of(tmp_path, seeds=[seed], **sections) for seed in (0, 0)]
    for spec in specs:
        task = make_task(spec)
        task.prepare()
        space.add(spec, choose_splits(spec, task))
    tokens, width, inner, patch = 17, 32, 48, 3 * 8 * 8
    layer = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    pooler, patches = width * width, 16 * patch * width
    files = 16 + 12 + 12
    assert space.encoding_flops == pytest.approx(2 * files * (layer + pooler + patches), rel=0.02)


def test_files_that_are_augmented_are_left_out(tmp_path: Path) -> None:
    from tasks.captioning import CocoCaptions

    (tmp_path / "data").mkdir()
    CocoCaptions.sample(tmp_path / "data")
    task = {"name": "coco_captions", "root": str(tmp_path / "data")}
    plain = predicted(spec_of(tmp_path, task=task, budget={"examples": 8}))
    augmented = predicted(
        spec_of(tmp_path, task=task | {"augmentation": {"crop_scale": [0.5, 1]}}, budget={"examples": 8})
    )
    assert (plain, augmented) == (16 * 16 * 96 * 4, 8 * 16 * 96 * 4)
