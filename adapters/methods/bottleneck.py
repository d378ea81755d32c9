"""Bottleneck adapters per context group: ``f(z) = U σ(D z + d) + u``.

Serial (Houlsby et al. 2019, arXiv 1902.00751): ``h + f(h)`` on the output of attention and of the feed-forward block,
before the residual addition. Parallel (He et al. 2022, arXiv 2110.04366): ``f`` reads the input of the whole
feed-forward block, whose output becomes ``y + s f(x)``.

``U`` and both biases are initialised to zero, so the adapter starts as the identity; ``D`` is initialised like
``nn.Linear``, whereas Houlsby et al. initialise both near zero. They train the layer norms too: use
``bottleneck+ln_tuning`` for that.

Shapes: B rows, T positions, D the model's width, M the bottleneck's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import base
from adapters.placement.roles import Target
from adapters.placement.router import Layout

_NON_LINEARITY: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_SERIAL = frozenset({"o", "down"})


class BottleneckConfig(base.Config):
    """Options."""

    bottleneck_size: PositiveInt = 64
    placement: Literal["serial", "parallel"] = "serial"
    non_linearity: Literal["relu", "gelu", "silu"] = "relu"
    scale: Annotated[float, Field(gt=0)] = 1.0  # parallel only: the factor of f(x)
    where: base.Where = "AF"

    @field_validator("scale")
    @classmethod
    def _parallel_alone_has_a_scale(cls, scale: float, others: ValidationInfo) -> float:
        if others.data.get("placement") == "serial" and scale != 1.0:
            raise ValueError("only a parallel bottleneck has a scale; allowed for a serial one: 1.0")
        return scale

    @field_validator("where")
    @classmethod
    def _where_it_can_be(cls, where: base.Where, others: ValidationInfo) -> base.Where:
        for place in base.places_of(where).values():
            if others.data.get("placement") == "parallel" and place not in ("F", "AF", "all"):
                raise ValueError("a parallel bottleneck acts on the feed-forward block only; allowed: F, AF")
            if isinstance(place, tuple) and not set(place) <= _SERIAL:
                raise ValueError(
                    "a serial bottleneck acts on the last layer of a block; allowed: A, F, AF, [o], [down]"
                )
        return where


class BottleneckDelta(base.Delta):
    """Two linear layers with biases, (M, D) and (D, M), and a non-linearity between them."""

    def __init__(self, width: int, config: BottleneckConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(config.bottleneck_size, width))
        self.down_bias = nn.Parameter(torch.zeros(config.bottleneck_size))
        self.up_weight = nn.Parameter(torch.zeros(width, config.bottleneck_size))
        self.up_bias = nn.Parameter(torch.zeros(width))
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5), generator=generator)
        self.reads_input = config.placement == "parallel"
        self.non_linearity = _NON_LINEARITY[config.non_linearity]
        self.scale = config.scale

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``y + f(y)``, or ``y + s f(x)``."""
        return self.add(x_BTI, value_BTD, self.weights((x_BTI if self.reads_input else value_BTD).dtype))

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """``D``, ``d``, ``U`` and ``u``; of stacked groups those of ``f + f'``: one bottleneck with all units."""
        own: tuple[Tensor, ...] = (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        for below in self.below:
            down_MD, down_M, up_DM, up_D = own
            own = (
                torch.cat([below.down_weight, down_MD]),
                torch.cat([below.down_bias, down_M]),
                torch.cat([below.up_weight, up_DM], dim=1),
                below.up_bias + up_D,
            )
        return tuple(p.to(dtype) for p in own)

    def add(self, x_BTI: Tensor, value_BTD: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        """``forward`` with the given weights."""
        z_BTD = x_BTI if self.reads_input else value_BTD
        down_MD, down_M, up_DM, up_D = weights
        update_BTD = F.linear(self.non_linearity(F.linear(z_BTD, down_MD, down_M)), up_DM, up_D)
        return torch.add(value_BTD, update_BTD.to(value_BTD.dtype), alpha=self.scale)


class BottleneckChange(base.Change):
    """Casts the weights once for all tokens of a generation."""

    def changed(self, group: str, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + f(y)``, or ``y + s f(x)``."""
        delta: BottleneckDelta = self.delta(group)
        dtype = (x_BTI if delta.reads_input else value_BTD).dtype
        weights = layout.constant((self, group, dtype), lambda: delta.weights(dtype))
        return delta.add(x_BTI, value_BTD, weights)


class Bottleneck(base.AdapterMethod):
    """A small feed-forward network after each block, or parallel to the feed-forward block."""

    summary = "small feed-forward networks after each block (serial), or parallel to the feed-forward block"
    not_stacked = None
    Config = BottleneckConfig
    config: BottleneckConfig

    def label(self) -> str:
        """``bottleneck 64 serial``, plus `where` if it is not AF."""
        place = base.place_label(self.config.where) if self.config.placement == "serial" else ""
        return f"bottleneck {self.config.bottleneck_size} {self.config.placement}{place}"

    def roles(self) -> frozenset[str]:
        """Serial: the last layer of attention and of feed-forward. Parallel: the whole feed-forward block."""
        return frozenset({"mlp"}) if self.config.placement == "parallel" else _SERIAL & base.roles_of(self.config.where)

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """One bottleneck."""
        return BottleneckDelta(target.out_features, self.config, generator)

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """A change that casts each group's weights once."""
        return BottleneckChange(deltas)
