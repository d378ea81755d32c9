"""Run folders of small synthetic sweeps, with whole specs and per-example scores, for the tests of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.core import naming
from harness.core.files import write_atomically
from harness.core.record import Plan, PlannedTrial, TrialRecord, write_record
from tests.support.runs import METRICS, fake_record

# label, method, grouping, options, trainable parameters
Method = tuple[str, str, str, dict[str, Any], int]
METHODS: tuple[Method, ...] = (
    ("none", "none", "", {}, 1_000),
    ("LoRA", "lora", "specific", {"rank": 4, "dropout": 0.0}, 40_000),
    ("Full fine-tuning", "full", "", {}, 500_000),
)
ScoreOf = Callable[[int, int, str, str, int], float]  # examples, epochs, method, grouping, seed → CIDEr
Change = Callable[[TrialRecord], TrialRecord | None]


def write_sweep(
    folder: Path,
    score: ScoreOf,
    budgets: Sequence[int] = (64, 256),
    epochs: Sequence[int] = (4,),
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[Method] = METHODS,
    tasks: Sequence[str] = ("scenes",),
    primary: str = "cider",
    examples: int = 12,
    change: Change = lambda record: record,
    by_options: Callable[[dict[str, Any]], float] = lambda _: 0.0,
) -> Path:
    """Write a trial per combination; the largest of several budgets is "all" in its spec. Returns ``folder``."""
    wanted = {}
    for task in tasks:
        for budget in budgets:
            for count in epochs:
                for method in methods:
                    for seed in seeds:
                        asked = "all" if budget == max(budgets) and len(budgets) > 1 else budget
                        trial_id = f"{task}-{budget}-{count}-{methods.index(method)}-{seed}"
                        wanted[trial_id] = (_spec(task, asked, count, method, seed), budget, method)
    specs = {trial_id: spec for trial_id, (spec, *_) in wanted.items()}
    labels, settings = naming.labels(specs), naming.settings(specs)
    trials = []
    for trial_id, (spec, budget, (_, method, grouping, _, trainable)) in wanted.items():
        seed, count = spec["seed"], spec["budget"]["epochs"]
        trial = PlannedTrial(
            trial_id=trial_id,
            label=labels[trial_id],
            method=method,
            grouping=grouping,
            setting=settings[trial_id],
            seed=seed,
        )
        trials.append(trial)
        noise_E = np.random.default_rng(len(trials)).normal(0, 0.004, examples)
        own = spec["adapter"]["config"]
        cider_E = score(budget, count, method, grouping, seed) + by_options(own) + noise_E - noise_E.mean()
        record = change(_record(trial, spec, budget, trainable, float(cider_E.mean())))
        if record is not None:
            write_record(folder, record)
            table = pa.table({"split": ["test"] * examples, "example_id": list(map(str, range(examples))),
                              "cider": cider_E})  # fmt: skip
            pq.write_table(table, folder / "trials" / trial_id / "examples.parquet")
    plan = Plan(experiment="sweep", experiment_file="sweep.yaml", primary_metric=primary, metrics=METRICS,
                trials=tuple(trials))  # fmt: skip
    write_atomically(folder / "plan.json", plan.model_dump_json())
    return folder


def _spec(task: str, budget: int | str, epochs: int, method: Method, seed: int) -> dict[str, Any]:
    label, name, grouping, config, _ = method
    return {
        "task": {"name": task, "config": {}},
        "backbone": {"language_model": "builtin/tiny-llama"},
        "adapter": {"method": name, "label": label, "grouping_name": grouping, "config": config, "init_from": {}},
        "budget": {"examples": budget, "epochs": epochs},
        "optimizer": {"learning_rate": 1e-3},
        "eval": {"num_beams": 1, "primary_metric": "cider"},
        "seed": seed,
    }


def _record(trial: PlannedTrial, spec: dict[str, Any], budget: int, trainable: int, cider: float) -> TrialRecord:
    record = fake_record(trial, trainable, 0.5)
    assert record.data is not None
    data = record.data.model_copy(
        update={
            "examples": budget,
            "examples_fingerprint": f"e{'' if spec['budget']['examples'] == 'all' else trial.seed} {trial.setting}",
            "order_fingerprint": f"o{trial.seed} {trial.setting}",
            "evaluation_fingerprint": spec["task"]["name"],
            "steps": budget * spec["budget"]["epochs"] // 16,
        }
    )
    metrics = {**record.metrics, "test": {**record.metrics["test"], "cider": cider}}
    return record.model_copy(update={"spec": spec, "data": data, "metrics": metrics, "phases_s": {"train": budget / 8}})
