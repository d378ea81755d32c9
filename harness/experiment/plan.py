"""Expands an experiment into its trials and their ids, and makes the plan. Needs neither torch nor Ray.

A trial's id is a hash of everything that affects its result (task, backbone, adapter, budget, seed, optimizer,
evaluation) and of nothing else, so a trial keeps its id when the grid grows or is reordered, and on every cluster.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from harness.core import naming
from harness.core.columns import options_of
from harness.core.errors import UserError, did_you_mean
from harness.core.paths import locate_model
from harness.core.record import MetricInfo, Plan, PlannedTrial
from harness.core.registry import plugins_in
from harness.core.search import ADAPTIVE
from harness.core.weights import COMMIT, fingerprint, model_key, models_of, pinned
from harness.experiment.load import Experiment
from harness.experiment.samplers import first_candidates, next_candidate
from harness.experiment.sections import AdapterChoice, Backbone, Budget, Evaluation, Optimizer, TaskChoice
from harness.experiment.shared import distinct, sections_of, sha256_of, shared_dump, with_rate
from tasks.registry import ENCODERS, MODALITIES


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
    # Of each model of the backbone, by its key: see harness/core/weights.py. None: the weights are not on this machine.
    fingerprints: dict[str, str | None] = Field(default_factory=dict)
    # The absolute folder that relative paths of the sections start from. It does not affect results.
    relative_to: str | None = None

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return Path(self.relative_to or "")

    @property
    def pinned_backbone(self) -> Backbone:
        """The backbone with every hub id at the commit that the trial was planned with, and every folder located."""
        backbone = self.backbone
        commit = self.fingerprints.get("language_model") or ""
        revision = commit.removeprefix(COMMIT) if commit.startswith(COMMIT) else backbone.revision
        language_model = locate_model(backbone.language_model, self.folder)
        encoders = {
            m: pinned(locate_model(name, self.folder), self.fingerprints.get(f"encoders.{m}"))
            for m, name in backbone.encoders.items()
        }
        return backbone.model_copy(
            update={
                "model": backbone.model and language_model,
                "language_model": language_model,
                "revision": revision,
                "encoders": encoders,
            }
        )

    @property
    def trial_id(self) -> str:
        """The first twelve hexadecimal digits of the SHA-256 of the spec as canonical JSON.

        Display names, ``tried_learning_rates``, the primary metric, the margin and the folder of the experiment do not
        affect the result and are left out.
        """
        return sha256_of(self, _IN_ID, _NOT_IN_ID)[:12]


_OF_MODEL = {"image", "audio"}  # modalities that a model with an encoder of its own may read
_NOT_IN_ID: dict[str, dict[str, Any]] = {
    "adapter": {
        "label": True,
        "grouping_name": True,
        "learning_rate": True,
        "tried_learning_rates": True,
        "init_from": {"__all__": {"trial"}},
    },
    "eval": {"primary_metric": True, "equivalence_margin": True},
}
_IN_ID = tuple(TrialSpec.model_fields.keys() - {"relative_to"})


@dataclass(frozen=True)
class Earlier:
    """What is known of an experiment's trials when its plan is made again.

    Attributes:
        planned: the trials of the last plan, by id.
        scores: of the trials that have ended, by id: validation perplexity, or None if it failed.
    """

    planned: Mapping[str, PlannedTrial] = field(default_factory=dict)
    scores: Mapping[str, float | None] = field(default_factory=dict)


def expand(experiment: Experiment, earlier: Earlier | None = None) -> list[TrialSpec]:
    """All trials of an experiment, in the order of the file; seeds vary fastest.

    Args:
        experiment: the experiment.
        earlier: for samplers that learn: a row gets its next learning rate when its earlier ones have ended.

    Raises:
        UserError: two entries of the experiment describe the same trial.
    """
    specs = []
    known: dict[tuple[str, str | None], str | None] = {}
    for task, choices in zip(experiment.tasks, experiment.adapters, strict=True):
        for given in experiment.backbones:
            backbone = _with_encoders(given, task, experiment)
            sections = itertools.product(experiment.budgets, experiment.optimizers, choices)
            first = TrialSpec(
                task=task,
                backbone=backbone,
                adapter=choices[0],
                budget=experiment.budgets[0],
                optimizer=experiment.optimizers[0],
                eval=experiment.evaluation,
                seed=experiment.seeds[0],
                fingerprints=_fingerprints(backbone, known, experiment),
                relative_to=str(experiment.folder),
            )
            for budget, optimizer, adapter in sections:
                spec = first.model_copy(update={"budget": budget, "optimizer": optimizer, "adapter": adapter})
                for rate in _rates(spec, experiment.seeds, earlier or Earlier()):
                    specs += _of_rate(spec, rate, experiment.seeds)
    first_of: dict[str, TrialSpec] = {}
    repeated = next((first for spec in specs if (first := first_of.setdefault(spec.trial_id, spec)) is not spec), None)
    if repeated:
        adapter = repeated.adapter
        raise UserError(
            f"{experiment.top / 'adapters'}: two entries describe the same trial: "
            f"{adapter.label} {adapter.grouping_name}".rstrip()
        )
    return specs


def _of_rate(spec: TrialSpec, rate: float | None, seeds: Sequence[int]) -> list[TrialSpec]:
    optimizer = with_rate(spec.optimizer, rate)
    return [spec.model_copy(update={"optimizer": optimizer, "seed": seed}) for seed in seeds]


def _rates(spec: TrialSpec, seeds: Sequence[int], earlier: Earlier) -> list[float | None]:
    """The learning rates of a row that are known so far, in the order in which they were proposed."""
    adapter = spec.adapter
    if adapter.search is None or adapter.search.sampler not in ADAPTIVE:
        return [adapter.learning_rate or spec.optimizer.learning_rate]

    def ended(rate: float) -> bool:
        return all(trial.trial_id in earlier.scores for trial in _of_rate(spec, rate, seeds))

    def mean(rate: float) -> float | None:
        scores = [earlier.scores[trial.trial_id] for trial in _of_rate(spec, rate, seeds)]
        found = [score for score in scores if score is not None]
        return fmean(found) if len(found) == len(scores) else None

    # What was proposed before stays, also where a trial that failed then has finished since.
    planned = [t for t in earlier.planned.values() if t.search == adapter.search and t.learning_rate is not None]
    before = dict.fromkeys(t.learning_rate for t in planned if t.learning_rate is not None)
    rates = [r for r in before if any(one.trial_id in earlier.planned for one in _of_rate(spec, r, seeds))]
    rates = rates or list(first_candidates(adapter.search))
    while len(rates) < adapter.search.candidates and all(map(ended, rates)):
        rates.append(next_candidate(adapter.search, [(rate, mean(rate)) for rate in rates]))
    return list(rates)


def _with_encoders(backbone: Backbone, task: TaskChoice, experiment: Experiment) -> Backbone:
    """The backbone with an encoder for each modality of the task: the configured one, else the modality's default.

    Raises:
        UserError: no vision- or audio-language model can read a modality of the task.
    """
    if backbone.model is not None:
        if wrong := sorted(set(task.modalities) - _OF_MODEL):
            raise UserError(
                f"{experiment.top / 'backbone' / 'model'}: found {backbone.model!r}, which reads images or recordings, "
                f"and text, but task {task.name} has {', '.join(wrong)}; allowed: a task of these, or language_model "
                "and encoders"
            )
        found = dict.fromkeys(task.modalities, backbone.pinned_language_model)
        return backbone.model_copy(update={"encoders": found, "encoder_plugins": {}})
    encoders = {
        modality: backbone.encoders.get(modality) or MODALITIES.load(plugin.target).default_encoder
        for modality, plugin in task.modalities.items()
    }
    plugins = {modality: ENCODERS.plugin(name) for modality, name in encoders.items() if name in ENCODERS.entries()}
    return backbone.model_copy(update={"encoders": encoders, "encoder_plugins": plugins})


def _fingerprints(
    backbone: Backbone, known: dict[tuple[str, str | None], str | None], experiment: Experiment
) -> dict[str, str | None]:
    """The fingerprints of the backbone's models; each model is read once, and kept in ``known``."""
    found = {}
    for key, (name, revision) in models_of(backbone.model_dump()).items():
        model = locate_model(name, experiment.folder), revision
        if model not in known:
            try:
                known[model] = fingerprint(*model)
            except UserError as error:
                raise UserError(f"{experiment.top / 'backbone' / key}: {error}") from None
        found[key] = known[model]
    return found


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
    ids = [spec.trial_id for spec in specs]
    first_of: dict[tuple[int, ...], str] = {}  # sections → the first trial that has them: seeds are in no name
    firsts = [first_of.setdefault(sections_of(spec), trial_id) for trial_id, spec in zip(ids, specs, strict=True)]
    named = set(first_of.values())
    dumps = {trial_id: shared_dump(spec) for trial_id, spec in zip(ids, specs, strict=True) if trial_id in named}
    labels, settings = naming.labels(dumps), naming.settings(dumps)
    common, own = _options(dumps)
    trials = tuple(
        PlannedTrial(
            trial_id=trial_id,
            label=labels[first],
            method=spec.adapter.method,
            grouping=spec.adapter.grouping_name,
            setting=settings[first],
            seed=spec.seed,
            learning_rate=spec.optimizer.learning_rate,
            tried_learning_rates=spec.adapter.tried_learning_rates,
            search=spec.adapter.search,
            halving=experiment.halving,
            options=own[first],
        )
        for trial_id, first, spec in zip(ids, firsts, specs, strict=True)
    )
    kinds = distinct(specs, "task", "backbone", "adapter", "fingerprints")
    return Plan(
        experiment=experiment.name,
        experiment_file=str(experiment.file or ""),
        primary_metric=primary,
        metrics=metrics,
        equivalence_margin=experiment.evaluation.equivalence_margin,
        mlflow_uri=mlflow_uri,
        fingerprints={
            model_key(key, name, revision): spec.fingerprints.get(key)
            for spec in kinds
            for key, (name, revision) in models_of(shared_dump(spec)["backbone"]).items()
        },
        plugins={p.key: str(p.result_version) for spec in kinds for p in plugins_in(shared_dump(spec))},
        options=common,
        trials=trials,
    )


_SECTIONS = ("task", "backbone", "adapter", "budget", "optimizer", "eval")


def _options(dumps: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options that all specs have alike, and by id those in which they differ.

    Specs share their sections, so each section is looked at once.
    """
    known: dict[int, dict[str, Any]] = {}  # by the identity of a section
    used: dict[str, dict[int, None]] = {section: {} for section in _SECTIONS}
    for dump in dumps.values():
        for section in _SECTIONS:
            key = id(dump[section])
            if key not in known:
                known[key] = options_of({section: dump[section]})
            used[section][key] = None
    common: dict[str, Any] = {}
    for keys in used.values():
        first, *others = [known[key] for key in keys]
        common |= {name: value for name, value in first.items() if all(o.get(name, known) == value for o in others)}
    varying = {key: {name: value for name, value in own.items() if name not in common} for key, own in known.items()}
    return common, {
        trial_id: {name: value for section in _SECTIONS for name, value in varying[id(dump[section])].items()}
        for trial_id, dump in dumps.items()
    }
