"""The grid of ``make bench`` as an experiment of the harness, and the same trials as jobs of the comparator."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from benchmarks.comparators.trainer_peft import Job
from benchmarks.speed.measure import CORES

if TYPE_CHECKING:
    from harness.experiment.plan import TrialSpec

Arm = Literal["fixed", "trimmed"]
# LoRA, BitFit, IA3 × agnostic, specific × 2 ranks or places × 2 seeds: 24 trials, in the quickstart's setting.
GRID: dict[str, Any] = {
    "name": "speed",
    "task": {"name": "scenes"},
    "backbone": {"language_model": "builtin/tiny-llama", "encoders": {"image": "builtin/tiny-vision"}},
    "adapters": [
        {"method": "lora", "rank": [4, 16], "grouping": ["agnostic", "specific"], "learning_rate": 1.2e-2},
        {"method": "bitfit", "where": ["AF", "A"], "grouping": ["agnostic", "specific"], "learning_rate": 0.12},
        {"method": "ia3", "where": ["AF", "A"], "grouping": ["agnostic", "specific"], "learning_rate": 0.2},
    ],
    "budget": {"examples": 1024, "epochs": 3},
    "seeds": [0, 1],
    "optimizer": {"per_device_train_batch_size": 16, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05},
    "eval": {"validation_examples": 64, "test_examples": 192, "max_new_tokens": 40},
}
WHAT_SPECIFIC_IS = (
    "peft has no adapters by context: for specific LoRA it gets one LoRA of twice the rank (the same number of "
    "parameters), for specific BitFit and IA3 the agnostic form (half of them, and less work)"
)


def grid(
    trials: int | None = None,
    resources: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The grid, or a part of it, as the content of an experiment file.

    Args:
        trials: 6 are LoRA r=4, BitFit and IA3 with seed 0; 12 have both seeds, 24 also the
            other rank or place.
        resources: of the experiment, besides two trials at a time.
        budget: keys that replace those of the grid.
    """
    content: dict[str, Any] = copy.deepcopy(GRID)
    if trials in {6, 12}:
        for entry in content["adapters"]:
            key = "rank" if "rank" in entry else "where"
            entry[key] = entry[key][0]
    if trials == 6:
        content["seeds"] = [0]
    content["budget"] |= budget or {}
    content["resources"] = {"max_concurrent_trials": CORES, **(resources or {})}
    return content


def planned(content: Mapping[str, Any], folder: Path) -> Sequence[TrialSpec]:
    """The trials of an experiment.

    Args:
        content: of its file.
        folder: for the file.
    """
    from harness.experiment.load import Experiment
    from harness.sweep.run import prepare

    path = folder / f"{content['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    return prepare(Experiment.from_yaml(path), folder / "planned").specs


class Jobs:
    """Makes the comparator's jobs of the harness's trials: the same examples, order, captions and evaluation."""

    def __init__(self) -> None:
        self._data: dict[int, dict[str, Any]] = {}  # by seed

    def of(self, spec: TrialSpec, arm: Arm, features: Path | None) -> Job:
        """The job of a trial."""
        from harness.core import hub

        adapter = spec.adapter
        rank = adapter.config.get("rank", 0)
        assert spec.optimizer.learning_rate is not None
        return Job(
            language_model=str(hub.resolve(spec.backbone.language_model)),
            encoder=str(hub.resolve(spec.backbone.encoders["image"])),
            **self._of_seed(spec),
            metrics=[plugin.target for plugin in spec.task.metrics[""].values()],
            method=adapter.method,  # type: ignore[arg-type]
            rank=2 * rank if adapter.grouping_name == "specific" else rank,
            where=adapter.config["where"],
            learning_rate=spec.optimizer.learning_rate,
            optimizer=spec.optimizer.model_dump(mode="json"),
            eval_batch_size=spec.eval.per_device_eval_batch_size,
            max_new_tokens=spec.eval.max_new_tokens,
            max_target_length=spec.budget.max_target_length,
            dropout=spec.backbone.projector_dropout,
            seed=spec.seed,
            padding="max_length" if arm == "fixed" else "longest",
            features=str(features) if features and arm == "trimmed" else None,
        )

    def _of_seed(self, spec: TrialSpec) -> dict[str, Any]:
        if spec.seed not in self._data:
            from harness.model.build import choose_splits, order_of
            from harness.model.components import make_task
            from harness.trial.evaluate import mismatched

            task = make_task(spec)
            task.prepare()
            splits = choose_splits(spec, task)
            order = order_of(spec, task, splits.train)
            draws = [draw for epoch in range(1, spec.budget.epochs + 1) for draw in order.epoch(epoch)]
            others = mismatched(splits.test, seed=0)
            size = spec.optimizer.per_device_train_batch_size
            if order.draws % size:
                raise SystemExit(f"an epoch has {order.draws} examples, which is no multiple of the batch size {size}")
            self._data[spec.seed] = {
                "train": [
                    (_picture(splits.train[d.example]), splits.train[d.example].references[d.reference]) for d in draws
                ],
                "steps_per_epoch": order.draws // size,
                "validation": [(_picture(e), list(e.references)) for e in splits.validation],
                "test": [(_picture(e), list(e.references)) for e in splits.test],
                "wrong": [_picture(e) for e in others or ()],
            }
        return self._data[spec.seed]


def write_job(job: Job, path: Path) -> None:
    """Write a job for the comparator."""
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")


def _picture(example: Any) -> str:
    ((_, path),) = example.files
    return str(path)


def names(specs: Sequence[TrialSpec]) -> list[str]:
    """``LoRA r=4 specific, seed 0``."""
    return [f"{spec.adapter.label} {spec.adapter.grouping_name}, seed {spec.seed}" for spec in specs]
