"""An experiment: one YAML file, typed. Any value may be a list, which makes it an axis of the grid.

Everything wrong is found here, before any compute: unknown keys (with the nearest name), wrong types, empty axes,
unknown plugins, each with the file, the line and the key path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from harness.axes import axes, check
from harness.choices import REGISTRIES, choose_adapters, choose_task, task_axes
from harness.errors import UserError, did_you_mean
from harness.registry import add_file
from harness.sections import (
    AdapterChoice,
    Backbone,
    Budget,
    Evaluation,
    Optimizer,
    Resources,
    Section,
    TaskChoice,
    Tracking,
)
from harness.yaml_source import Source, read_yaml


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


class _File(Section):
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
    plugins: list[str] = Field(default_factory=list)  # Python files, relative to this one


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
    for number, plugin in enumerate(file.plugins):
        add_file(path.parent / Path(plugin).expanduser(), source.where(("plugins", number)), REGISTRIES)
    evaluation = check(Evaluation, file.eval, ("eval",), source)
    tasks = tuple(choose_task(v, evaluation.metrics, source) for v in task_axes(_named(file.task), source))
    backbones = tuple(_backbones(file.backbone, source))
    adapters = tuple(tuple(choose_adapters(file.adapters, task, source)) for task in tasks)
    optimizers = tuple(
        check(Optimizer, v, ("optimizer",), source) for v in axes(file.optimizer, ("optimizer",), source)
    )
    _check_learning_rates(adapters, optimizers, source)
    _check_encoders(tasks, backbones, source)
    return Experiment(
        name=file.name or path.stem,
        source=source,
        tasks=tasks,
        backbones=backbones,
        adapters=adapters,
        budgets=tuple(check(Budget, v, ("budget",), source) for v in axes(file.budget, ("budget",), source)),
        seeds=tuple(file.seeds),
        optimizers=optimizers,
        evaluation=evaluation,
        resources=check(Resources, file.resources, ("resources",), source),
        tracking=check(Tracking, file.tracking, ("tracking",), source),
    )


def _named(task: str | dict[str, Any]) -> dict[str, Any]:
    return {"name": task} if isinstance(task, str) else task


def _backbones(section: Mapping[str, Any], source: Source) -> Iterator[Backbone]:
    # A mapping under `roles` is one table of roles, not a section with axes of its own.
    fixed = {"roles": [section["roles"]]} if isinstance(section.get("roles"), dict) else {}
    for variant in axes({**section, **fixed}, ("backbone",), source):
        backbone = check(Backbone, variant, ("backbone",), source)
        if backbone.roles is not None:
            from adapters.roles import parse_roles

            try:
                parse_roles(backbone.roles)
            except UserError as error:
                raise UserError(f"{source.where(('backbone', 'roles'))}: {error}") from None
        yield backbone


def _check_encoders(tasks: tuple[TaskChoice, ...], backbones: tuple[Backbone, ...], source: Source) -> None:
    used = {modality for task in tasks for modality in task.modalities}
    for modality in {modality for backbone in backbones for modality in backbone.encoders}:
        if modality not in used:
            near = did_you_mean(modality, used)
            where = source.where(("backbone", "encoders", modality))
            raise UserError(f"{where}: no task of this experiment reads {modality!r}; {near}")


def _check_learning_rates(
    adapters: tuple[tuple[AdapterChoice, ...], ...], optimizers: tuple[Optimizer, ...], source: Source
) -> None:
    without = [choice.label for choices in adapters for choice in choices if choice.learning_rate is None]
    if without and any(optimizer.learning_rate is None for optimizer in optimizers):
        raise UserError(
            f"{source.where(('optimizer', 'learning_rate'))}: no learning rate for "
            f"{', '.join(dict.fromkeys(without))}; set optimizer.learning_rate, or learning_rate in the adapter"
        )
