"""Reads ``groups`` of an adapter entry: another method, or other options, for each context or group of contexts.

``groups: {image: {method: lora, rank: [16, 64]}, text: {method: bitfit}}``; lists are axes, as everywhere in the file.
Beside ``grouping: {image: seen, audio: seen, text: text}`` its keys are ``seen`` and ``text``.
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


def group_variants(given: Any, entry: Cursor, contexts: Sequence[str], grouping: Any = None) -> list[dict[str, Any]]:
    """What ``groups`` says, with all axes expanded: group → a method with its options, or None for no adapter.

    Args:
        given: its value: a mapping, or a list of them.
        entry: location of the adapter entry.
        contexts: of the task.
        grouping: that stands beside ``groups``: context → group; None: each context is a group.

    Raises:
        UserError: it is not group → method for every group, or a group has a key that all groups have in common.
    """
    where = entry / "groups"
    if isinstance(given, list):
        whole = axes({"groups": given}, entry)
        return [variant for one in whole for variant in group_variants(one["groups"], entry, contexts, grouping)]
    kind, names, others = "context", contexts, f"contexts: {', '.join(contexts)}"
    if grouping is not None:
        of_context = _grouping(grouping, entry / "grouping", contexts)
        kind, names = "group", [group for group in dict.fromkeys(of_context.values()) if group is not None]
        others = f"groups of 'grouping': {', '.join(names)}"
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: found {given!r}; allowed: {kind} → a mapping with 'method', or null for no adapter")
    for name in given:
        if name not in names:
            raise UserError(f"{where / name}: unknown {kind} {name!r}; {did_you_mean(str(name), names)}")
    for name in names:
        if name not in given:
            raise UserError(f"{where}: {kind} {name!r} is missing; give it a method, or null for no adapter ({others})")
    return list(axes({name: list(_variants(given[name], where / name)) for name in names}, where))


def _grouping(given: Any, where: Cursor, contexts: Sequence[str]) -> dict[str, str | None]:
    if not isinstance(given, Mapping):
        raise UserError(
            f"{where}: found {given!r}; allowed beside 'groups': a mapping context → group, or nothing, where each "
            "context is a group of its own"
        )
    try:
        return resolve_grouping(given, contexts).of_context
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
    return {key: [section[key]] for key in ("where", "parts") if _is_one_place(section.get(key))}


def _is_one_place(given: Any) -> bool:
    from adapters.placement.parts import PARTS
    from adapters.placement.roles import ROLES

    if isinstance(given, Mapping):
        return True
    names = {*ROLES, *PARTS}
    return isinstance(given, list) and bool(given) and all(isinstance(name, str) and name in names for name in given)


def adapter_of_groups(
    given: Mapping[str, dict[str, Any] | None],
    where: Cursor,
    contexts: Sequence[str],
    folder: Path,
    of_context: Mapping[str, str | None] | None = None,
) -> AdapterChoice:
    """The adapter whose groups have these methods. Where all have the same, it is that method with the grouping.

    Args:
        given: group → a method with its options, or None.
        where: location of ``groups``.
        contexts: of the task.
        folder: that relative paths start from.
        of_context: context → group; None: each context is a group.

    Raises:
        UserError: an unknown method or option, a method without groups, or no method at all.
    """
    start = relative_to(folder, explain=True)
    found = {group: choose(own, where / group, context=start) for group, own in given.items() if own is not None}
    if not found:
        kind = "context" if of_context is None else "group"
        raise UserError(f"{where}: no {kind} has a method; to train without adapters, use the method 'none'")
    check_of_groups(found, where)
    of_context = of_context or {context: context for context in contexts}
    bare = {context: of_context[context] if of_context[context] in found else None for context in contexts}
    specific = all(context == group for context, group in bare.items())
    grouping = resolve_grouping("specific" if specific else bare, contexts)
    groups = {group: _group(choice) for group, choice in found.items()}
    first, *others = groups.values()
    if all(other == first for other in others):
        label, groups, one = next(iter(found.values())).method.label(), {}, first
    else:
        from adapters.methods.per_group import PerGroup

        label = PerGroup({group: choice.method for group, choice in found.items()}).label()
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
