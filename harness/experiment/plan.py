"""Experiment → trials: a pure expansion of the axes. Needs neither torch nor Ray.

A trial's id is a hash of everything that affects its result (task, backbone, adapter, budget, seed, optimizer,
evaluation) and of nothing else, so that the same trial is recognised in any order, on any cluster, in a grown grid.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter

from pydantic import BaseModel, ConfigDict

from harness.core import naming
from harness.core.errors import UserError, did_you_mean
from harness.core.record import MetricInfo, Plan, PlannedTrial
from harness.core.registry import identity
from harness.experiment.load import Experiment
from harness.experiment.sections import AdapterChoice, Backbone, Budget, Evaluation, Optimizer, TaskChoice
from tasks.registry import MODALITIES


class TrialSpec(BaseModel):
    """Everything that affects one trial's result, defaults filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: TaskChoice
    backbone: Backbone
    adapter: AdapterChoice
    budget: Budget
    optimizer: Optimizer
    eval: Evaluation
    seed: int

    @property
    def trial_id(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the canonical JSON; names for people are left out of it,
        and what was tried before."""
        content = self.model_dump(
            mode="json",
            exclude={
                "adapter": {
                    "label": True,
                    "grouping_name": True,
                    "learning_rate": True,
                    "tried_learning_rates": True,
                    "init_from": {"__all__": {"trial"}},
                },
                "eval": {"primary_metric"},
            },
        )
        return hashlib.sha256(json.dumps(identity(content), sort_keys=True).encode()).hexdigest()[:12]


def expand(experiment: Experiment) -> list[TrialSpec]:
    """All trials of an experiment, in the file's order, seeds varying fastest.

    Raises:
        UserError: two entries of the file describe the same trial.
    """
    specs = []
    for task, choices in zip(experiment.tasks, experiment.adapters, strict=True):
        axes = (experiment.backbones, experiment.budgets, experiment.optimizers, choices, experiment.seeds)
        for backbone, budget, optimizer, adapter, seed in itertools.product(*axes):
            rate = adapter.learning_rate or optimizer.learning_rate
            specs.append(
                TrialSpec(
                    task=task,
                    backbone=_with_encoders(backbone, task),
                    adapter=adapter,
                    budget=budget,
                    optimizer=optimizer.model_copy(update={"learning_rate": rate}),
                    eval=experiment.evaluation,
                    seed=seed,
                )
            )
    counts = Counter(spec.trial_id for spec in specs)
    repeated = next((spec for spec in specs if counts[spec.trial_id] > 1), None)
    if repeated:
        adapter = repeated.adapter
        raise UserError(
            f"{experiment.top / 'adapters'}: the same trial is asked for twice: "
            f"{adapter.label} {adapter.grouping_name}".rstrip()
        )
    return specs


def _with_encoders(backbone: Backbone, task: TaskChoice) -> Backbone:
    """The encoders that the task's modalities need, those named in the file before the defaults."""
    encoders = {
        modality: backbone.encoders.get(modality) or MODALITIES.load(plugin.target).default_encoder
        for modality, plugin in task.modalities.items()
    }
    return backbone.model_copy(update={"encoders": encoders})


def describe(experiment: Experiment, specs: list[TrialSpec], metrics: tuple[MetricInfo, ...], mlflow_uri: str) -> Plan:
    """The plan as the run folder keeps it and the report reads it.

    Raises:
        UserError: ``eval.primary_metric`` is not among the metrics.
    """
    names = [metric.name for metric in metrics]
    primary = experiment.evaluation.primary_metric
    if primary not in names:
        where = experiment.top / "eval" / "primary_metric"
        raise UserError(f"{where}: unknown metric {primary!r}; {did_you_mean(primary, names)}")
    dumps = {spec.trial_id: spec.model_dump(mode="json") for spec in specs}
    labels, settings = naming.labels(dumps), naming.settings(dumps)
    trials = tuple(
        PlannedTrial(
            trial_id=spec.trial_id,
            label=labels[spec.trial_id],
            method=spec.adapter.method,
            grouping=spec.adapter.grouping_name,
            setting=settings[spec.trial_id],
            seed=spec.seed,
            learning_rate=spec.optimizer.learning_rate,
            tried_learning_rates=spec.adapter.tried_learning_rates,
        )
        for spec in specs
    )
    return Plan(
        experiment=experiment.name,
        experiment_file=str(experiment.file or ""),
        primary_metric=primary,
        metrics=metrics,
        mlflow_uri=mlflow_uri,
        trials=trials,
    )
