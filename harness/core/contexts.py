"""Contexts and groupings: which adapter group acts on which domain of tokens.

A context is a named token domain (``image``, ``text``); a grouping maps contexts to adapter groups. Context-PEFT, arXiv
2312.08900. Imports nothing of ours but the error type, and not torch: planning needs neither.
adapters/placement/router.py knows which token of a batch is of which context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness.core.errors import UserError, did_you_mean

AGNOSTIC_GROUP = "all"
TEXT_CONTEXT = "text"  # known to be text by its name; no context is taken for text by its place


class Segment(NamedTuple):
    """Positions ``start`` to ``stop`` (exclusive) of every row belong to one context."""

    start: int
    stop: int
    context: str


class Span(NamedTuple):
    """Positions that one adapter group acts on; ``group`` None: the bare base model."""

    start: int
    stop: int
    group: str | None


def resolve_grouping(grouping: Any, contexts: Sequence[str]) -> tuple[dict[str, str | None], str]:
    """Turn ``agnostic``, ``specific`` or a mapping context → group into (mapping over all contexts, its name).

    Raises:
        UserError: neither of the words nor a mapping that names every context once.
    """
    if grouping == "agnostic":
        return dict.fromkeys(contexts, AGNOSTIC_GROUP), "agnostic"
    if grouping == "specific":
        return {context: context for context in contexts}, "specific"
    if not isinstance(grouping, Mapping):
        raise UserError(
            f"found {grouping!r}; {did_you_mean(str(grouping), ['agnostic', 'specific'])}, or a mapping context → group"
        )
    for context in grouping:
        if context not in contexts:
            raise UserError(f"unknown context {context!r}; {did_you_mean(str(context), contexts)}")
    missing = [context for context in contexts if context not in grouping]
    if missing:
        raise UserError(f"context {missing[0]!r} is missing; give it a group, or null for no adapter")
    for context, group in grouping.items():
        if group is not None and (not isinstance(group, str) or not group.isidentifier()):
            raise UserError(
                f"group of context {context!r} must be a name (letters, digits, _) or null; found {group!r}"
            )
    if all(group is None for group in grouping.values()):
        raise UserError("no context has a group; for no adapter at all use the method 'none'")
    resolved = {context: grouping[context] for context in contexts}
    return resolved, " ".join(f"{context}={group or '-'}" for context, group in resolved.items())
