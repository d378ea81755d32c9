"""Contexts, groupings and the router: which adapter group acts on which token.

A context is a named token domain (``image``, ``text``); a grouping maps contexts to adapter groups; the router holds
the layout of the current batch and is asked by every adapted layer. Context-PEFT, arXiv 2312.08900. Imports nothing of
ours but the error type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from harness.errors import UserError, did_you_mean

AGNOSTIC_GROUP = "all"


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


class Router:
    """Tells adapted layers which group owns which positions of the batch in flight.

    The layout is set before a forward pass and stays until the next one, so that activation checkpointing, which runs
    layers again during backward, sees the same layout.
    """

    def __init__(self, grouping: Mapping[str, str | None]) -> None:
        self.grouping = dict(grouping)
        self._spans: tuple[Span, ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the adapter groups, in order of first use."""
        return tuple(dict.fromkeys(group for group in self.grouping.values() if group is not None))

    def set_layout(self, segments: Sequence[Segment]) -> None:
        """Set the layout of the coming forward pass: contiguous segments from position 0, the same for all rows.

        Raises:
            ValueError: a gap or an overlap between segments, or a context the grouping does not know.
        """
        spans: list[Span] = []
        position = 0
        for segment in segments:
            if segment.start != position or segment.stop < segment.start:
                raise ValueError(f"segments must be contiguous from 0; found {list(segments)}")
            if segment.context not in self.grouping:
                raise ValueError(f"unknown context {segment.context!r}; {did_you_mean(segment.context, self.grouping)}")
            position = segment.stop
            group = self.grouping[segment.context]
            if segment.start == segment.stop:
                continue
            if spans and spans[-1].group == group:  # neighbours of one group are one piece of work
                spans[-1] = Span(spans[-1].start, segment.stop, group)
            else:
                spans.append(Span(segment.start, segment.stop, group))
        self._spans = tuple(spans)

    @property
    def length(self) -> int:
        """Positions of the batch in flight.

        Raises:
            RuntimeError: no layout was set.
        """
        if not self._spans:
            raise RuntimeError("no layout was set: set_layout comes before forward")
        return self._spans[-1].stop

    def spans(self, length: int) -> tuple[Span, ...]:
        """Which group acts where in a batch of this sequence length.

        Raises:
            RuntimeError: no layout was set, or it is for another length: never a silent pass of the bare base model.
        """
        covered = self._spans[-1].stop if self._spans else 0
        if covered != length:
            raise RuntimeError(
                f"the layout covers {covered} positions but the batch has {length}: set_layout comes before forward"
            )
        return self._spans
