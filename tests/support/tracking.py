"""Trials and records to log to MLflow: made-up numbers, every field filled in."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from harness.core.files import write_atomically
from harness.core.record import Data, Memory, MetricInfo, Parameters, Plan, PlannedTrial, Throughput, TrialRecord
from harness.experiment.load import Experiment
from harness.experiment.plan import TrialSpec, describe, expand
from harness.tracking.grid import Grid, open_grid
from harness.tracking.store import default_uri

Trial = tuple[TrialSpec, PlannedTrial]
EXPERIMENT = """\
name: grid
task: scenes
adapters: [{method: lora, rank: 4, grouping: [specific, {image: vision, text: null}], learning_rate: 6e-3}]
budget: {examples: [64, 128]}
"""


def four_trials() -> list[Trial]:
    """Two groupings, two budgets."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "experiment.yaml")
        path.write_text(EXPERIMENT, encoding="utf-8")
        experiment = Experiment.from_yaml(path)
    specs = expand(experiment)
    info = MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False)
    return list(zip(specs, describe(experiment, specs, (info,), "").trials, strict=True))


def new_grid(runs: Path, name: str) -> Grid:
    """The parent run of a run folder, in the database next to it."""
    (runs / name).mkdir(exist_ok=True)
    return open_grid(default_uri(runs), name, runs / name)


def write_plan(folder: Path, trials: list[Trial]) -> None:
    """``plan.json`` and ``experiment.yaml`` of a run folder."""
    plan = Plan(
        experiment="grid", experiment_file="e.yaml", primary_metric="cider", metrics=(),
        trials=tuple(planned for _, planned in trials),
    )  # fmt: skip
    write_atomically(folder / "plan.json", plan.model_dump_json())
    write_atomically(folder / "experiment.yaml", "name: grid\n")


def finished_record(planned: PlannedTrial, run_id: str | None, **changes: Any) -> TrialRecord:
    fields: dict[str, Any] = {
        "trial_id": planned.trial_id,
        "experiment": "grid",
        "status": "finished",
        "spec": {"task": {"name": "scenes"}},
        "seed": 0,
        "metrics": {"validation": {"perplexity": 8.0}, "test": {"perplexity": 7.5, "cider": 0.5}},
        "history": ({"epoch": 1, "step": 4, "train_loss": 2.0, "validation_perplexity": 9.0, "learning_rate": 1e-3},),
        "parameters": Parameters(trainable=30, adapter=20, projector=10, language_model=100, encoder=50, total=180),
        "memory": Memory(weights_bytes=4, gradients_bytes=3, optimizer_bytes=2, activations_bytes=1),
        "throughput": Throughput(examples_per_s=12.5, tokens_per_s=100.0, measured_steps=4),
        "data": Data(
            examples=64,
            examples_fingerprint="e" * 64,
            order_fingerprint="o" * 64,
            evaluation_fingerprint="v" * 64,
            steps=4,
        ),
        "best_epoch": 1,
        "device": "cpu",
        "git_revision": "0123456789ab",
        "wall_time_s": 1.5,
        "phases_s": {"train": 1.25},
        "started_at": "2026-01-01T00:00:00+00:00",
        "mlflow_run_id": run_id,
    }
    return TrialRecord(**fields | changes)


def artifacts(client: MlflowClient, run_id: str, under: str = "") -> list[str]:
    """Every file, those in folders too."""
    found = client.list_artifacts(run_id, under)
    return sorted(
        path for info in found for path in (artifacts(client, run_id, info.path) if info.is_dir else [info.path])
    )
