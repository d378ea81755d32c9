"""Contexts and groupings: which adapter group acts on which domain of tokens.

A context is a named token domain (``image``, ``text``); a grouping maps contexts to adapter groups (Context-PEFT, arXiv
2312.08900). Does not import torch, because planning does not need it. adapters/placement/router.py maps the tokens of a
batch to contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness.core.errors import UserError, did_you_mean

AGNOSTIC_GROUP = "all"
STACKED, SHARED_GROUP = "shared+specific", "shared"  # the grouping, and the group that all of its tokens have
TEXT_CONTEXT = "text"  # known to be text by its name; no context is taken for text by its place


class Segment(NamedTuple):
    """Positions ``start`` to ``stop`` (exclusive) of every row belong to one context."""

    start: int
    stop: int
    context: str


class Span(NamedTuple):
    """Positions that one adapter group acts on; with ``group`` None, the base model without an adapter."""

    start: int
    stop: int
    group: str | None


class Grouping(NamedTuple):
    """Which groups act on the tokens of each context.

    ``shared`` acts on every token beside the token's own group; None: there is no such group.
    """

    of_context: dict[str, str | None]
    name: str  # for display
    shared: str | None = None


def resolve_grouping(grouping: Any, contexts: Sequence[str]) -> Grouping:
    """Resolve ``agnostic``, ``specific``, ``shared+specific`` or a mapping context → group.

    Raises:
        UserError: neither a known name nor a mapping of every context to a group or None.
    """
    if grouping == "agnostic":
        return Grouping(dict.fromkeys(contexts, AGNOSTIC_GROUP), "agnostic")
    specific: dict[str, str | None] = {context: context for context in contexts}
    if grouping == "specific":
        return Grouping(specific, "specific")
    if grouping == STACKED:
        if SHARED_GROUP in contexts:
            raise UserError(
                f"found {STACKED!r}, whose common group has the name of the context {SHARED_GROUP!r}; allowed: "
                "agnostic, specific, or a mapping context → group"
            )
        return Grouping(specific, STACKED, SHARED_GROUP)
    if not isinstance(grouping, Mapping):
        near = did_you_mean(str(grouping), ["agnostic", "specific", STACKED])
        raise UserError(f"found {grouping!r}; {near}, or a mapping context → group")
    for context in grouping:
        if context not in contexts:
            raise UserError(f"unknown context {context!r}; {did_you_mean(str(context), contexts)}")
    missing = [context for context in contexts if context not in grouping]
    if missing:
        raise UserError(f"context {missing[0]!r} is missing; set it to a group, or to null for no adapter")
    for context, group in grouping.items():
        if group is not None and (not isinstance(group, str) or not group.isidentifier()):
            raise UserError(
                f"group of context {context!r} must be a name (letters, digits, _) or null; found {group!r}"
            )
    if all(group is None for group in grouping.values()):
        raise UserError("no context has a group; to train without adapters, use the method 'none'")
    resolved = {context: grouping[context] for context in contexts}
    return Grouping(resolved, " ".join(f"{context}={group or '-'}" for context, group in resolved.items()))
