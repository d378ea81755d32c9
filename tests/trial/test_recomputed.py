"""Gradient checkpointing and other implementations of attention: the same results, with less memory or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.record import TrialRecord
from harness.experiment.sections import Resources
from harness.model.build import choose_splits
from harness.model.components import make_task
from harness.price.footprint import Footprints
from harness.price.memory import memory_of
from harness.price.remedies import remedies
from harness.sweep.preflight import check_models
from tests.support.trials import FULL, LORA, run, spec_of

BUDGET = {"budget": {"examples": 32, "epochs": 1}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "full": FULL,
    "dora": {"method": "dora", "grouping": "specific", "learning_rate": 6e-3},
    "moka": {"method": "moka", "learning_rate": 6e-3},
    "soft prompt": {"method": "soft_prompt", "learning_rate": 1e-2},
}


def trained(folder: Path, adapter: dict[str, Any], **resources: Any) -> TrialRecord:
    folder.mkdir()
    record = run(spec_of(folder, adapter, **BUDGET), folder, **resources)
    assert record.status == "finished", record.reason
    return record


@pytest.mark.parametrize(
    "name", [name if name in {"lora", "full"} else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_recomputed_layers_give_the_same_results_with_less_memory(name: str, tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", METHODS[name])
    again = trained(tmp_path / "again", METHODS[name], gradient_checkpointing=True)
    assert again.trial_id == plain.trial_id
    assert again.history[0].train_loss == pytest.approx(plain.history[0].train_loss, rel=1e-6)
    assert again.metrics["test"]["perplexity"] == pytest.approx(plain.metrics["test"]["perplexity"], rel=1e-5)
    assert plain.memory is not None
    assert again.memory is not None
    assert again.memory.activations_bytes < 0.6 * plain.memory.activations_bytes


@pytest.mark.slow
def test_the_memory_of_recomputed_layers_is_predicted(tmp_path: Path) -> None:
    resources = Resources(gradient_checkpointing=True)
    measured = trained(tmp_path / "run", LORA, gradient_checkpointing=True).memory
    spec = spec_of(tmp_path, LORA, **BUDGET)
    task = make_task(spec)
    task.prepare()
    train = choose_splits(spec, task).train
    footprint = Footprints(resources).of(spec, train)
    memory = memory_of(footprint.largest, spec, resources)
    assert measured is not None
    assert memory.activations_bytes == pytest.approx(measured.activations_bytes, rel=0.15)
    whole = Footprints().of(spec, train)
    needed = memory_of(whole.largest, spec, Resources()).device_bytes
    found = remedies(spec, Resources(), needed - 1, lambda changed, other: memory_of(
        Footprints(other).of(changed, train).largest, changed, other
    ))  # fmt: skip
    assert found[0].startswith("resources: {gradient_checkpointing: true}")


@pytest.mark.e2e
def test_attention_can_be_chosen(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", LORA)
    eager = trained(tmp_path / "eager", LORA, attn_implementation="eager")
    assert eager.metrics["test"]["perplexity"] == pytest.approx(plain.metrics["test"]["perplexity"], rel=1e-4)


def test_an_unknown_attention_is_refused_before_compute(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LORA)
    with pytest.raises(UserError, match=re.escape("resources.attn_implementation: found 'flash'; LlamaFor")):
        check_models([spec], Resources(attn_implementation="flash"))
