"""Layers that read the same input: q, k and v; gate and up. The first that runs computes the outputs of all.

Whether they really do is seen in each pass, by the identity of the tensor and by what records the operation: an output
that was computed and not asked for, as its layer read something else or runs in a checkpointed function of its own,
ends it for these layers from the next pass on. A pass itself goes on as it began, because what backward runs again has
to do what forward did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapters.base import Change
from adapters.placement.router import Layout

ROLES = (frozenset("qkv"), frozenset({"gate", "up"}))


@dataclass
class _Ready:
    """Of a pass: the input that was read last, and the outputs that are still to be asked for.

    Args:
        same: whether layers are computed together in this pass.
    """

    same: bool
    of: Tensor | None = None
    version: int = -1
    recorded: tuple[Any, ...] = ()
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def take(self, index: int) -> Tensor:
        """An output, once. With the last of them the input is let go, which the layout of the pass outlives."""
        output = self.outputs.pop(index)
        if not self.outputs:
            self.of, self.recorded = None, ()
        return output


def _recorded(x: Tensor) -> tuple[Any, ...]:
    """What an operation on ``x`` would be recorded by: an output is only good for a layer for which this is the same.

    Inside a checkpointed function that is another, which a layer beside it must have no part of.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    backward = torch._C._current_graph_task_id()
    return torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), backward, hooks and hooks[0]


class OneInput:
    """Some linear layers, and the first change of the output of each.

    Args:
        parts: in the order in which the model has them.
    """

    def __init__(self, parts: Sequence[tuple[nn.Linear, Change]]) -> None:
        self.parts = list(parts)
        self._same = True

    def output(self, index: int, x_BTI: Tensor, layout: Layout) -> Tensor | None:
        """The output of one layer with its change (B, T, O); None: they are not computed together.

        Args:
            index: of the layer.
            x_BTI: its input.
            layout: of the pass.
        """
        change = self.parts[index][1]
        # A tensor of inference mode has no version.
        ready = None if len(self.parts) == 1 or x_BTI.is_inference() else layout.keep(self, lambda: _Ready(self._same))
        if ready is None or not ready.same:
            found = change.with_layers(x_BTI, self.parts[index : index + 1], layout)
            return None if found is None else found[0]
        recorded = _recorded(x_BTI)
        same = ready.of is x_BTI and ready.version == x_BTI._version and ready.recorded == recorded
        if same and index in ready.outputs:
            return ready.take(index)
        if ready.outputs and torch._C._current_graph_task_id() == -1:  # recomputation in backward may end early
            self._same = False
        found = change.with_layers(x_BTI, self.parts, layout)
        if found is None:
            return None
        ready.of, ready.version, ready.recorded = x_BTI, x_BTI._version, recorded
        ready.outputs = dict(enumerate(found))
        return ready.take(index)
