"""Run folders whose trials have made-up records with their real specs: they can be profiled without being trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from harness.core.files import write_atomically
from harness.core.record import TrialRecord, write_record
from harness.sweep.run import prepare
from tests.support.runs import fake_record

ADAPTERS: list[dict[str, Any]] = [
    {"method": "none", "learning_rate": [1e-2, 1e-3]},
    {"method": "lora", "rank": [2, 4], "grouping": "specific", "learning_rate": 1e-2},
    {"method": "full", "learning_rate": 1e-3},
]
Change = Callable[[TrialRecord], TrialRecord | None]


def trained(folder: Path, change: Change = lambda record: record, **sections: Any) -> Path:
    """A run folder in which every trial has a made-up record with its real spec."""
    content: dict[str, Any] = {
        "name": "grid",
        "task": {"name": "scenes", "train_examples": 64},
        "adapters": ADAPTERS,
        "budget": {"examples": 32, "epochs": 2},
        "seeds": [0, 1],
    }
    prepared = prepare(harness.Experiment(**content | sections), folder)
    write_atomically(prepared.folder / "plan.json", prepared.plan.model_dump_json())
    write_atomically(prepared.folder / "experiment.yaml", prepared.experiment.text)
    for spec, planned in zip(prepared.specs, prepared.plan.trials, strict=True):
        record = fake_record(planned, 1, 0.5).model_copy(update={"spec": spec.model_dump(mode="json")})
        if (changed := change(record)) is not None:
            write_record(prepared.folder, changed)
    return prepared.folder
