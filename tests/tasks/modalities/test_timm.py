"""Encoders of timm, in processes of their own, which find timm elsewhere: they see what timm alone sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SEES_WHAT_TIMM_SEES = """
import sys
from pathlib import Path
import numpy as np, timm, torch
from PIL import Image as Pictures
from tasks.modalities.image import Image

folder = sys.argv[1]
encoder, empty = Image().encoder(folder), Image().empty_encoder(folder)
assert encoder.width == empty.width == 1280
assert {p.device.type for p in empty.parameters()} == {"meta"}
rng = np.random.default_rng(0)
pictures = [Pictures.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in [(37, 61), (300, 200)]]
model = encoder.model.timm_model
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
with torch.no_grad():
    expected = model.forward_features(torch.stack([transform(picture) for picture in pictures]))
found = torch.stack(encoder.encode(pictures))
assert [x_ND.shape for x_ND in empty.encode(pictures)] == [x_ND.shape for x_ND in found]
assert found.shape == (2, 49, 1280)
torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
"""
EVERY_LAYOUT = """
import sys
import torch
from PIL import Image as Pictures
from transformers import TimmWrapperConfig, TimmWrapperModel
from tasks.modalities.image import Image

cfg = {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
picture = Pictures.linear_gradient("L").convert("RGB")
for architecture, tokens in {
    "swin_tiny_patch4_window7_224": 49, "vit_tiny_patch16_224": 197, "convnext_atto": 49, "resnet10t": 49
}.items():
    folder = f"{sys.argv[1]}/{architecture}"
    model = TimmWrapperModel(TimmWrapperConfig(architecture=architecture, pretrained_cfg=cfg, num_labels=10)).eval()
    model.save_pretrained(folder)
    encoder = Image().encoder(folder)
    (features_ND,) = encoder.encode([picture])
    assert features_ND.shape == (tokens, encoder.width), architecture
    pixels_BCHW = encoder.processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        own = model.timm_model.forward_features(pixels_BCHW)[0]
    if own.dim() == 3:  # the grid's mean is the same however its cells are read
        own = own.mean(dim=(0, 1) if architecture.startswith("swin") else (1, 2))
        torch.testing.assert_close(features_ND.mean(dim=0), own, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(features_ND, own, rtol=1e-4, atol=1e-5)
"""
INNER_LAYERS = """
import sys
import torch
from PIL import Image as Pictures
from harness.core.errors import UserError
from transformers import TimmWrapperConfig, TimmWrapperModel
from tasks.modalities.image import Image

cfg = {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}
picture = Pictures.linear_gradient("L").convert("RGB")
for architecture, leading in {"swin_tiny_patch4_window7_224": 0, "vit_tiny_patch16_224": 1, "resnet10t": 0}.items():
    folder = f"{sys.argv[1]}/{architecture}"
    model = TimmWrapperModel(TimmWrapperConfig(architecture=architecture, pretrained_cfg=cfg, num_labels=10)).eval()
    model.save_pretrained(folder)
    for layer in (0, -2):
        encoder, empty = (make(folder, options={"layer": layer}) for make in (Image().encoder, Image().empty_encoder))
        (features_ND,), (shape_ND,) = encoder.encode([picture]), empty.encode([picture])
        pixels_BCHW = encoder.processor(images=picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            _, maps = model.timm_model.forward_intermediates(pixels_BCHW)
        torch.testing.assert_close(features_ND, maps[layer][0].flatten(1).mT, rtol=1e-4, atol=1e-5)
        assert features_ND.shape == shape_ND.shape and encoder.width == empty.width == features_ND.shape[1]
    whole_ND, pooled_ND = (Image().encoder(folder, options=o).encode([picture])[0] for o in ({}, {"pooling": "1x1"}))
    mean_D = whole_ND[leading:].double().mean(0)
    torch.testing.assert_close(pooled_ND[leading:].double(), mean_D[None], rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled_ND[:leading], whole_ND[:leading])
    half_ND = Image().encoder(folder, options={"dtype": "bf16"}).encode([picture])[0]
    assert half_ND.dtype == torch.bfloat16 and (half_ND.float() - whole_ND).norm() / whole_ND.norm() < 0.03
    try:
        found = Image().encoder(folder, options={"select_strategy": "default"}).encode([picture])[0]
        assert leading and torch.equal(found, whole_ND[leading:])
    except UserError as error:
        assert not leading and "there is no class token" in str(error)
"""
TYPO = """
from harness.core.hub import load_error
print(load_error("timm/resnet50.a1_in1", OSError("not found")))
"""


@pytest.fixture(scope="module")
def models() -> Path:
    if not (found := os.environ.get("REAL_MODELS")):
        pytest.skip("REAL_MODELS is not set")
    return Path(found)


def run(script: str, models: Path, *arguments: str, timm: bool = True) -> subprocess.CompletedProcess[str]:
    begin = "from tests.support.timm_library import timm_or_skip; timm_or_skip()\n" if timm else ""
    path = os.pathsep.join([str(ROOT), *([str(models / ".tools-timm")] if timm else [])])
    command = [sys.executable, "-c", begin + script, *arguments]
    return subprocess.run(
        command,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.real_data
def test_pretrained_weights_see_each_picture_as_timm_alone_does(models: Path) -> None:
    done = run(SEES_WHAT_TIMM_SEES, models, str(models / "efficientnet-lite0"))
    assert done.returncode == 0, done.stderr


@pytest.mark.real_data
def test_grids_and_sequences_of_timm_become_tokens(models: Path, tmp_path: Path) -> None:
    done = run(EVERY_LAYOUT, models, str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.real_data
def test_inner_layers_of_timm_are_its_own_intermediates(models: Path, tmp_path: Path) -> None:
    done = run(INNER_LAYERS, models, str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.real_data
def test_a_name_with_a_typo_is_met_with_the_nearest_of_timm(models: Path) -> None:
    done = run(TYPO, models)
    assert "did you mean 'timm/resnet50.a1_in1k'" in done.stdout, done.stderr


def plan(folder: Path, tmp_path: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    file = tmp_path / "experiment.yaml"
    file.write_text(
        f"name: timm\ntask: {{name: scenes}}\nbackbone: {{encoders: {{image: {folder}}}}}\n"
        "adapters: [{method: lora, rank: 4, learning_rate: 1e-2}]\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "harness", "plan", str(file)]
    return subprocess.run(
        command,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_a_plan_without_timm_says_what_to_install(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "timm_wrapper", "architecture": "resnet18"}', encoding="utf-8")
    blocked = tmp_path / "blocked" / "timm"  # as if it were not installed, also where it is
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('requires the timm library')\n", encoding="utf-8")
    done = plan(folder, tmp_path, str(blocked.parent))
    assert done.returncode == 2, done.stdout
    assert f"backbone.encoders.image: '{folder}' needs timm, which is not installed: pip install timm" in " ".join(
        done.stderr.split()
    )
