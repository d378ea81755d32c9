"""SmolLM2-135M and EfficientNet-Lite0 on photographs, from the command to a caption of a picture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from harness.core.record import read_run
from tests.support.timm_library import timm_folder

pytestmark = [pytest.mark.real_data, pytest.mark.timeout(900)]

EXPERIMENT = """
name: photographs
task: {name: coco_captions, root: "${FLICKR_ROOT}"}
backbone:
  language_model: "${REAL_MODELS}/smollm2/fp32"
  start_token: "<|endoftext|>"
  encoders: {image: "${REAL_MODELS}/efficientnet-lite0"}
adapters:
  - {method: lora, rank: 8, grouping: specific, learning_rate: 1e-3}
budget: {examples: 16, epochs: 1, references: grouped}
optimizer: {per_device_train_batch_size: 10}
eval: {validation_examples: 2, test_examples: 4, max_new_tokens: 12}
resources: {profile: false}
"""
WITHOUT_TRAINING = 115  # perplexity of SmolLM2 on captions of COCO after <|endoftext|>


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    if missing := [name for name in ("REAL_MODELS", "FLICKR_ROOT") if not os.environ.get(name)]:
        pytest.skip(f"{' and '.join(missing)} not set")
    timm = timm_folder(Path(os.environ["REAL_MODELS"], ".tools-timm"), tmp_path / "timm")
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(timm))), "HF_HUB_OFFLINE": "1"}


def harness(*arguments: str, cwd: Path, env: dict[str, str]) -> str:
    command = [sys.executable, "-m", "harness", *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_a_pretrained_model_captions_photographs(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "photographs.yaml").write_text(EXPERIMENT, encoding="utf-8")
    plan = harness("plan", "photographs.yaml", cwd=tmp_path, env=environment)
    assert re.search(r"5,622,336 +4,884,480 +737,856 +143,508,352", " ".join(plan.split()))
    assert re.search(r"1 trial to run, 1 at a time: about \d", plan)
    harness("run", "photographs.yaml", cwd=tmp_path, env=environment)
    (record,) = read_run(tmp_path / "runs/photographs").records.values()
    assert record.status == "finished", record.reason
    assert record.metrics["test"]["perplexity"] < WITHOUT_TRAINING / 2
    trial = tmp_path / "runs/photographs/trials" / record.trial_id
    rows = pd.read_parquet(trial / "examples.parquet").query("split == 'test'")
    assert len(rows) == 4
    assert all(len(re.findall(r"[A-Za-z]+", text)) > 4 for text in rows.prediction), list(rows.prediction)
    harness("export", str(trial), "model", cwd=tmp_path, env=environment)
    picture = json.loads(rows.inputs.iloc[0])[0][2]
    assert (
        harness("predict", "model", picture, cwd=tmp_path, env=environment).strip() == rows.prediction.iloc[0].strip()
    )
