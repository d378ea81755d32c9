"""Traced steps of methods that change attention, positions or stages, and of rows that are not all alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.experiment.plan import TrialSpec
from harness.model.build import choose_splits, count_parameters
from harness.model.components import make_task
from harness.price.rows import rows_of
from harness.price.trace import Traced, trace
from tests.support.trials import spec_of


def traced(spec: TrialSpec) -> list[Traced]:
    task = make_task(spec)
    task.prepare()
    return trace(spec, rows_of(spec, choose_splits(spec, task).train).first)


def spec(folder: Path, adapter: Mapping[str, Any], **sections: Any) -> TrialSpec:
    given: dict[str, Any] = {"budget": {"examples": 24, "epochs": 2}}
    return spec_of(folder, {"learning_rate": 1e-3, **adapter}, **given | sections)


@pytest.mark.parametrize("method", ["dora", "mmca", "soft_prompt", "moka"])
def test_what_is_trained_is_what_is_counted(tmp_path: Path, method: str) -> None:
    own = spec(tmp_path, {"method": method})
    (step,) = traced(own)
    assert step.trained == count_parameters(own).trainable
    assert step.working_bytes >= step.activations_bytes > 0
    assert 2 * step.forward_flops <= step.step_flops <= 3.2 * step.forward_flops
    assert step.positions % step.row_positions == 0


def test_each_stage_of_a_recipe_is_traced(tmp_path: Path) -> None:
    projector, everything = traced(spec(tmp_path, {"method": "llava"}))
    assert projector.trained < everything.trained
    assert projector.activations_bytes < everything.activations_bytes
    assert projector.weights == everything.weights


def test_workers_share_a_batch(tmp_path: Path) -> None:
    own = spec(tmp_path, {"method": "none"}, optimizer={"per_device_train_batch_size": 6})
    task = make_task(own)
    task.prepare()
    train = choose_splits(own, task).train
    assert [rows_of(own, train, workers).first.size for workers in (1, 2, 4)] == [6, 3, 2]


def test_without_its_data_a_task_brings_a_sample_which_is_drawn_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    own = spec(tmp_path, {"method": "none"}, optimizer={"per_device_train_batch_size": 20})
    rows = rows_of(own, None)
    assert rows.of_sample
    assert rows.first.size == 20
    assert rows.longest >= rows.first.token_ids_BT.shape[1]
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"fingerprints.json"}  # of the backbones


def test_a_mixture_without_its_data_says_so(tmp_path: Path) -> None:
    tasks = [{"name": "scenes"}, {"name": "trends"}]
    own = spec(tmp_path, {"method": "none"}, task={"name": "mixture", "tasks": tasks})
    with pytest.raises(UserError, match="task mixture: its data is not on this machine"):
        rows_of(own, None)
