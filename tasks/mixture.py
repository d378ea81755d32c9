"""Several tasks in one trial, such as captions of pictures and descriptions of time series:

    task: {name: mixture, temperature: 2, tasks: [{name: scenes, train_examples: 64}, {name: trends}]}

A member's examples are unchanged, except that its name is prepended to their ids ("scenes/10000000"). Its share of the
training draws is n^(1/T) / Σ n^(1/T), where n is the number of its training examples: T = 1 is proportional, larger T
is more equal. T5 (Raffel et al. 2020, arXiv 1910.10683, section 3.5.2 "Temperature-scaled mixing", there with a limit
on n), after multilingual BERT (https://github.com/google-research/bert/blob/master/multilingual.md). Alternatively the
share is proportional to its ``weight``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    Field,
    PositiveFloat,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from harness.core.errors import ProblemList, UserError, did_you_mean
from harness.core.registry import Plugin
from tasks.base import Config, Example, Split, Task
from tasks.registry import TASKS
from tasks.splits import SPLITS, check_splits

_KEYS = ("name", "as", "weight")  # of an entry; all others are the task's own options
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*$")


class Member(Config):
    """One of the tasks. An experiment gives ``name``, ``as``, ``weight`` and the task's options side by side."""

    key: str  # `as`, or else the name: stands before ids and metrics
    weight: Annotated[PositiveFloat, Field(allow_inf_nan=False)] | None = None  # share, before division by their sum
    plugin: Plugin  # of the task
    options: dict[str, Any]  # the task's own, defaults included
    _context: dict[str, Any] = PrivateAttr(default_factory=dict)  # where relative paths in the options start from

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, entry: Any, info: ValidationInfo) -> Any:
        """Resolve what an experiment says; what was resolved before (it travels as JSON) stays as it is."""
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, Mapping) or set(entry) == set(cls.model_fields):
            return entry
        name = entry.get("name")
        if not isinstance(name, str):
            raise _error(f"a task needs its name; {did_you_mean('', TASKS.entries())}", "name", entry)
        if name not in TASKS.entries():
            raise _error(f"unknown task {name!r}; {did_you_mean(name, TASKS.entries())}", "name", name)
        plugin = TASKS.plugin(name)
        config_class = TASKS.load(plugin.target).Config
        options = {key: value for key, value in entry.items() if key not in _KEYS}
        for key, value in options.items():
            if key not in config_class.model_fields:
                allowed = did_you_mean(str(key), [*config_class.model_fields, *_KEYS])
                raise _error(f"unknown key {key!r}; {allowed}", key, value)
        config = config_class.model_validate_json(json.dumps(options, default=str), strict=True, context=info.context)
        key = entry.get("as", name)
        if not isinstance(key, str) or not _KEY.match(key):
            raise _error("allowed: a name of letters, digits, '.', '_' and '-'", "as", key)
        own = {"key": key, "weight": entry.get("weight")}
        return {"plugin": plugin.model_dump(), **own, "options": config.model_dump(mode="json")}

    @model_validator(mode="after")
    def _start(self, info: ValidationInfo) -> Self:
        self._context = {**(info.context or {}), "explain": False}
        return self

    def task(self) -> Task:
        """The task, its data not prepared yet."""
        task_class = TASKS.load(self.plugin.target)
        options = json.dumps(self.options)
        task: Task = task_class(task_class.Config.model_validate_json(options, context=self._context))
        return task


def _error(message: str, key: str, found: Any) -> ValidationError:
    details = InitErrorDetails(
        type=PydanticCustomError("member", "{message}", {"message": message}), loc=(key,), input=found
    )
    return ValidationError.from_exception_data("Member", [details])


class MixtureConfig(Config):
    """Which tasks, and how often each is drawn."""

    tasks: tuple[Member, ...]  # each with its name, its options, and `as` and `weight`
    # T of the shares; null: 1, or the weights are used.
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(default=None, validate_default=True)

    @field_validator("tasks")
    @classmethod
    def _keys_and_weights(cls, tasks: tuple[Member, ...]) -> tuple[Member, ...]:
        if len(tasks) < 2:
            raise ValueError("a mixture needs at least two tasks")
        keys = [member.key for member in tasks]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"two tasks are named {twice!r}; rename one of them with 'as'")
        if all(member.weight is None for member in tasks):
            return tasks
        return tuple(member.model_copy(update={"weight": member.weight or 1.0}) for member in tasks)

    @field_validator("temperature")
    @classmethod
    def _or_weights(cls, temperature: float | None, info: ValidationInfo) -> float | None:
        """None where there are weights; 1 where there is neither."""
        weighted = any(member.weight for member in info.data.get("tasks", ()))
        if weighted and temperature is not None:
            raise ValueError("either a temperature or weights of the tasks, not both")
        return temperature if weighted else temperature or 1.0


class Mixture(Task):
    """Several tasks in one trial, each with a share of the training draws and its own metrics."""

    contexts: tuple[str, ...] = ()  # those of its tasks
    modalities: Mapping[str, str] = {}
    metrics = ()
    Config = MixtureConfig
    config: MixtureConfig

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self._members = {member.key: member.task() for member in config.tasks}
        for number, (key, task) in enumerate(self._members.items()):
            if set(task.members()) != {""}:
                raise UserError(f"tasks[{number}]: {key!r} is itself a mixture; list its tasks here instead")
        self.modalities = _modalities(self._members)
        contexts = dict.fromkeys(context for task in self._members.values() for context in task.contexts)
        answers = {task.contexts[-1] for task in self._members.values()}
        # Files, then other inputs, then answers: the last context must be an answer's.
        self.contexts = tuple(sorted(contexts, key=lambda c: (c in answers, c not in self.modalities)))

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Drawn pictures and drawn series."""
        return {"tasks": [{"name": name, **TASKS.load(TASKS.find(name).target).sample(folder)} for name in _SAMPLE]}

    def prepare(self) -> None:
        """Prepare every task, and check that none tests on a file that another one trains on.

        Raises:
            UserError: the data of one could not be loaded, or a file is in two splits.
        """
        for task in self._members.values():
            task.prepare()
        _ = self._splits

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of all tasks, one task after the other."""
        return self._splits[split]

    def members(self) -> Mapping[str, Task]:
        """The tasks by their names in the mixture."""
        return self._members

    def shares(self, sizes: Mapping[str, int]) -> Mapping[str, float]:
        """Proportional to the weights, or to n^(1/temperature)."""
        weights = {member.key: member.weight for member in self.config.tasks}
        claims = {key: weights[key] or n ** (1 / (self.config.temperature or 1)) for key, n in sizes.items()}
        return {key: claim / sum(claims.values()) for key, claim in claims.items()}

    @cached_property
    def _splits(self) -> dict[Split, tuple[Example, ...]]:
        splits: dict[Split, tuple[Example, ...]] = {
            split: tuple(
                replace(
                    example,
                    id=f"{key}/{example.id}",
                    member=key,
                    target=example.target or task.contexts[-1],
                    cluster=None if example.cluster is None else f"{key}/{example.cluster}",
                )
                for key, task in self._members.items()
                for example in task.examples(split)
            )
            for split in SPLITS
        }
        problems = ProblemList()
        check_splits("task.tasks", splits, problems)
        problems.raise_any()
        return splits


_SAMPLE = ("scenes", "trends")


def _modalities(members: Mapping[str, Task]) -> dict[str, str]:
    """Context → modality, of all tasks.

    Raises:
        UserError: two tasks read a context differently.
    """
    first: dict[str, tuple[str, str | None]] = {}  # context → the first member that has it, and its modality there
    for key, task in members.items():
        for context in task.contexts:
            modality = task.modalities.get(context)
            other, known = first.setdefault(context, (key, modality))
            if known != modality:
                found = [f"{m or 'text'} in {k!r}" for k, m in ((other, known), (key, modality))]
                raise UserError(f"context {context!r}: {' and '.join(found)}; allowed: one modality per context")
    return {context: modality for context, (_, modality) in first.items() if modality is not None}
