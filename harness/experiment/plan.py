"""Expands an experiment into its trials and their ids, and makes the plan. Needs neither torch nor Ray.

A trial's id is a hash of everything that affects its result (task, backbone, adapter, budget, seed, optimizer,
evaluation) and of nothing else, so a trial keeps its id when the grid grows or is reordered, and on every cluster.
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
    """Everything that affects the result of one trial, with defaults."""

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
        """The first twelve hexadecimal digits of the SHA-256 of the spec as canonical JSON.

        Display names, ``tried_learning_rates`` and the primary metric are left out; they do not affect the result.
        """
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
    """All trials of an experiment, in the order of the file; seeds vary fastest.

    Raises:
        UserError: two entries of the experiment describe the same trial.
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
            f"{experiment.top / 'adapters'}: two entries describe the same trial: "
            f"{adapter.label} {adapter.grouping_name}".rstrip()
        )
    return specs


def _with_encoders(backbone: Backbone, task: TaskChoice) -> Backbone:
    """The backbone with an encoder for each modality of the task: the configured one, else the modality's default."""
    encoders = {
        modality: backbone.encoders.get(modality) or MODALITIES.load(plugin.target).default_encoder
        for modality, plugin in task.modalities.items()
    }
    return backbone.model_copy(update={"encoders": encoders})


def describe(experiment: Experiment, specs: list[TrialSpec], metrics: tuple[MetricInfo, ...], mlflow_uri: str) -> Plan:
    """The plan, as stored in the run folder and read by the report.

    Args:
        experiment: the experiment.
        specs: its trials.
        metrics: of its tasks.
        mlflow_uri: without a password.

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
