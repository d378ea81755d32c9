"""Layers that read the same input: q, k and v; gate and up. The first that runs computes the outputs of all.

Whether they really do is seen in each pass, by the identity of the tensor: an output that was computed and not asked
for, as the layer read something else, ends it for these layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapters.base import Change
from adapters.placement.router import Layout

ROLES = (frozenset("qkv"), frozenset({"gate", "up"}))


@dataclass
class _Ready:
    """Of a pass: the input that was read last, and the outputs that are still to be asked for."""

    of: Tensor | None = None
    version: int = -1
    outputs: dict[int, Tensor] = field(default_factory=dict)


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
        if len(self.parts) == 1 or not self._same or x_BTI.is_inference():  # which has no version
            found = change.with_layers(x_BTI, self.parts[index : index + 1], layout)
            return None if found is None else found[0]
        ready = layout.keep(self, _Ready)
        if ready.of is x_BTI and ready.version == x_BTI._version and index in ready.outputs:
            return ready.outputs.pop(index)
        if ready.outputs and torch._C._current_graph_task_id() == -1:  # recomputation in backward may end early
            self._same = False
        found = change.with_layers(x_BTI, self.parts, layout)
        if found is None:
            return None
        ready.of, ready.version, ready.outputs = x_BTI, x_BTI._version, dict(enumerate(found))
        return ready.outputs.pop(index)
