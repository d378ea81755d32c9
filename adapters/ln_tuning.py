"""LN-tuning per context group: every norm's output is scaled and shifted.

Qi et al. 2022, arXiv 2211.08682, train gain and bias of the layer norms; Zhao et al. 2023, arXiv 2312.11420, do so for
multimodal models. Here the norms' own stay frozen, and each context has ``g ⊙ norm(x) + o``: for one context alone the
same functions, and an offset also where the norm has none (RMSNorm). ``g`` is one and ``o`` zero at start.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adapters import base
from adapters.roles import Target
from adapters.router import Layout
from harness.errors import UserError


class NormDelta(base.Delta):
    """Scale and offset, both (O,).

    Raises:
        UserError: the norm has no weight, so its width is not known.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        if not target.out_features:
            raise UserError(f"{target.path}: a {type(target.layer).__name__} without weight cannot be tuned")
        self.target = target
        self.scale = nn.Parameter(torch.ones(target.out_features))
        self.offset = nn.Parameter(torch.zeros(target.out_features))

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``g ⊙ y + o``."""
        return value_BTD * self.scale.to(value_BTD.dtype) + self.offset.to(value_BTD.dtype)

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias, both (O,), of the norm that computes what norm and delta compute together.

        Args:
            weight_OI: the norm's weight, which is a vector (O,).
            bias_O: its bias, zeros where it has none.

        Raises:
            UserError: the norm does not multiply by its weight.
        """
        one = self._added_to_weight()
        return (weight_OI + one) * self.scale - one, bias_O * self.scale + self.offset

    @torch.no_grad()
    def _added_to_weight(self) -> float:
        """What the norm adds to its weight before it multiplies by it: 0, or 1 (Gemma). Tried, as no name tells it."""
        norm = self.target.layer
        if isinstance(norm, nn.LayerNorm):
            return 0.0
        assert norm is not None  # noqa: S101 - for the type checker
        weight_O = norm.get_parameter("weight").float()
        sign_O = torch.ones_like(weight_O)
        sign_O[1::2] = -1  # of mean square one, so that a norm returns it times what it multiplies by
        # forward and not the module itself: no hooks.
        added_O = norm.forward(sign_O) * sign_O - weight_O
        for one in (0.0, 1.0):
            if (added_O - one).abs().max() < 1e-2:
                return one
        raise UserError(f"a {type(norm).__name__} does not multiply by its weight")


class NormChange(base.Change):
    """Every token's scale and offset looked up: the cost does not grow with the number of groups."""

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``g_c ⊙ y + o_c``."""
        if layout.owned_by(self.groups):
            return super().forward(x_BTI, value_BTD, layout)
        scale_XTD, offset_XTD = self.table("scale", layout, 1.0), self.table("offset", layout, 0.0)
        return value_BTD * scale_XTD.to(value_BTD.dtype) + offset_XTD.to(value_BTD.dtype)


class LNTuning(base.AdapterMethod):
    """Scale and offset behind every norm."""

    summary = "a trainable scale and offset on every norm's output"

    @property
    def name(self) -> str:
        """Short name in the paths of parameters."""
        return "ln_tuning"

    def label(self) -> str:
        """``LN-tuning``."""
        return "LN-tuning"

    def roles(self) -> frozenset[str]:
        """All norms of the blocks, and the one behind the last block."""
        return frozenset({"norm"})

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """One scale and one offset."""
        return NormDelta(target)

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """All groups at once."""
        return NormChange(deltas)
