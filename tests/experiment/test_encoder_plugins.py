"""An encoder from a plugin file: one class, on a modality that is there, from the plan to the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import harness
from harness.core.errors import UserError
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.model.build import count_parameters
from harness.sweep.preflight import check_fingerprints, check_models
from tasks.registry import ENCODERS
from tests.support.trials import LORA, TASK, examples_of, run, scored_by

MEANS = '''
"""The mean colours of a grid of 4 x 4 cells."""
from pathlib import Path

import numpy as np
import torch
from torch import nn
from harness import Encoder


class MeanColours(Encoder):
    modality = "image"
    width = 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    @classmethod
    def files(cls):
        return [Path(__file__).with_name("scale.txt")]

    @torch.no_grad()
    def encode(self, items):
        pixels = [np.asarray(item.resize((4, 4)), dtype=np.float32) / 255 for item in items]
        return [torch.from_numpy(p).reshape(16, 3).to(self.device) * self.scale for p in pixels]
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ENCODERS, "added", [])
    (tmp_path / "scale.txt").write_text("2", encoding="utf-8")
    path = tmp_path / "means.py"
    path.write_text(MEANS, encoding="utf-8")
    return path


def spec_with(folder: Path, encoders: dict[str, str], plugins: tuple[str, ...] = ("means.py",)) -> TrialSpec:
    content: dict[str, Any] = {
        "task": TASK,
        "plugins": list(plugins),
        "backbone": {"encoders": encoders},
        "adapters": [LORA],
        "budget": {"examples": 16, "epochs": 1},
        "optimizer": {"per_device_train_batch_size": 8},
        "eval": {"max_new_tokens": 4},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    (spec,) = expand(Experiment.from_yaml(path))
    return scored_by(spec)


def test_a_trial_trains_on_the_encoder_of_a_plugin(plugin: Path, tmp_path: Path) -> None:
    spec = spec_with(tmp_path, {"image": "mean_colours"})
    assert set(spec.fingerprints) == {"language_model"}, "it is versioned with its plugin"
    check_models([spec])
    check_fingerprints([spec], "backbone")
    assert count_parameters(spec).encoder == 3
    record = run(spec, tmp_path)
    assert record.status == "finished", record.reason
    assert record.parameters is not None
    assert record.parameters.projector == 3 * 96 + 96
    trial = tmp_path / "trials" / record.trial_id
    trained = harness.load_trained(harness.export_trial(trial, tmp_path / "out"), plugins=[plugin])
    tested = examples_of(tmp_path, record).query("split == 'test'")
    pictures = [json.loads(inputs)[0][2] for inputs in tested.inputs]
    assert trained.predict([{"image": path} for path in pictures]) == tested.prediction.tolist()


def test_its_code_and_its_files_are_part_of_the_id(plugin: Path, tmp_path: Path) -> None:
    first = spec_with(tmp_path, {"image": "mean_colours"})
    (tmp_path / "scale.txt").write_text("3", encoding="utf-8")
    second = spec_with(tmp_path, {"image": "mean_colours"})
    assert first.trial_id != second.trial_id
    assert spec_with(tmp_path, {}).trial_id not in {first.trial_id, second.trial_id}
    record = run(first, tmp_path)
    assert record.status == "failed"
    assert "encoder mean_colours: its data files have changed since this trial was planned" in str(record.reason)


def test_an_encoder_of_another_modality_is_refused(plugin: Path, tmp_path: Path) -> None:
    plugin.write_text(MEANS.replace('modality = "image"', 'modality = "audio"'), encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"backbone.encoders.image: 'mean_colours' is an encoder of 'audio'; allowed: one of 'image'",
    ):
        spec_with(tmp_path, {"image": "mean_colours"})


def test_an_experiment_does_not_set_what_follows_from_names(tmp_path: Path) -> None:
    content = {"task": "scenes", "adapters": [LORA], "backbone": {"encoder_plugins": {}}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"backbone.encoder_plugins: unknown key; .*did you mean 'encoders'"):
        Experiment.from_yaml(path)
