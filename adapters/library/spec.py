"""What a caller asks ``harness.adapt`` for, checked: contexts, grouping, and each group's method with its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.library.token_contexts import checked_contexts_from
from adapters.registry import Choice, check_of_groups, check_stacked, choose
from harness.core.contexts import STACKED, Grouping, resolve_grouping
from harness.core.cursor import Cursor
from harness.core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Spec:
    """A checked request."""

    grouping: Mapping[str, str | None]  # context → group, None: no adapter there; context ids index its keys
    by_group: Mapping[str, Choice]
    ungrouped: Choice | None  # a method without groups, in the place of by_group
    roles: Mapping[str, Any] | None  # path pattern → role, set explicitly
    seed: int
    contexts_from: Mapping[int, str] | None = None  # token id → context; other tokens are of the last context
    shared: str | None = None  # the group of by_group that acts on every token beside the token's own

    @property
    def named_groups(self) -> str:
        """``image: image, text: no adapter``; of stacked groups ``image: shared + image, text: shared + text``."""
        shared = f"{self.shared} + " if self.shared else ""
        return ", ".join(f"{c}: {shared}{g}" if g else f"{c}: no adapter" for c, g in self.grouping.items())

    @property
    def choices(self) -> list[Choice]:
        """Every group's, or the one without groups."""
        return [self.ungrouped] if self.ungrouped else list(self.by_group.values())


def resolve(
    spec: Any, contexts: Any, grouping: Any, seed: int, roles: Mapping[str, Any] | None, contexts_from: Any = None
) -> Spec:
    """Check a request; the arguments are those of ``harness.adapt``.

    Raises:
        UserError: an unknown method, option, group or context, or an option out of range.
    """
    names = _contexts(contexts)
    by_token = checked_contexts_from(contexts_from, names)
    return replace(_resolved(spec, names, grouping, seed, roles), contexts_from=by_token)


def _resolved(spec: Any, names: tuple[str, ...], grouping: Any, seed: int, roles: Mapping[str, Any] | None) -> Spec:
    _require(spec, Mapping, "spec", "a mapping such as {'method': 'lora', 'rank': 8}, or group → such a mapping")
    _require(seed, int, "seed", "an integer")
    if roles is not None:
        _require(roles, Mapping, "roles", "path pattern → role, such as {'model.layers.*.attn.query': 'q'}")
    if "method" in spec:
        choice = choose(spec, Cursor(path=("spec",)))
        if not choice.method.grouped:
            if grouping != "agnostic":
                raise UserError(f"grouping: {choice.name} has no adapter groups; leave 'grouping' out")
            return Spec(dict.fromkeys(names), {}, choice, roles, seed)
        resolved, _, shared = _grouping(grouping, names)
        groups = [group for group in (shared, *resolved.values()) if group is not None]
        if shared is not None:
            try:
                check_stacked(choice)
            except UserError as error:
                raise UserError(f"grouping: {error}") from None
        return Spec(resolved, dict.fromkeys(groups, choice), None, roles, seed, shared=shared)
    resolved, name, shared = _grouping(grouping, names)
    if shared is not None:
        raise UserError(
            f"grouping: found {name!r} with a method for each group; allowed with {STACKED!r}: one method for all "
            "groups, {'method': …}"
        )
    by_group = _by_group(spec, list(dict.fromkeys(group for group in resolved.values() if group is not None)))
    bare = {context: group if group in by_group else None for context, group in resolved.items()}
    return Spec(bare, by_group, None, roles, seed)


def _by_group(spec: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Choice]:
    """Group → its method; a group whose spec is None is left out."""
    for group in spec:
        if group not in groups:
            raise UserError(
                f"spec: found {group!r}, which is no group of this grouping ({did_you_mean(str(group), groups)}), "
                "and without 'method' a spec maps groups to methods"
            )
    missing = [group for group in groups if group not in spec]
    if missing:
        raise UserError(f"spec: group {missing[0]!r} is missing; give it a method, or None for no adapter")
    by_group: dict[str, Choice] = {}
    for group in groups:
        if spec[group] is None:
            continue
        _require(spec[group], Mapping, f"spec.{group}", "a mapping with 'method', or None for no adapter")
        by_group[group] = choose(spec[group], Cursor(path=("spec", group)))
    if not by_group:
        raise UserError("spec: no group has a method; for no adapter at all use {'method': 'none'}")
    check_of_groups(by_group, Cursor(path=("spec",)))
    return by_group


def _contexts(contexts: Any) -> tuple[str, ...]:
    named = isinstance(contexts, Sequence) and not isinstance(contexts, str)
    if not named or not contexts or not all(isinstance(c, str) and c.isidentifier() for c in contexts):
        raise UserError(f"contexts: found {contexts!r}; allowed: names (letters, digits, _), as ('image', 'text')")
    if len(set(contexts)) < len(contexts):
        raise UserError(f"contexts: found {tuple(contexts)}; each is named once")
    return tuple(contexts)


def _grouping(grouping: Any, contexts: Sequence[str]) -> Grouping:
    try:
        return resolve_grouping(grouping, contexts)
    except UserError as error:
        raise UserError(f"grouping: {error}") from None


def _require(value: Any, kind: type, where: str, allowed: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: found {value!r}; allowed: {allowed}")
