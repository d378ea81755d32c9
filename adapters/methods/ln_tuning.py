"""LN-tuning per context group: scale and shift every norm's output.

Qi et al. 2022, arXiv 2211.08682, train gain and bias of the layer norms; Zhao et al. 2023, arXiv 2312.11420, do so for
multimodal models. Here the norms' own parameters stay frozen and each context has ``g ⊙ norm(x) + o``, which with one
context is the same function class, plus an offset for norms without bias (RMSNorm). ``g`` is initialised to one and
``o`` to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from adapters import base
from adapters.placement.roles import Target
from adapters.placement.router import Layout
from harness.core.errors import UserError


class NormDelta(base.Delta):
    """Scale and offset, both (O,).

    Raises:
        UserError: the norm has no weight, so its width is unknown.
    """

    undecayed = ("scale",)

    def __init__(self, target: Target) -> None:
        super().__init__()
        if not target.out_features:
            raise UserError(
                f"{target.path}: found a {type(target.layer).__name__} without weight; allowed: norms with a weight"
            )
        self.target = target
        self.scale = nn.Parameter(torch.ones(target.out_features))
        self.offset = nn.Parameter(torch.zeros(target.out_features))

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``g ⊙ y + o``."""
        dtype = value_BTD.dtype
        return value_BTD * self.vector("scale").to(dtype) + self.vector("offset").to(dtype)

    def vector(self, name: str) -> Tensor:
        """``g`` or ``o``; of stacked groups the product of both scales, the sum of both offsets."""
        join = torch.mul if name == "scale" else torch.add
        return reduce(join, (delta.vector(name) for delta in self.below), super().vector(name))

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias, both (O,), of a norm equivalent to the given norm with this delta.

        Args:
            weight_OI: the norm's weight, a vector (O,).
            bias_O: the norm's bias, zeros if it has none.

        Raises:
            UserError: the norm does not multiply by its weight.
        """
        one = self._added_to_weight()
        scale_O = self.vector("scale")
        return (weight_OI + one) * scale_O - one, bias_O * scale_O + self.vector("offset")

    @torch.no_grad()
    def _added_to_weight(self) -> float:
        """What the norm adds to its weight before multiplying: 0, or 1 (Gemma). Probed, as no attribute says so."""
        norm = self.target.layer
        if isinstance(norm, nn.LayerNorm):
            return 0.0
        assert norm is not None  # noqa: S101 - for the type checker
        weight_O = norm.get_parameter("weight").float()
        sign_O = torch.ones_like(weight_O)
        sign_O[1::2] = -1  # mean square one, so a norm returns this vector times its effective weight
        # Call forward, not the module, to bypass hooks.
        added_O = norm.forward(sign_O) * sign_O - weight_O
        for one in (0.0, 1.0):
            if (added_O - one).abs().max() < 1e-2:
                return one
        raise UserError(f"a {type(norm).__name__} does not multiply by its weight")


class NormChange(base.Change):
    """Looks up every token's scale and offset: the cost does not grow with the number of groups."""

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``g_c ⊙ y + o_c``."""
        dtype = value_BTD.dtype
        return value_BTD * self.vector("scale", layout, 1.0, dtype) + self.vector("offset", layout, 0.0, dtype)


class LNTuning(base.AdapterMethod):
    """Scale and offset after every norm."""

    summary = "a trainable scale and offset on every norm's output"
    not_stacked = None

    @property
    def name(self) -> str:
        """Short name in parameter paths."""
        return "ln_tuning"

    def label(self) -> str:
        """``LN-tuning``."""
        return "LN-tuning"

    def roles(self) -> frozenset[str]:
        """All norms of the blocks, and the one after the last block."""
        return frozenset({"norm"})

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """One scale and one offset."""
        return NormDelta(target)

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """All groups at once."""
        return NormChange(deltas)
