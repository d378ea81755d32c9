"""Predicted memory against that of real training steps: the numbers of a record, kind by kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.core.record import Memory
from harness.experiment.plan import TrialSpec
from harness.experiment.sections import Resources
from harness.price.footprint import Footprints
from harness.price.memory import memory_of
from harness.tracking.tracker import NoTracker
from harness.trial.measure import WARMUP_STEPS
from harness.trial.trial import Trial
from tests.support.trials import BITFIT, FULL, LORA, spec_of

MARGIN = 0.15  # of the sum of all kinds
AGNOSTIC = {**LORA, "grouping": "agnostic"}
GROUPED = {"budget": {"references": "grouped"}}
BY_LENGTH = {"optimizer": {"train_sampling_strategy": "group_by_length"}}
STACKED = {**LORA, "grouping": "shared+specific"}
PER_CONTEXT = {
    "groups": {"image": {"method": "lora", "rank": 6}, "text": {"method": "ia3+bitfit"}}, "learning_rate": 1e-2
}  # fmt: skip
NONE, IA3 = {"method": "none", "learning_rate": 3e-3}, {"method": "ia3", "learning_rate": 0.2}


def measured(spec: TrialSpec, folder: Path, resources: Resources) -> tuple[Memory, Trial]:
    """What a record would have after the first steps."""
    trial = Trial(spec, folder, resources, NoTracker(), lambda _: None)
    trial.build()
    trial.stages.start()
    trial.stages.built.model.train()
    for draws in trial.stages.built.order.batches(1, spec.optimizer.per_device_train_batch_size)[:WARMUP_STEPS]:
        trial.train_step(draws)
    return trial.stages.engine.memory(trial.state.activations_bytes, trial.peak), trial


@pytest.mark.parametrize(
    ("adapter", "batch", "options", "resources"),
    [
        (NONE, 8, {}, {}),
        (LORA, 4, {}, {}),
        (LORA, 4, BY_LENGTH, {}),
        (LORA, 10, BY_LENGTH | GROUPED, {}),
        (LORA, 16, {}, {}),
        (AGNOSTIC, 8, {}, {}),
        (BITFIT, 8, {}, {}),
        (IA3, 8, {}, {}),
        (STACKED, 8, {}, {}),
        (PER_CONTEXT, 8, {}, {}),
        (FULL, 8, {}, {}),
        (FULL, 2, {"optimizer": {"bf16": True}}, {}),
        (LORA, 8, {}, {"zero_stage": 2}),
        (LORA, 10, GROUPED, {}),
        (LORA, 10, GROUPED, {"shared_prefix": False}),
        (LORA | {"dropout": 0.1}, 10, GROUPED, {}),
        ({"method": "moka", "learning_rate": 1e-3}, 10, GROUPED, {}),
    ],
)
def test_predicted_memory_is_that_of_training(
    tmp_path: Path,
    adapter: Mapping[str, Any],
    batch: int,
    options: Mapping[str, Any],
    resources: Mapping[str, Any],
) -> None:
    budget = {"examples": 48, **options.get("budget", {})}
    optimizer = {"per_device_train_batch_size": batch, **options.get("optimizer", {})}
    spec = spec_of(tmp_path, adapter, budget=budget, optimizer=optimizer)
    given = Resources(**resources)
    actual, trial = measured(spec, tmp_path, given)
    footprint = Footprints(given).of(spec, trial.stages.built.splits.train)
    found = memory_of(footprint.stages[-1], spec, given, footprint.longest)
    trial.stages.close()
    kinds = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
    assert found.recorded_bytes == pytest.approx(sum(getattr(actual, kind) for kind in kinds), rel=MARGIN)
    # By kind it is exact where every row of a batch is padded to the length that was traced.
    assert {kind: getattr(found, kind) for kind in kinds} == {kind: getattr(actual, kind) for kind in kinds}
    assert found.device_bytes >= found.recorded_bytes
