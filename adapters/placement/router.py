"""Which adapter group each token of a forward pass uses.

One router serves all adapted layers of a model. A layout belongs to a pass: it is set inside ``Router.one_pass``, each
thread has its own, and nothing is left of it when the pass ends. Layers that activation checkpointing reruns in
backward get the layout of their own pass (``adapters/placement/checkpointing.py``). Reading a layout where none is set
is an error, never a silent pass of the bare base model.

Layouts are computed on the host, from one read of the context ids: a pass has at most one synchronisation with the
device, and none if the caller knows the ids already (``Router.set_layout``, generated tokens).

Shapes: X is 1 if all rows have the same layout, else B rows; T positions of this pass; K positions seen so far,
including the KV cache; G groups.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._dynamo import eval_frame

from adapters.placement.recomputation import recompute_within
from harness.core.contexts import Segment, Span
from harness.core.errors import UserError, did_you_mean

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Ids = NDArray[np.int64]
_SKIPPED = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)


def not_compiled(function: F) -> F:
    """``function``, which torch.compile leaves as it is: it computes on the host, once per pass.

    ``torch.compiler.disable`` imports the compiler, which takes seconds in every process. So it is called when the
    compiler is there already; until then a mark tells it, when it comes, to call this function and not to look into it.
    """
    disabled: Callable[..., Any] | None = None

    @wraps(function)
    def uncompiled(*args: Any, **options: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **options)
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args, **options)

    uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]
    # It is called by what is compiled, and not compiled itself.
    eval_frame.set_code_exec_strategy(uncompiled.__code__, _SKIPPED)  # type: ignore[attr-defined]
    return cast("F", uncompiled)


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
    host_ids_XT: Ids  # the same on the host
    context_ids_XK: Tensor  # int64: index into the router's contexts, of all positions seen so far
    spans: tuple[Span, ...] | None  # None: rows have different layouts
    positions: Mapping[str, Tensor]  # group → its positions in the concatenated rows; empty if all rows are alike
    owner: str | None = None  # the group that owns every position, if rows are alike and there is one
    attention_mask: Tensor | None = None  # of the pass (B, K), where a method needs it
    sequence_XT: Tensor | None = None  # which of the sequences packed in its row a position is of, where one needs it
    of_caller: Layout | None = None  # the caller's, if a method has put positions before the caller's (soft prompts)
    _kept: dict[Any, Any] = field(default_factory=dict)
    _constants: dict[Any, Any] | None = None  # of the generation that the pass belongs to

    @property
    def past(self) -> int:
        """Number of positions in the KV cache before this pass."""
        return self.context_ids_XK.shape[1] - self.length

    @property
    def of_generation(self) -> bool:
        """Whether the pass belongs to a generation, and trains nothing."""
        return self._constants is not None and not torch.is_grad_enabled()

    def owned_by(self, groups: Sequence[str]) -> bool:
        """Whether ``groups`` is a single group that owns every position of this pass."""
        return len(groups) == 1 and self.owner == groups[0]

    def lookup(self, groups: tuple[str, ...]) -> Lookup:
        """Which of ``groups`` owns each position; computed once per layout."""
        kept: Lookup | None = self._kept.get(groups)
        if kept is None:
            kept = self._kept[groups] = self._lookup(groups)
        return kept

    def _lookup(self, groups: tuple[str, ...]) -> Lookup:
        ids_G = to_device([self.groups.index(group) for group in groups], self.group_ids_XT.device)
        owner_XTG = self.group_ids_XT[..., None] == ids_G
        unowned_XT1 = ~owner_XTG.any(dim=-1, keepdim=True)
        return Lookup(owner_XTG, torch.cat([owner_XTG, unowned_XT1], dim=-1).int().argmax(dim=-1))

    def with_mask(self, attention_mask: Tensor | None, sequence_XT: Tensor | None = None) -> Layout:
        """This layout with the ``attention_mask`` of the pass, and the sequences that are packed in its rows."""
        lookups = {key: kept for key, kept in self._kept.items() if isinstance(kept, Lookup)}
        return replace(self, attention_mask=attention_mask, sequence_XT=sequence_XT, _kept=lookups)

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` returns, computed once per layout: all layers of a pass need the same."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def constant(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` computes from parameters alone: once per generation, since its passes do not train.

        Outside a generation, and where gradients are wanted, it is computed anew. Parameters tell of no change:
        DeepSpeed writes through ``.data``, which their version counters do not see.
        """
        kept = self._constants
        if kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if key not in kept:
            kept[key] = make()
        found: T = kept[key]
        return found

    def has_tokens_of(self, group: str) -> bool:
        """Whether the group owns a position of this pass."""
        if self.spans is None:
            return self.positions[group].shape[0] > 0
        return any(span.group == group for span in self.spans)

    def on(self, device: torch.device) -> Layout:
        """This layout with its tensors on ``device``: the layers of a model may be on several."""
        if self.group_ids_XT.device == device:
            return self
        return self.keep(device, lambda: self._moved(device))

    def _moved(self, device: torch.device) -> Layout:
        return replace(
            self,
            group_ids_XT=self.group_ids_XT.to(device),
            context_ids_XK=self.context_ids_XK.to(device),
            positions={group: where_M.to(device) for group, where_M in self.positions.items()},
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            sequence_XT=None if self.sequence_XT is None else self.sequence_XT.to(device),
            _kept={},
        )


class _Current(threading.local):
    """The layout of each thread's pass. A copy of it (deepcopy, pickle) has none."""

    layout: Layout | None = None
    task: int = -1  # the backward pass that it was set in; -1: none
    had_gradients: bool = False  # whether the pass began with gradients
    constants: dict[Any, Any] | None = None  # of the generation in progress; None: there is none

    def __reduce__(self) -> tuple[type[_Current], tuple[()]]:
        return _Current, ()


class Router:
    """Knows the layout of the pass in progress, for the adapted layers.

    Args:
        grouping: context → group; None: no adapter on that context. Context ids index its keys.
    """

    def __init__(self, grouping: Mapping[str, str | None]) -> None:
        self.grouping = dict(grouping)
        self.contexts = tuple(grouping)
        self.groups = tuple(dict.fromkeys(group for group in grouping.values() if group is not None))
        of_context = [-1 if group is None else self.groups.index(group) for group in grouping.values()]
        self._group_of = np.array(of_context, dtype=np.int64)
        self._asked: list[tuple[str, ...]] = []
        self._current = _Current()

    def prepare_lookup(self, groups: tuple[str, ...]) -> None:
        """Register groups that some layer will look up, so that ``set_context_ids`` computes the lookup in advance."""
        if groups not in self._asked:
            self._asked.append(groups)

    @contextmanager
    def one_pass(self, layout: Layout | None = None) -> Iterator[None]:
        """A pass: what is set inside holds until its end, for this thread; then what was set before, if anything.

        Args:
            layout: the layout to begin with (of a pass that backward recomputes).
        """
        current = self._current
        before = current.layout, current.task, current.had_gradients
        current.had_gradients = torch.is_grad_enabled()
        self.use(layout)
        try:
            yield
        finally:
            current.layout, current.task, current.had_gradients = before

    @contextmanager
    def one_generation(self) -> Iterator[None]:
        """Passes of this thread between which no parameter changes (see ``Layout.constant``)."""
        current = self._current
        before, current.constants = current.constants, {}
        try:
            yield
        finally:
            current.constants = before

    @not_compiled
    def use(self, layout: Layout | None) -> None:
        """Set the layout of the pass in progress."""
        self._current.layout, self._current.task = layout, torch._C._current_graph_task_id()

    def set_layout(self, segments: Sequence[Segment], device: torch.device | str = "cpu") -> None:
        """Set the layout of the pass: contiguous segments from position 0, the same for all rows.

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
        host_1T = np.array(ids, dtype=np.int64)[None]
        self.set_context_ids(to_device(host_1T, device), host_XT=host_1T)

    @not_compiled
    def set_context_ids(
        self, context_ids_XT: Tensor, past_context_ids_XK: Tensor | None = None, host_XT: Ids | None = None
    ) -> None:
        """Set the layout of the pass token by token.

        Args:
            context_ids_XT: int64 index into the contexts; one row applies to all rows of the batch.
            past_context_ids_XK: the same for the positions in the KV cache.
            host_XT: ``context_ids_XT`` on the host, if known; otherwise it is read.
        """
        self.use(self._layout(context_ids_XT, past_context_ids_XK, host_XT))

    @not_compiled
    def of_one_group(self, group: str, length: int, device: torch.device) -> Layout:
        """The layout of ``length`` positions that one group owns, in the pass in progress: those of a vision tower.

        Raises:
            UserError: there is no pass.
        """
        layout = self.layout
        return layout.keep((group, length, device), lambda: self._of_one_group(group, length, device))

    def _of_one_group(self, group: str, length: int, device: torch.device) -> Layout:
        context = list(self.grouping.values()).index(group)
        ids_1T = torch.full((1, length), context, device=device)
        return self._of_groups(ids_1T, np.full((1, length), self.groups.index(group), dtype=np.int64), ids_1T)

    @not_compiled
    def prepend(self, layout: Layout, context_ids: Sequence[int]) -> None:
        """Set ``layout`` (of a pass without past) with positions before its own, of the given contexts in all rows."""
        rows = layout.context_ids_XK.shape[0]
        host_N = np.array(context_ids, dtype=np.int64)
        ids_N = to_device(host_N, layout.context_ids_XK.device)
        ids_XT = torch.cat([ids_N.expand(rows, -1), layout.context_ids_XK], dim=1)
        host_groups_XT = np.concatenate(
            [np.broadcast_to(self._group_of[host_N], (rows, len(host_N))), layout.host_ids_XT], axis=1
        )
        extended = self._of_groups(ids_XT, host_groups_XT, ids_XT)
        extended = replace(extended, attention_mask=layout.attention_mask, sequence_XT=layout.sequence_XT)
        self.use(replace(extended, of_caller=layout))

    def _layout(self, ids_XT: Tensor, past_context_ids_XK: Tensor | None, host_XT: Ids | None) -> Layout:
        if host_XT is None:
            host_XT = on_host(ids_XT)
        if host_XT.shape[0] > 1 and (host_XT == host_XT[:1]).all():
            ids_XT, host_XT = ids_XT[:1], host_XT[:1]
        seen_XK = ids_XT
        if past_context_ids_XK is not None:
            rows = max(past_context_ids_XK.shape[0], ids_XT.shape[0])
            seen_XK = torch.cat([past_context_ids_XK.expand(rows, -1), ids_XT.expand(rows, -1)], dim=1)
        return self._of_groups(ids_XT, self._group_of[host_XT], seen_XK)

    def _of_groups(self, ids_XT: Tensor, host_groups_XT: Ids, seen_XK: Tensor) -> Layout:
        alike = host_groups_XT.shape[0] == 1
        spans = _spans(host_groups_XT[0].tolist(), self.groups) if alike else None
        layout = Layout(
            groups=self.groups,
            length=ids_XT.shape[1],
            group_ids_XT=to_device(host_groups_XT, ids_XT.device),
            host_ids_XT=host_groups_XT,
            context_ids_XK=seen_XK,
            spans=spans,
            positions={} if alike else self._positions(host_groups_XT, ids_XT.device),
            owner=spans[0].group if spans and len(spans) == 1 else None,
            _constants=self._current.constants,
        )
        for asked in self._asked:
            layout.lookup(asked)
        return layout

    def _positions(self, groups_XT: Ids, device: torch.device) -> dict[str, Tensor]:
        flat_N = groups_XT.reshape(-1)
        return {group: to_device(np.flatnonzero(flat_N == index), device) for index, group in enumerate(self.groups)}

    @property
    def in_progress(self) -> Layout | None:
        """The layout of the pass in progress; None: there is no pass."""
        current = self._current
        # A layer that runs inside backward is of an earlier pass than the one in progress, unless that began there.
        if torch.compiler.is_compiling() or current.task == torch._C._current_graph_task_id():
            return current.layout
        return None

    @property
    def layout(self) -> Layout:
        """The layout of the pass in progress.

        Raises:
            UserError: there is none.
        """
        layout = self.in_progress
        if layout is None:
            raise UserError(_no_layout())
        if not torch.compiler.is_compiling():
            recompute_within(self, partial(self.one_pass, layout), self._current.had_gradients)
        return layout

    def layout_of(self, length: int) -> Layout:
        """The layout of the pass in progress, checked against its number of positions.

        Raises:
            UserError: there is none.
            RuntimeError: it covers another number of positions.
        """
        layout = self.layout
        if layout.length != length:
            raise RuntimeError(
                f"the layout covers {layout.length} positions but the batch has {length}; set it before forward"
            )
        return layout


def on_host(ids: Tensor) -> Ids:
    """Integers of a tensor; the host waits for its device."""
    if torch._C._are_functorch_transforms_active():  # inside torch.func tensors have no storage to share
        return np.array(ids.tolist(), dtype=np.int64).reshape(ids.shape)
    values: Ids = ids.cpu().numpy()
    return values


def to_device(values: Ids | Sequence[int], device: torch.device | str) -> Tensor:
    """Integers of the host as a tensor on ``device``, without waiting for the device."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device, non_blocking=True)


def _no_layout() -> str:
    if torch._C._current_graph_task_id() != -1:
        return (
            "a layer with adapters was run again in backward by an activation checkpointing that does not keep the "
            "layout of its pass; use the model's activation_checkpointing_enable(), torch.utils.checkpoint, or "
            "checkpoint the whole adapted model"
        )
    return (
        "no layout was set: the base model was called directly while it has adapters, which need context_ids; call "
        "what harness.adapt returned, or remove the adapters with harness.detach(model)"
    )


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
