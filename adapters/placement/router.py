"""Which adapter group each token of the current forward pass uses.

One router serves all adapted layers of a model. Its layout is set before a forward pass and stays until the next, so
that activation checkpointing, which reruns layers during backward, sees the same layout. Reading a layout that was
never set is an error, never a silent pass of the bare base model.

Shapes: X is 1 if all rows have the same layout, else B rows; T positions of this pass; K positions seen so far,
including the KV cache; G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from harness.core.contexts import Segment, Span
from harness.core.errors import did_you_mean


class Lookup(NamedTuple):
    """For a subset of the groups: which of them owns each position."""

    owner_XTG: Tensor  # bool
    index_XT: Tensor  # int64: index into this subset, G where none of them acts


@dataclass(frozen=True, eq=False)
class Layout:
    """Which adapter group owns each position of one forward pass."""

    groups: tuple[str, ...]
    length: int  # T
    group_ids_XT: Tensor  # int64: index into groups, -1 where no adapter acts
    context_ids_XK: Tensor  # int64: index into the router's contexts, of all positions seen so far
    spans: tuple[Span, ...] | None  # None: rows have different layouts
    positions: Mapping[str, Tensor]  # group → its positions in the concatenated rows; empty if all rows are alike
    _lookups: dict[tuple[str, ...], Lookup] = field(default_factory=dict)

    @property
    def past(self) -> int:
        """Number of positions in the KV cache before this pass."""
        return self.context_ids_XK.shape[1] - self.length

    def owned_by(self, groups: Sequence[str]) -> bool:
        """Whether ``groups`` is a single group that owns every position of this pass."""
        return len(groups) == 1 and self.spans is not None and [span.group for span in self.spans] == list(groups)

    def lookup(self, groups: tuple[str, ...]) -> Lookup:
        """Which of ``groups`` owns each position; computed once per layout."""
        if groups not in self._lookups:
            ids_G = torch.tensor([self.groups.index(group) for group in groups], device=self.group_ids_XT.device)
            owner_XTG = self.group_ids_XT[..., None] == ids_G
            unowned_XT1 = ~owner_XTG.any(dim=-1, keepdim=True)
            self._lookups[groups] = Lookup(owner_XTG, torch.cat([owner_XTG, unowned_XT1], dim=-1).int().argmax(dim=-1))
        return self._lookups[groups]


class Router:
    """Holds the layout for the adapted layers.

    Args:
        grouping: context → group; None: no adapter on that context. Context ids index its keys.
    """

    def __init__(self, grouping: Mapping[str, str | None]) -> None:
        self.grouping = dict(grouping)
        self.contexts = tuple(grouping)
        self.groups = tuple(dict.fromkeys(group for group in grouping.values() if group is not None))
        self._group_of = [-1 if group is None else self.groups.index(group) for group in grouping.values()]
        self._asked: list[tuple[str, ...]] = []
        self._layout: Layout | None = None

    def prepare_lookup(self, groups: tuple[str, ...]) -> None:
        """Register groups that some layer will look up, so that ``set_context_ids`` computes the lookup in advance."""
        if groups not in self._asked:
            self._asked.append(groups)

    def set_layout(self, segments: Sequence[Segment], device: torch.device | str = "cpu") -> None:
        """Set the layout of the next pass: contiguous segments from position 0, the same for all rows.

        Raises:
            ValueError: segments leave a gap or overlap, or a context is not in the grouping.
        """
        ids: list[int] = []
        for segment in segments:
            if segment.start != len(ids) or segment.stop < segment.start:
                raise ValueError(f"segments must be contiguous from 0; found {list(segments)}")
            if segment.context not in self.grouping:
                raise ValueError(f"unknown context {segment.context!r}; {did_you_mean(segment.context, self.grouping)}")
            ids += [self.contexts.index(segment.context)] * (segment.stop - segment.start)
        self.set_context_ids(torch.tensor(ids, dtype=torch.long, device=device)[None])

    def set_context_ids(self, context_ids_XT: Tensor, past_context_ids_XK: Tensor | None = None) -> None:
        """Set the layout of the next pass token by token.

        Args:
            context_ids_XT: int64 index into the contexts; one row applies to all rows of the batch.
            past_context_ids_XK: the same for the positions in the KV cache.
        """
        ids_XT = context_ids_XT
        if ids_XT.shape[0] > 1 and bool((ids_XT == ids_XT[:1]).all()):
            ids_XT = ids_XT[:1]
        groups_XT = torch.tensor(self._group_of, device=ids_XT.device)[ids_XT]
        alike = ids_XT.shape[0] == 1
        seen_XK = ids_XT
        if past_context_ids_XK is not None:
            rows = max(past_context_ids_XK.shape[0], ids_XT.shape[0])
            seen_XK = torch.cat([past_context_ids_XK.expand(rows, -1), ids_XT.expand(rows, -1)], dim=1)
        self._layout = Layout(
            groups=self.groups,
            length=ids_XT.shape[1],
            group_ids_XT=groups_XT,
            context_ids_XK=seen_XK,
            spans=_spans(groups_XT[0].tolist(), self.groups) if alike else None,
            positions={} if alike else self._positions(groups_XT),
        )
        for asked in self._asked:
            self._layout.lookup(asked)

    def _positions(self, groups_XT: Tensor) -> dict[str, Tensor]:
        flat_N = groups_XT.flatten()
        return {group: (flat_N == index).nonzero()[:, 0] for index, group in enumerate(self.groups)}

    @property
    def layout(self) -> Layout:
        """The layout of the current pass.

        Raises:
            RuntimeError: no layout was set.
        """
        if self._layout is None:
            raise RuntimeError("no layout was set; set it before forward (context_ids, or router.set_layout)")
        return self._layout

    def layout_of(self, length: int) -> Layout:
        """The layout of the current pass, checked against its number of positions.

        Raises:
            RuntimeError: no layout was set, or it covers another number of positions.
        """
        layout = self.layout
        if layout.length != length:
            raise RuntimeError(
                f"the layout covers {layout.length} positions but the batch has {length}; set it before forward"
            )
        return layout


def _spans(group_ids: list[int], groups: tuple[str, ...]) -> tuple[Span, ...]:
    """Group the positions into maximal runs with one owner."""
    spans: list[Span] = []
    for position, group_id in enumerate(group_ids):
        group = None if group_id < 0 else groups[group_id]
        if spans and spans[-1].group == group:
            spans[-1] = Span(spans[-1].start, position + 1, group)
        else:
            spans.append(Span(position, position + 1, group))
    return tuple(spans)
