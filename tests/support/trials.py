"""Small trials in this process: a few drawn pictures, a stand-in metric, a recording tracker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import yaml

from harness.core.record import TrialRecord
from harness.core.registry import Plugin
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, expand
from harness.experiment.sections import Optimizer, Resources
from harness.model.kept import Kept
from harness.trial import engine as engine_module
from harness.trial.attempt import run_trial
from harness.trial.trial import Progress, never
from tasks.base import Metric, Scores

TASK = {"name": "scenes", "train_examples": 64, "validation_examples": 12, "test_examples": 12}
LORA = {"method": "lora", "rank": 2, "grouping": "specific", "learning_rate": 6e-3}
FULL = {"method": "full", "learning_rate": 3e-3}
BITFIT = {"method": "bitfit", "grouping": {"image": "vision", "text": None}, "learning_rate": 0.1}
OTHERS = [
    {"method": "none", "learning_rate": 3e-3},
    {"method": "ia3", "learning_rate": 0.2},
    BITFIT,
]


class FirstWord(Metric):
    """Replaces METEOR and its 8 seconds of Java: 1 if the first word is that of a reference."""

    labels: ClassVar = {"first_word": "First word"}

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        assert list(predictions) == list(references)
        per_example = {
            key: {"first_word": float(predictions[key].split(" ")[0] in {text.split(" ")[0] for text in texts})}
            for key, texts in references.items()
        }
        mean = sum(scores["first_word"] for scores in per_example.values()) / len(per_example)
        return Scores({"first_word": mean}, per_example)


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.run_id: str | None = "run-1"
        self.warnings: tuple[str, ...] = ()
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished: list[TrialRecord] = []
        self.pauses = 0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(values)))

    def pause(self) -> None:
        self.pauses += 1

    def finish(self, record: TrialRecord, folder: Path) -> None:
        assert (folder / "record.json").exists() == (record.status != "cancelled")
        self.finished.append(record)


def spec_of(
    folder: Path, adapter: Mapping[str, Any] = LORA, metric: str = "tests.support.trials:FirstWord", **sections: Any
) -> TrialSpec:
    """The only trial of an experiment file with one adapter."""
    content: dict[str, Any] = {
        "task": TASK,
        "adapters": [dict(adapter)],
        "budget": {"examples": 32, "epochs": 3},
        "optimizer": {"per_device_train_batch_size": 8},
        "eval": {"max_new_tokens": 6},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
    (spec,) = expand(Experiment.from_yaml(path))
    if not metric:
        return spec
    return scored_by(spec, metric)


def scored_by(spec: TrialSpec, target: str = f"{__name__}:FirstWord") -> TrialSpec:
    """The spec with another metric for every task."""
    plugin = Plugin(name="stand_in", distribution="tests", result_version=1, target=target)
    metrics = {member: {"stand_in": plugin} for member in spec.task.metrics}
    return spec.model_copy(update={"task": spec.task.model_copy(update={"metrics": metrics})})


def run(
    spec: TrialSpec,
    folder: Path,
    report: Callable[[Progress], None] = lambda _: None,
    tracker: Any = None,
    rungs: Collection[int] = (),
    stop: Callable[[], bool] = never,
    kept: Kept | None = None,
    **resources: Any,
) -> TrialRecord:
    asked = Resources(**resources)
    return run_trial(spec, "unit", folder, asked, tracker or Recorder(), report, rungs, stop, kept)


def examples_of(folder: Path, record: TrialRecord) -> pd.DataFrame:
    return pd.read_parquet(folder / "trials" / record.trial_id / "examples.parquet")


MEASURED = {"wall_time_s", "phases_s", "throughput", "memory", "started_at"}  # times and memory differ


def outcome(folder: Path, record: TrialRecord) -> tuple[Any, bytes, bytes]:
    """Everything that a trial leaves, without what is measured."""
    trial = folder / "trials" / record.trial_id
    files = (trial / "examples.parquet").read_bytes(), (trial / "best.safetensors").read_bytes()
    return record.model_dump(exclude=MEASURED), *files


def finished_trial(folder: Path, **sections: Any) -> tuple[TrialRecord, Path, Recorder, list[Progress]]:
    """One trial, to be looked at by several tests."""
    tracker, progress = Recorder(), list[Progress]()
    return run(spec_of(folder, **sections), folder, progress.append, tracker), folder, tracker, progress


def partition_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 leaves parameters below 100,000 elements whole, which here are all of them: partition them too."""
    plain = engine_module.deepspeed_config

    def config(options: Optimizer, zero_stage: int, offload: str = "none") -> dict[str, Any]:
        made = plain(options, zero_stage, offload)
        if zero_stage == 3:
            made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    monkeypatch.setattr(engine_module, "deepspeed_config", config)
