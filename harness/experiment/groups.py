"""Reads ``groups`` of an adapter entry: another method, or other options, for each context.

``groups: {image: {method: lora, rank: [16, 64]}, text: {method: bitfit}}``; lists are axes, as everywhere in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.registry import Choice, check_of_groups, choose
from harness.core.contexts import resolve_grouping
from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean
from harness.core.paths import relative_to
from harness.experiment.axes import axes
from harness.experiment.sections import AdapterChoice, GroupChoice

# Keys of what all groups have in common, with the place where they are allowed.
_ELSEWHERE = {
    **dict.fromkeys(
        ("learning_rate", "tried_learning_rates", "search"),
        "one optimizer with one learning rate trains all groups; allowed beside 'groups'",
    ),
    **dict.fromkeys(("seed", "seeds"), "a trial has one seed; allowed: seeds, at the top level of the experiment"),
    "init_from": "allowed beside 'groups', as group → folder of a trial",
    **dict.fromkeys(("grouping", "groups"), "a group has no groups of its own; leave it out"),
}


def group_variants(given: Any, entry: Cursor, contexts: Sequence[str]) -> list[dict[str, Any]]:
    """What ``groups`` says, with all axes expanded: context → a method with its options, or None for no adapter.

    Args:
        given: its value: a mapping, or a list of them.
        entry: location of the adapter entry.
        contexts: of the task.

    Raises:
        UserError: it is not context → method for every context, or a group has a key that all groups have in common.
    """
    where = entry / "groups"
    if isinstance(given, list):
        whole = axes({"groups": given}, entry)
        return [variant for one in whole for variant in group_variants(one["groups"], entry, contexts)]
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: found {given!r}; allowed: context → a mapping with 'method', or null for no adapter")
    for context in given:
        if context not in contexts:
            raise UserError(f"{where / context}: unknown context {context!r}; {did_you_mean(str(context), contexts)}")
    for context in contexts:
        if context not in given:
            raise UserError(
                f"{where}: context {context!r} is missing; give it a method, or null for no adapter "
                f"(contexts: {', '.join(contexts)})"
            )
    return list(axes({context: list(_variants(given[context], where / context)) for context in contexts}, where))


def _variants(given: Any, where: Cursor) -> Iterator[dict[str, Any] | None]:
    for one in given if isinstance(given, list) else [given]:
        if one is None:
            yield None
            continue
        if not isinstance(one, Mapping):
            raise UserError(f"{where}: found {one!r}; allowed: a mapping with 'method', or null for no adapter")
        for key in one:
            if key in _ELSEWHERE:
                raise UserError(f"{where / key}: {_ELSEWHERE[key]}")
        yield from axes({**one, **one_value_each(one)}, where)


def one_value_each(section: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The keys of a section whose list is one value, not an axis, as an axis with this value."""
    # [q, v] is one value, and so is {vision: [q, v]}; [A, F] is an axis with two values.
    return {"where": [section["where"]]} if _is_one_place(section.get("where")) else {}


def _is_one_place(where: Any) -> bool:
    from adapters.placement.roles import ROLES

    if isinstance(where, Mapping):
        return True
    return isinstance(where, list) and bool(where) and all(isinstance(role, str) and role in ROLES for role in where)


def adapter_of_groups(
    given: Mapping[str, dict[str, Any] | None], where: Cursor, contexts: Sequence[str], folder: Path
) -> AdapterChoice:
    """The adapter whose groups have these methods. Where all have the same, it is that method with the grouping.

    Args:
        given: context → a method with its options, or None.
        where: location of ``groups``.
        contexts: of the task.
        folder: that relative paths start from.

    Raises:
        UserError: an unknown method or option, a method without groups, or no method at all.
    """
    start = relative_to(folder, explain=True)
    found = {c: choose(own, where / c, context=start) for c, own in given.items() if own is not None}
    if not found:
        raise UserError(f"{where}: no context has a method; to train without adapters, use the method 'none'")
    check_of_groups(found, where)
    same = len(found) == len(contexts)
    grouping = resolve_grouping("specific" if same else {c: c if c in found else None for c in contexts}, contexts)
    groups = {context: _group(choice) for context, choice in found.items()}
    first, *others = groups.values()
    if all(other == first for other in others):
        label, groups, one = next(iter(found.values())).method.label(), {}, first
    else:
        from adapters.methods.per_group import PerGroup

        label = PerGroup({context: choice.method for context, choice in found.items()}).label()
        plugins = dict.fromkeys(plugin for own in groups.values() for plugin in own.plugins)
        methods = dict.fromkeys(own.method for own in groups.values())
        one = GroupChoice(method="/".join(methods), plugins=tuple(plugins), config={})
    return AdapterChoice(
        method=one.method,
        plugins=one.plugins,
        grouping=grouping.of_context,
        grouping_name=grouping.name,
        config=one.config,
        label=label,
        groups=groups,
    )


def _group(choice: Choice) -> GroupChoice:
    return GroupChoice(method=choice.name, plugins=choice.plugins, config=choice.method.config.model_dump(mode="json"))
