"""Resolves the task and the adapters of an experiment: finds their plugins and checks their options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.registry import ADAPTERS, check_stacked, choose
from harness.core.contexts import resolve_grouping
from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean
from harness.core.paths import relative_to
from harness.core.validation import check
from harness.experiment.axes import NO_AXIS, axes
from harness.experiment.groups import adapter_of_groups, group_variants, one_value_each
from harness.experiment.init_sources import find_init_sources
from harness.experiment.search import SearchDefaults, with_rates
from harness.experiment.sections import AdapterChoice, RateSearch, TaskChoice
from tasks.registry import ENCODERS, METRICS, MODALITIES, TASKS

if TYPE_CHECKING:
    from tasks.base import Task

REGISTRIES = (TASKS, MODALITIES, ENCODERS, METRICS, ADAPTERS)


def task_axes(section: Mapping[str, Any], where: Cursor) -> Iterator[dict[str, Any]]:
    """The variants of the section ``task``.

    If an option takes a list, a list is one value of it, and a list of lists is an axis.
    """
    name = section.get("name")
    known = TASKS.entries()
    schema = TASKS.load(known[name].target).Config.model_json_schema() if name in known else {}
    yield from axes(_wrap_list_values(section, schema, schema.get("$defs", {})), where)


def _wrap_list_values(
    section: Mapping[str, Any], schema: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    """Wrap every list that is a single value in an axis with this value, also in nested sections."""
    fields = schema.get("properties", {})
    wrapped: dict[str, Any] = {}
    for key, value in section.items():
        allowed = [known.get(s.get("$ref", "").rpartition("/")[2], s) for s in _alternatives(fields.get(key, {}))]
        inner = next((one for one in allowed if "properties" in one), None)
        if isinstance(value, dict) and inner:
            wrapped[key] = _wrap_list_values(value, inner, known)
        elif isinstance(value, list) and any(one.get("type") == "array" for one in allowed):
            wrapped[key] = value if value and all(isinstance(v, list) for v in value) else [value]
        else:
            wrapped[key] = value
    return wrapped


def _alternatives(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [s for one in schema.get("anyOf", ()) for s in _alternatives(one)] or [schema]


def choose_task(variant: dict[str, Any], more_metrics: tuple[str, ...], top: Cursor, folder: Path) -> TaskChoice:
    """Resolve a variant of the section ``task``.

    Args:
        variant: of the section, with one value for each option.
        more_metrics: registry names from ``eval.metrics``.
        top: cursor of the experiment's top level.
        folder: that relative paths start from.

    Raises:
        UserError: the task, a modality or a metric is unknown, or the options are invalid.
    """
    options, where = dict(variant), top / "task"
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{where}: the key 'name' is required; {did_you_mean('', TASKS.entries())}")
    plugin = TASKS.plugin(name, str(where / "name" if (where / "name").is_written else where))
    task_class = TASKS.load(plugin.target)
    config = check(task_class.Config, options, where, hint=NO_AXIS, context=relative_to(folder, explain=True))
    try:
        task: Task = task_class(config)
        members = task.members()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    extra = {metric: METRICS.plugin(metric, str(top / "eval" / "metrics")) for metric in more_metrics}
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


def choose_adapters(
    entries: list[dict[str, Any]], task: TaskChoice, where: Cursor, folder: Path, searches: SearchDefaults
) -> Iterator[tuple[int, AdapterChoice]]:
    """Resolve the entries of ``adapters``, with their axes expanded, each with the index of its entry.

    Raises:
        UserError: an entry is invalid.
    """
    for index, entry in enumerate(entries):
        section, search = with_rates(entry, searches, where / index)
        fixed = one_value_each(section)
        if isinstance(section.get("grouping"), dict):  # one value, not a section with axes of its own
            fixed["grouping"] = [section["grouping"]]
        if "groups" in section:
            fixed["groups"] = group_variants(section["groups"], where / index, task.contexts, section.get("grouping"))
        if "tried_learning_rates" in section:  # the whole list belongs to every variant
            fixed["tried_learning_rates"] = [section["tried_learning_rates"]]
        for variant in axes({**section, **fixed}, where / index):
            choice = _adapter(variant, where / index, task.contexts, folder)
            yield index, choice.model_copy(update={"search": search})


def _adapter(variant: dict[str, Any], where: Cursor, contexts: tuple[str, ...], folder: Path) -> AdapterChoice:
    options = dict(variant)
    search = check(RateSearch, {key: options.pop(key) for key in RateSearch.model_fields if key in options}, where)
    init_from = options.pop("init_from", None)
    also = (*RateSearch.model_fields, "search", "init_from")
    read = _of_groups if "groups" in options else _of_one_method
    choice = read(options, where, contexts, folder, also).model_copy(update=dict(search))
    if init_from is None:
        return choice
    sources = find_init_sources(init_from, choice, where / "init_from", folder)
    return choice.model_copy(update={"init_from": sources, "label": f"{choice.label} assembled"})


def _of_one_method(
    options: dict[str, Any], where: Cursor, contexts: tuple[str, ...], folder: Path, also: tuple[str, ...]
) -> AdapterChoice:
    given = options.pop("grouping", None)
    chosen = choose(options, where, ("grouping", "groups", *also), relative_to(folder, explain=True))
    method = chosen.method
    if given is not None and not method.grouped:
        raise UserError(f"{where / 'grouping'}: {chosen.name} has no adapter groups; leave 'grouping' out")
    try:
        grouping = resolve_grouping("agnostic" if given is None else given, contexts)
        if grouping.shared is not None:
            check_stacked(chosen)
    except UserError as error:
        raise UserError(f"{where / 'grouping'}: {error}") from None
    return AdapterChoice(
        method=chosen.name,
        plugins=chosen.plugins,
        grouping=grouping.of_context if method.grouped else dict.fromkeys(contexts),
        grouping_name=grouping.name if method.grouped else "",
        config=method.config.model_dump(mode="json"),
        label=method.label(),
        shared_group=grouping.shared,
    )


def _of_groups(
    options: dict[str, Any], where: Cursor, contexts: tuple[str, ...], folder: Path, also: tuple[str, ...]
) -> AdapterChoice:
    groups, of_context = options.pop("groups"), options.pop("grouping", None)
    for key in options:
        if key == "method":
            raise UserError(f"{where / key}: 'groups' gives each group its own method; allowed: one of the two")
        allowed = did_you_mean(key, ["grouping", "groups", *also])
        raise UserError(f"{where / key}: unknown key {key!r} beside 'groups'; {allowed}; options go into a group")
    return adapter_of_groups(groups, where / "groups", contexts, folder, of_context)
