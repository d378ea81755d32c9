"""An experiment: one YAML file, typed. Any value may be a list, which makes it an axis of the grid.

Everything wrong is found here, before any compute: unknown keys (with the nearest name), wrong types, empty axes,
unknown plugins, each with the file, the line and the key path.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from harness.contexts import resolve_grouping
from harness.errors import UserError, did_you_mean
from harness.registry import ADAPTERS, METRICS, MODALITIES, TASKS, Entry
from harness.yaml_source import KeyPath, Source, read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Backbone(_Section):
    """The frozen models: names of built-in ones, local folders or Hugging Face hub ids."""

    language_model: str = "builtin/tiny-llama"
    encoders: dict[str, str] = Field(default_factory=lambda: {"image": "builtin/tiny-vision"})  # by modality
    projector_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # before the projector, as in the paper
    trust_remote_code: bool = False
    # Path pattern → role of the language model's layers, where adapters/families.py does not know them.
    roles: dict[str, Any] | None = None


class Budget(_Section):
    """How much data training may see. Smaller budgets of one seed are subsets of larger ones."""

    examples: PositiveInt | Literal["all"] = "all"
    epochs: PositiveInt = 1
    max_target_length: PositiveInt = 63  # tokens of a target text; longer ones are cut (the paper's 63)


class Optimizer(_Section):
    """AdamW and its schedule, in the words of ``transformers.TrainingArguments``."""

    learning_rate: Annotated[float, Field(gt=0)] | None = None  # an adapter's own learning_rate goes before this one
    per_device_train_batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0 switches clipping off
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    bf16: bool = False  # parameters, activations and gradients in bf16, fp32 master weights


class Evaluation(_Section):
    """What is scored, and how captions are generated (greedily)."""

    validation_examples: PositiveInt | Literal["all"] = "all"
    test_examples: PositiveInt | Literal["all"] = "all"
    per_device_eval_batch_size: PositiveInt = 128
    max_new_tokens: PositiveInt = 32
    primary_metric: str = "perplexity"  # what the leaderboard is ordered by


class Resources(_Section):
    """What a trial gets. Nothing here changes a result, so nothing here is part of a trial's id."""

    cpus_per_trial: PositiveInt = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"  # auto: one where there is one
    max_concurrent_trials: PositiveInt | None = None
    zero_stage: Literal[0, 1, 2, 3] = 0  # preset clusters/deepspeed/zero<stage>.json
    checkpoint_interval_s: Annotated[float, Field(ge=0)] = 60.0  # at the first epoch end after this long
    max_failures: Annotated[int, Field(ge=0)] = 1  # times a trial whose worker died is started again


class Tracking(_Section):
    """Where MLflow keeps its runs."""

    mlflow_uri: str | None = None  # default: MLFLOW_TRACKING_URI, else SQLite beside the runs


class AdapterChoice(_Section):
    """One adapter with all axes resolved."""

    method: str
    target: str  # "package.module:Class"
    grouping: dict[str, str | None]  # context → group; None: no adapter on that context
    grouping_name: str  # "agnostic", "specific", "image=vision text=language"; "" where the method has no groups
    config: dict[str, Any]  # the method's options, defaults included
    label: str
    learning_rate: float | None = None


class TaskChoice(_Section):
    """One task with its options resolved."""

    name: str
    target: str  # "package.module:Class"
    modalities: dict[str, str]  # modality → "package.module:Class"
    metric: str  # "package.module:Class"
    config: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A validated experiment; each tuple is one axis of the grid, already expanded."""

    name: str
    source: Source
    tasks: tuple[TaskChoice, ...]
    backbones: tuple[Backbone, ...]
    adapters: tuple[tuple[AdapterChoice, ...], ...]  # one tuple per task, whose contexts the groupings speak of
    budgets: tuple[Budget, ...]
    seeds: tuple[int, ...]
    optimizers: tuple[Optimizer, ...]
    evaluation: Evaluation
    resources: Resources
    tracking: Tracking


class _File(_Section):
    """The file's outermost keys; sections are checked one by one after their axes are expanded."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    task: str | dict[str, Any]
    adapters: Annotated[list[dict[str, Any]], Field(min_length=1)]
    backbone: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0]
    )
    optimizer: dict[str, Any] = Field(default_factory=dict)
    eval: dict[str, Any] = Field(default_factory=dict)
    resources: dict[str, Any] = Field(default_factory=dict)
    tracking: dict[str, Any] = Field(default_factory=dict)


M = TypeVar("M", bound=BaseModel)


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment file.

    Raises:
        UserError: anything in it is wrong; the message says where, what was found and what is allowed.
    """
    source = read_yaml(path)
    if not isinstance(source.data, dict):
        raise UserError(f"{path}: an experiment is a mapping; allowed keys: {', '.join(_File.model_fields)}")
    file = check(_File, source.data, (), source)
    if len(set(file.seeds)) != len(file.seeds):
        raise UserError(f"{source.where(('seeds',))}: a seed is given twice: {file.seeds}")
    tasks = tuple(_task(variant, source) for variant in _axes(_named(file.task), ("task",), source))
    backbones = tuple(_backbones(file.backbone, source))
    adapters = tuple(tuple(_adapters(file.adapters, task, source)) for task in tasks)
    optimizers = tuple(
        check(Optimizer, v, ("optimizer",), source) for v in _axes(file.optimizer, ("optimizer",), source)
    )
    _check_learning_rates(adapters, optimizers, source)
    _check_encoders(tasks, backbones, source)
    return Experiment(
        name=file.name or path.stem,
        source=source,
        tasks=tasks,
        backbones=backbones,
        adapters=adapters,
        budgets=tuple(check(Budget, v, ("budget",), source) for v in _axes(file.budget, ("budget",), source)),
        seeds=tuple(file.seeds),
        optimizers=optimizers,
        evaluation=check(Evaluation, file.eval, ("eval",), source),
        resources=check(Resources, file.resources, ("resources",), source),
        tracking=check(Tracking, file.tracking, ("tracking",), source),
    )


def check(model: type[M], data: Mapping[str, Any], key_path: KeyPath, source: Source) -> M:
    """Validate one section; turn the first error into a UserError with file, line, key path and nearest name."""
    try:
        # By way of JSON, whose strict mode takes a string for a path and a list for a tuple, but not "4" for 4.
        return model.model_validate_json(json.dumps(dict(data), default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        # Alternatives of a union are named in pydantic's location ("int", "literal['all']"): keep what is in the file.
        location = [part for part in first["loc"] if isinstance(part, int) or _stands_in(data, part)]
        missing = first["type"] == "missing"
        where = source.where((*key_path, *location, *(first["loc"][-1:] if missing else ())))
        if first["type"] == "extra_forbidden":
            key = str(first["loc"][-1])
            raise UserError(f"{where}: unknown key {key!r}; {did_you_mean(key, model.model_fields)}") from None
        if missing:
            raise UserError(f"{where}: this key is required") from None
        hint = (
            "; only task, backbone, adapters, budget and optimizer have axes"
            if isinstance(first["input"], list)
            else ""
        )
        raise UserError(f"{where}: {_messages(error, first['loc'])}; found {first['input']!r}{hint}") from None


def _stands_in(data: Any, key: str) -> bool:
    return isinstance(data, Mapping) and (key in data or any(_stands_in(child, key) for child in data.values()))


def _messages(error: ValidationError, location: tuple[int | str, ...]) -> str:
    same = [e["msg"] for e in error.errors() if e["loc"][:1] == location[:1]]
    text = " or ".join(dict.fromkeys(message[:1].lower() + message[1:] for message in same))
    return text.removeprefix("value error, ")


def _named(task: str | dict[str, Any]) -> dict[str, Any]:
    return {"name": task} if isinstance(task, str) else task


def _axes(section: Mapping[str, Any], key_path: KeyPath, source: Source) -> Iterator[dict[str, Any]]:
    """Every combination of the section's list values, the first key varying slowest.

    Raises:
        UserError: an axis is empty, or has a value twice.
    """
    choices: list[list[Any]] = []
    for key, value in section.items():
        here = (*key_path, key)
        if isinstance(value, list):
            if not value:
                raise UserError(f"{source.where(here)}: empty axis; give at least one value")
            if any(value[i] == other for i in range(len(value)) for other in value[:i]):
                raise UserError(f"{source.where(here)}: a value is given twice: {value}")
            choices.append(value)
        elif isinstance(value, dict):
            choices.append(list(_axes(value, here, source)))
        else:
            choices.append([value])
    for combination in itertools.product(*choices):
        yield dict(zip(section, combination, strict=True))


def _task(variant: dict[str, Any], source: Source) -> TaskChoice:
    options = dict(variant)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{source.where(('task',))}: 'name' is required; {did_you_mean('', TASKS.entries())}")
    entry = TASKS.find(name, source.where(("task", "name") if ("task", "name") in source.lines else ("task",)))
    task = TASKS.load(entry.target)
    config = check(task.Config, options, ("task",), source)
    return TaskChoice(
        name=name,
        target=entry.target,
        modalities={modality: MODALITIES.find(modality).target for modality in task.modalities.values()},
        metric=METRICS.find(task.metric).target,
        config=config.model_dump(mode="json"),
    )


def _backbones(section: Mapping[str, Any], source: Source) -> Iterator[Backbone]:
    # A mapping under `roles` is one table of roles, not a section with axes of its own.
    fixed = {"roles": [section["roles"]]} if isinstance(section.get("roles"), dict) else {}
    for variant in _axes({**section, **fixed}, ("backbone",), source):
        backbone = check(Backbone, variant, ("backbone",), source)
        if backbone.roles is not None:
            from adapters.roles import parse_roles

            try:
                parse_roles(backbone.roles)
            except UserError as error:
                raise UserError(f"{source.where(('backbone', 'roles'))}: {error}") from None
        yield backbone


def _adapters(entries: list[dict[str, Any]], task: TaskChoice, source: Source) -> Iterator[AdapterChoice]:
    contexts = TASKS.load(task.target).contexts
    for index, section in enumerate(entries):
        path: KeyPath = ("adapters", index)
        # A mapping under `grouping` is one grouping, not a section with axes of its own.
        fixed = {"grouping": [section["grouping"]]} if isinstance(section.get("grouping"), dict) else {}
        if _names_roles(section.get("where")):  # [q, v] is one place; [A, F] is an axis of two
            fixed["where"] = [section["where"]]
        for variant in _axes({**section, **fixed}, path, source):
            yield _adapter(variant, path, contexts, source)


def _names_roles(where: Any) -> bool:
    from adapters.roles import ROLES

    return isinstance(where, list) and bool(where) and all(isinstance(role, str) and role in ROLES for role in where)


def _adapter(variant: dict[str, Any], path: KeyPath, contexts: tuple[str, ...], source: Source) -> AdapterChoice:
    options = dict(variant)
    name = options.pop("method", None)
    if not isinstance(name, str):
        raise UserError(f"{source.where(path)}: 'method' is required; {did_you_mean('', ADAPTERS.entries())}")
    entry: Entry = ADAPTERS.find(name, source.where((*path, "method")))
    method_class = ADAPTERS.load(entry.target)
    rate = check(Optimizer, {"learning_rate": options.pop("learning_rate", None)}, path, source).learning_rate
    grouping = options.pop("grouping", None)
    if grouping is not None and not method_class.grouped:
        raise UserError(f"{source.where((*path, 'grouping'))}: {name} has no adapter groups; leave 'grouping' out")
    try:
        resolved, grouping_name = resolve_grouping("agnostic" if grouping is None else grouping, contexts)
    except UserError as error:
        raise UserError(f"{source.where((*path, 'grouping'))}: {error}") from None
    config = _method_config(method_class, options, path, source)
    return AdapterChoice(
        method=name,
        target=entry.target,
        grouping=resolved if method_class.grouped else dict.fromkeys(contexts),
        grouping_name=grouping_name if method_class.grouped else "",
        config=config.model_dump(mode="json"),
        label=method_class(config).label(),
        learning_rate=rate,
    )


def _method_config(method_class: Any, options: dict[str, Any], path: KeyPath, source: Source) -> BaseModel:
    """The method's own options; the keys every adapter entry has are named in the error as allowed too."""
    common = ("method", "grouping", "learning_rate")
    for key in options:
        if key not in method_class.Config.model_fields:
            allowed = did_you_mean(key, [*method_class.Config.model_fields, *common])
            raise UserError(f"{source.where((*path, key))}: unknown key {key!r}; {allowed}")
    config: BaseModel = check(method_class.Config, options, path, source)
    return config


def _check_encoders(tasks: tuple[TaskChoice, ...], backbones: tuple[Backbone, ...], source: Source) -> None:
    for task, backbone in itertools.product(tasks, backbones):
        for modality in task.modalities:
            if modality not in backbone.encoders:
                near = did_you_mean(modality, backbone.encoders)
                where = source.where(("backbone", "encoders"))
                raise UserError(f"{where}: task {task.name} needs an encoder for {modality!r}; found {near}")


def _check_learning_rates(
    adapters: tuple[tuple[AdapterChoice, ...], ...], optimizers: tuple[Optimizer, ...], source: Source
) -> None:
    without = [choice.label for choices in adapters for choice in choices if choice.learning_rate is None]
    if without and any(optimizer.learning_rate is None for optimizer in optimizers):
        raise UserError(
            f"{source.where(('optimizer', 'learning_rate'))}: no learning rate for "
            f"{', '.join(dict.fromkeys(without))}; set optimizer.learning_rate, or learning_rate in the adapter"
        )
