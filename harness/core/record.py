"""Schemas of plans and trial records, their files, and reading a run folder.

A run folder contains ``plan.json`` (the planned trials), ``trials/<trial_id>/record.json`` (one for each trial that has
ended; the status ``finished`` marks it as done), ``trials/<trial_id>/examples.parquet`` (per-example scores) and
``profile.json`` (speed and memory of the methods; see profile.py).
Results can be read without torch, Ray or a GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import Field, FiniteFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from harness.core.files import write_atomically
from harness.core.inside import TrialId, links_in
from harness.core.profile import Profile, read_profile
from harness.core.registry import plugins_in
from harness.core.schema import Schema, read_strictly
from harness.core.search import Halving, Search, read_decisions
from harness.core.weights import model_key, models_of

# "paused" is the status of a trial that waits at a rung of halving; it has no record yet, only paused.json.
Status = Literal["finished", "failed", "out_of_memory", "pruned", "cancelled", "paused"]


# How a score of the whole split is computed from its examples: see harness/core/formulas.py.
Formula = Literal["mean", "ratio", "bleu", "meteor"]


# On what scale scores are compared: see results/statistics/scales.py.
MetricScale = Literal["log", "logit", "identity"]
_FROM_ZERO_TO_ONE = ("bleu", "meteor")  # formulas


class MetricInfo(Schema):
    """A metric: its name and label, its direction, its range, and how it is computed from the examples.

    Where the scale is not given, perplexities have the logarithm and scores between two bounds the logit.
    """

    name: str
    label: str
    higher_is_better: bool
    corpus: Formula = "mean"
    scale: MetricScale = "identity"
    lower: FiniteFloat | None = None  # no score is below; None: unbounded
    upper: FiniteFloat | None = None  # no score is above

    @model_validator(mode="before")
    @classmethod
    def _with_range(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "name" not in given:
            return given
        found = dict(given)
        if found.get("lower") is None and str(found["name"]).rpartition("/")[2].startswith("perplexity"):
            found = {"scale": "log", **found, "lower": 1.0}
        if found.get("lower") is None and found.get("corpus") in _FROM_ZERO_TO_ONE:
            found |= {"lower": 0.0, "upper": 1.0}
        if found.get("lower") is not None and found.get("upper") is not None:
            found = {"scale": "logit", **found}
        return found


class PlannedTrial(Schema):
    """One trial of the plan: the fields that the report needs."""

    trial_id: TrialId
    label: str  # "LoRA r=4": the method and its options, without grouping, budget and seed
    method: str  # registry name: "lora"
    grouping: str  # "agnostic", "specific", "image=vision text=language"; "" where the method has no groups
    setting: str  # what else varies: "examples=1024 epochs=8"; all rows of one table have the same
    seed: int
    learning_rate: float | None = None  # trials that differ only in it are candidates of one search
    tried_learning_rates: tuple[float, ...] = ()  # candidates tried before this run, from the experiment file
    search: Search | None = None  # how the learning rate was proposed; None: it was given as it is
    halving: Halving | None = None  # of the candidates of its row; None: all are trained to the end
    options: dict[str, Any] = Field(default_factory=dict)  # those in which trials differ, by their columns' names


class Plan(Schema):
    """``plan.json``: all trials of an experiment, in order, and its metrics."""

    schema_version: Literal[1] = 1
    experiment: str
    experiment_file: str
    primary_metric: str
    metrics: tuple[MetricInfo, ...]
    reference_method: str = "full"  # the baseline that other methods are compared with
    # Scores that differ by no more are as good as equal: relative for scores compared by ratio, else absolute.
    equivalence_margin: FiniteFloat = 0.01
    mlflow_uri: str | None = None  # without its password
    fingerprints: dict[str, str | None] = Field(default_factory=dict)  # "language_model ./model" → fingerprint
    plugins: dict[str, str] = Field(default_factory=dict)  # "context-peft-harness:lora" → its result version
    options: dict[str, Any] = Field(default_factory=dict)  # "budget.examples" → its value, where all trials have it
    trials: tuple[PlannedTrial, ...]

    def rows(self) -> dict[tuple[str, str, str], list[PlannedTrial]]:
        """The trials by label, grouping and setting, in order: they differ in seed and learning rate."""
        rows: dict[tuple[str, str, str], list[PlannedTrial]] = {}
        for trial in self.trials:
            rows.setdefault((trial.label, trial.grouping, trial.setting), []).append(trial)
        return rows


class Epoch(Schema):
    """Results of one pass over the training examples. Perplexity is exp(total NLL / total target tokens)."""

    epoch: int  # from 1
    step: int  # optimizer steps so far
    train_loss: FiniteFloat
    validation_perplexity: FiniteFloat
    learning_rate: FiniteFloat


class Parameters(Schema):
    """Parameter counts of a model, each parameter counted once."""

    trainable: int
    adapter: int  # in adapter groups; 0 for none and full
    projector: int
    language_model: int
    encoder: int
    total: int
    by_group: dict[str, int] = Field(default_factory=dict)


class Memory(Schema):
    """Memory of training in bytes, by kind, without the frozen encoders, which run before training.

    With several workers it is what one device must have: of each kind that of the worker with the most, where what ZeRO
    spreads over the workers counts with a worker's part.

    The values of the process are resident memory on a CPU (including the interpreter and memory kept from earlier
    trials in the process) and allocated memory on a GPU. Their difference is what this trial added.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int  # saved for backward: the maximum over the warm-up steps
    process_peak_bytes: int | None = None  # absent where the system cannot reset its high-water mark
    process_before_bytes: int | None = None  # the same value before the model was built


class Packed(Schema):
    """The trials of one process that a trial trained with (``resources.pack``).

    Then its memory has no values of the process, and where steps were taken together it has no throughput; its times
    are its share of steps that were.
    """

    members: int  # trials, with this one
    alone: str | None = None  # why they took their training steps alone; absent: they took them together


class Throughput(Schema):
    """Steady-state training speed, without warm-up steps, evaluation and checkpoints."""

    examples_per_s: FiniteFloat
    tokens_per_s: FiniteFloat  # positions the language model processed, padding excluded
    measured_steps: int


class Data(Schema):
    """Fingerprints of the data: trials are comparable only if these are equal (see results/leaderboard/matched.py)."""

    examples: int
    examples_fingerprint: str  # SHA-256 over the sorted ids and content of the training examples
    order_fingerprint: str  # SHA-256 over (epoch, example, reference) in training order
    evaluation_fingerprint: str  # SHA-256 over the validation and test examples
    steps: int  # optimizer steps
    started_from: tuple[str, ...] = ()  # SHA-256 of the weights that init_from loaded: they were trained on more data


class Answers(Schema):
    """The texts generated for the test split, apart from their scores; in a mixture, those of one task.

    Texts are counted with white space collapsed. The baselines exist where answers are short and repeat, for the
    metrics that are ``of_answers``: an answer that is right for many examples scores without looking at any input.
    """

    texts: int  # how many test examples
    distinct: int  # how many different texts
    commonest: str  # the beginning of the most frequent one
    commonest_count: int
    distinct_references: int  # how many different first references
    majority: str = ""  # the most frequent answer of the training examples; "": they hardly repeat
    training_answers: int | None = None  # how many different answers they have
    majority_scores: dict[str, FiniteFloat] = Field(default_factory=dict)  # metric → score of that answer to everything
    chance_scores: dict[str, FiniteFloat] = Field(default_factory=dict)  # metric → expected score of a random answer


class Pruned(Schema):
    """Why a trial was pruned: its learning rate was not among those that went on from a rung."""

    epoch: int  # the rung
    halving: Halving
    # Up to the rung, mean over seeds: of its learning rate (None: a seed failed), and of the best one of the row.
    validation_perplexity: FiniteFloat | None
    best_validation_perplexity: FiniteFloat | None
    candidates: int  # learning rates that were compared
    kept: int  # those that went on


class TrialRecord(Schema):
    """The result of one trial. A metric that was not measured is absent, never 0."""

    schema_version: Literal[1] = 1
    trial_id: TrialId
    experiment: str
    status: Status
    reason: str | None = None  # one line, for every status except finished
    pruned: Pruned | None = None  # for the status pruned
    spec: dict[str, Any]  # the resolved TrialSpec, with defaults
    seed: int
    metrics: dict[str, dict[str, FiniteFloat]] = Field(default_factory=dict)  # split → metric → value
    answers: dict[str, Answers] = Field(default_factory=dict)  # task of a mixture, or "" → its generated texts
    history: tuple[Epoch, ...] = ()
    best_epoch: int | None = None  # the epoch whose weights were tested: lowest validation perplexity
    parameters: Parameters | None = None
    memory: Memory | None = None
    throughput: Throughput | None = None
    data: Data | None = None
    wall_time_s: FiniteFloat  # of all phases, including those before a restart
    phases_s: dict[str, FiniteFloat] = Field(default_factory=dict)  # "build", "train", "compile", "validate", "test"
    started_at: str  # ISO 8601, UTC
    versions: dict[str, str] = Field(default_factory=dict)
    git_revision: str | None = None
    device: str = ""
    pack: Packed | None = None  # None: it trained alone
    workers: int = 1  # processes that trained together; throughput is of all, memory of the one with the most
    warnings: tuple[str, ...] = ()
    mlflow_run_id: str | None = None

    @model_serializer(mode="wrap")
    def _without_pack(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``pack`` where there is none: such records are as before there were packs."""
        content: dict[str, Any] = dump(self)
        return {key: value for key, value in content.items() if key != "pack" or value is not None}


def record_path(run: Path, trial_id: str) -> Path:
    """Path of a trial's record in a run folder."""
    return run / "trials" / trial_id / "record.json"


def paused_path(run: Path, trial_id: str) -> Path:
    """Path of what a trial that waits at a rung of halving has recorded; it is there until the trial has a record."""
    return run / "trials" / trial_id / "paused.json"


def waiting_at(run: Path, trial_id: str, rungs: Collection[int]) -> int | None:
    """The one of these rungs, epochs, at which a trial waits; None if it does not wait."""
    path = paused_path(run, trial_id)
    epochs = len(read_record(path).history) if path.exists() else 0
    return epochs if epochs in rungs else None


def write_record(run: Path, record: TrialRecord) -> None:
    """Write the record atomically; a trial does this last."""
    write_atomically(record_path(run, record.trial_id), record.model_dump_json(indent=1) + "\n")


def read_record(path: Path) -> TrialRecord:
    """Read one record.

    Raises:
        ValueError: the file is not a record of this schema; the message names the file.
    """
    try:
        if path.is_symlink():
            raise ValueError(f"{path}: not a trial record: a link, which is not followed")
        return read_strictly(TrialRecord, path, "a trial record")
    except OSError as error:
        raise ValueError(f"{path}: not a trial record: {error}") from error


@dataclass(frozen=True)
class Run:
    """The content of a run folder: its plan, the records of planned trials, and files that could not be read."""

    folder: Path
    plan: Plan
    records: dict[str, TrialRecord]  # by trial id; only trials of the plan
    broken: tuple[str, ...]  # one message per unreadable record file, or profile
    foreign: tuple[str, ...]  # ids of trials on disk but not in the plan (from an earlier version of the experiment)
    folders: Mapping[str, Path] = field(default_factory=dict)  # trial id → its run folder, if it is not ``folder``
    notes: tuple[str, ...] = ()  # from joining several run folders
    foreign_reasons: tuple[str, ...] = ()  # for each of ``foreign``: what changed; empty if it is not known
    profile: Profile | None = None  # speed and memory measured apart from training; None if they were not
    out: frozenset[str] = frozenset()  # ids of trials whose learning rate halving has pruned; they are not run again

    @property
    def foreign_lines(self) -> list[str]:
        """``2 records belong to trials not in the plan: language_model weights changed (./model)``."""
        lines = []
        for reason, number in Counter(self.foreign_reasons or [""] * len(self.foreign)).items():
            start = "1 record belongs to a trial" if number == 1 else f"{number} records belong to trials"
            lines.append(f"{start} not in the plan{': ' if reason else ''}{reason}")
        return lines

    def trial_folder(self, trial_id: str) -> Path:
        """Folder of a trial's files."""
        return self.folders.get(trial_id, self.folder) / "trials" / trial_id


class Part(Protocol):
    """A run folder, or what is known of it."""

    @property
    def plan(self) -> Plan:
        """Its plan."""

    @property
    def records(self) -> Mapping[str, Any]:
        """Of its trials."""


_Part = TypeVar("_Part", bound=Part)


def narrowed(run: _Part, selected: Collection[str]) -> _Part:
    """A run with these trials of its plan alone."""
    trials = tuple(trial for trial in run.plan.trials if trial.trial_id in selected)
    records = {trial_id: record for trial_id, record in run.records.items() if trial_id in selected}
    changed: Any = replace(run, plan=run.plan.model_copy(update={"trials": trials}), records=records)  # type: ignore[type-var]
    return changed  # type: ignore[no-any-return]


def read_run(folder: Path) -> Run:
    """Read a run folder; unreadable records are listed in the result, never skipped silently.

    Raises:
        FileNotFoundError: the folder has no plan.
        ValueError: the plan is invalid.
    """
    plan = read_plan(folder)
    planned = {trial.trial_id for trial in plan.trials}
    records: dict[str, TrialRecord] = {}
    broken: list[str] = []
    foreign: dict[str, str] = {}
    trials = folder / "trials"
    links = set(links_in(folder))
    broken += [f"{folder / name}: a link, which is not followed" for name in sorted(links)]
    if trials.exists() and not trials.is_dir():
        broken.append(f"{trials}: not a folder of trials")
    for name in sorted(path.name for path in trials.iterdir()) if trials.is_dir() and "trials" not in links else ():
        if f"trials/{name}" in links:
            continue
        path = record_path(folder, name)
        if not os.path.lexists(path):  # the trial has not ended; a dangling link is a broken record
            continue
        try:
            record = read_record(path)
        except ValueError as error:
            broken.append(str(error))
            continue
        if name != record.trial_id:
            broken.append(f"{path}: contains the record of another trial, {record.trial_id}")
        elif record.trial_id in planned:
            records[record.trial_id] = record
        else:
            foreign[record.trial_id] = _what_changed(plan, record)
    try:
        profile = read_profile(folder)
    except ValueError as error:
        profile = None
        broken.append(str(error))
    out: frozenset[str] = frozenset()
    try:
        out = frozenset(trial_id for decision in read_decisions(folder) for trial_id in decision.out)
    except ValueError as error:
        broken.append(str(error))
    reasons = tuple(foreign.values())
    return Run(folder, plan, records, tuple(broken), tuple(foreign), foreign_reasons=reasons, profile=profile, out=out)


def _what_changed(plan: Plan, record: TrialRecord) -> str:
    """Which models and plugins of a record are others than those of the same name in the plan."""
    known = record.spec.get("fingerprints") or {}
    changed = []
    for key, (name, revision) in models_of(record.spec.get("backbone") or {}).items():
        planned = plan.fingerprints.get(model_key(key, name, revision))
        if planned and not known:
            return "recorded by an earlier version, without fingerprints of its models"
        if planned and known.get(key) and known[key] != planned:
            changed.append(f"{key} weights changed ({name})")
    for plugin in {plugin.key: plugin for plugin in plugins_in(record.spec)}.values():
        now, before = plan.plugins.get(plugin.key), str(plugin.result_version)
        if now and now != before:
            own, files = (now.partition("+")[i] == before.partition("+")[i] for i in (0, 2))
            what = "code" if files else "data files" if own else "code and data files"
            changed.append(f"{what} of {plugin.name} changed ({before}, now {now})")
    return ", ".join(changed)


def read_plan(folder: Path) -> Plan:
    """Read the plan of a run folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is invalid; the message names the file.
    """
    path = folder / "plan.json"
    try:
        return read_strictly(Plan, path, "the plan of a run")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path}: not the plan of a run: {error}") from error
