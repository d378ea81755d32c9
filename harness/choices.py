"""Which task and which adapters an experiment names: plugins found, their options checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from adapters.registry import ADAPTERS
from harness.axes import axes, check
from harness.contexts import resolve_grouping
from harness.errors import UserError, did_you_mean
from harness.origins import find_origins
from harness.sections import AdapterChoice, RateSearch, TaskChoice
from harness.yaml_source import KeyPath, Source
from tasks.registry import METRICS, MODALITIES, TASKS

if TYPE_CHECKING:
    from tasks.base import Task

REGISTRIES = (TASKS, MODALITIES, METRICS, ADAPTERS)


def task_axes(section: Mapping[str, Any], source: Source) -> Iterator[dict[str, Any]]:
    """The variants of the section ``task``. A list that an option takes is one value; a list of such lists an axis."""
    name = section.get("name")
    known = TASKS.entries()
    schema = TASKS.load(known[name].target).Config.model_json_schema() if name in known else {}
    yield from axes(_with_whole_lists(section, schema, schema.get("$defs", {})), ("task",), source)


def _with_whole_lists(
    section: Mapping[str, Any], schema: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """The section with every list that is one value as an axis of that one value, sections within it too."""
    fields = schema.get("properties", {})
    whole: dict[str, Any] = {}
    for key, value in section.items():
        allowed = [known.get(s.get("$ref", "").rpartition("/")[2], s) for s in _alternatives(fields.get(key, {}))]
        inner = next((one for one in allowed if "properties" in one), None)
        if isinstance(value, dict) and inner:
            whole[key] = _with_whole_lists(value, inner, known)
        elif isinstance(value, list) and any(one.get("type") == "array" for one in allowed):
            whole[key] = value if value and all(isinstance(v, list) for v in value) else [value]
        else:
            whole[key] = value
    return whole


def _alternatives(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [s for one in schema.get("anyOf", ()) for s in _alternatives(one)] or [schema]


def choose_task(variant: dict[str, Any], more_metrics: tuple[str, ...], source: Source) -> TaskChoice:
    """The task that a variant of the section names.

    Args:
        variant: of the section, one value for each option.
        more_metrics: registry names from ``eval.metrics``.
        source: for messages.

    Raises:
        UserError: there is no such task, modality or metric, or the options are wrong.
    """
    options = dict(variant)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{source.where(('task',))}: 'name' is required; {did_you_mean('', TASKS.entries())}")
    plugin = TASKS.plugin(name, source.where(("task", "name") if ("task", "name") in source.lines else ("task",)))
    task_class = TASKS.load(plugin.target)
    config = check(task_class.Config, options, ("task",), source)
    try:
        task: Task = task_class(config)
        members = task.members()
    except UserError as error:
        raise UserError(f"{source.where(('task',))}: {error}") from None
    extra = {metric: METRICS.plugin(metric, source.where(("eval", "metrics"))) for metric in more_metrics}
    return TaskChoice(
        name=name,
        plugin=plugin,
        contexts=task.contexts,
        modalities={modality: MODALITIES.plugin(modality) for modality in task.modalities.values()},
        metrics={
            name: {metric: METRICS.plugin(metric) for metric in member.metrics} | extra
            for name, member in members.items()
        },
        config=config.model_dump(mode="json"),
    )


def choose_adapters(entries: list[dict[str, Any]], task: TaskChoice, source: Source) -> Iterator[AdapterChoice]:
    """The adapters of the file's list, axes expanded.

    Raises:
        UserError: an entry is wrong.
    """
    for index, section in enumerate(entries):
        path: KeyPath = ("adapters", index)
        # A mapping under `grouping` is one grouping, not a section with axes of its own.
        fixed = {"grouping": [section["grouping"]]} if isinstance(section.get("grouping"), dict) else {}
        if _names_roles(section.get("where")):  # [q, v] is one place; [A, F] is an axis of two
            fixed["where"] = [section["where"]]
        if "tried_learning_rates" in section:  # all of them are of every variant
            fixed["tried_learning_rates"] = [section["tried_learning_rates"]]
        for variant in axes({**section, **fixed}, path, source):
            yield _adapter(variant, path, task.contexts, source)


def _names_roles(where: Any) -> bool:
    from adapters.roles import ROLES

    return isinstance(where, list) and bool(where) and all(isinstance(role, str) and role in ROLES for role in where)


def _adapter(variant: dict[str, Any], path: KeyPath, contexts: tuple[str, ...], source: Source) -> AdapterChoice:
    options = dict(variant)
    name = options.pop("method", None)
    if not isinstance(name, str):
        raise UserError(f"{source.where(path)}: 'method' is required; {did_you_mean('', ADAPTERS.entries())}")
    plugins = ADAPTERS.plugins(name, source.where((*path, "method")))
    method_class = ADAPTERS.load(*(plugin.target for plugin in plugins))
    rates = {key: options.pop(key) for key in RateSearch.model_fields if key in options}
    search = check(RateSearch, rates, path, source)
    grouping = options.pop("grouping", None)
    if grouping is not None and not method_class.grouped:
        raise UserError(f"{source.where((*path, 'grouping'))}: {name} has no adapter groups; leave 'grouping' out")
    try:
        resolved, grouping_name = resolve_grouping("agnostic" if grouping is None else grouping, contexts)
    except UserError as error:
        raise UserError(f"{source.where((*path, 'grouping'))}: {error}") from None
    init_from = options.pop("init_from", None)
    config = _method_config(method_class, options, path, source)
    choice = AdapterChoice(
        method=name,
        plugins=plugins,
        grouping=resolved if method_class.grouped else dict.fromkeys(contexts),
        grouping_name=grouping_name if method_class.grouped else "",
        config=config.model_dump(mode="json"),
        label=method_class(config).label(),
        learning_rate=search.learning_rate,
        tried_learning_rates=search.tried_learning_rates,
    )
    if init_from is None:
        return choice
    origins = find_origins(init_from, choice, (*path, "init_from"), source)
    return choice.model_copy(update={"init_from": origins, "label": f"{choice.label} assembled"})


def _method_config(method_class: Any, options: dict[str, Any], path: KeyPath, source: Source) -> BaseModel:
    """The method's own options; the keys every adapter entry has are named in the error as allowed too."""
    common = ("method", "grouping", *RateSearch.model_fields, "init_from")
    for key in options:
        if key not in method_class.Config.model_fields:
            allowed = did_you_mean(key, [*method_class.Config.model_fields, *common])
            raise UserError(f"{source.where((*path, key))}: unknown key {key!r}; {allowed}")
    config: BaseModel = check(method_class.Config, options, path, source)
    return config
