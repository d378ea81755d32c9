"""DoRA per context group: a weight's magnitude and direction are trained separately, the direction by a low-rank
update.

``y = m / ‖W + s B A‖ ⊙ (W + s B A) x + b`` with one magnitude per output feature and ``s = alpha / rank``: Liu et al.
2024, arXiv 2402.09353, equation 5. The norm, taken over each row of the weight, is a constant for the gradient (their
section 4.3), as in Hugging Face PEFT. ``m`` is initialised to the norm of ``W`` and ``B`` to zero, so the
adapter starts as the identity: bit for bit on the device type and dtype on which ``m`` was computed, elsewhere up to
rounding of the norm.

Dropout acts on the input of the low-rank path only; in PEFT it also acts on the input of ``W``.

Shapes: B rows, T positions, I and O input and output features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from adapters import base
from adapters.placement.offload import tensor_of
from adapters.placement.roles import Target
from adapters.placement.router import Layout


class DoRAConfig(base.Config):
    """Options, named as in Hugging Face PEFT where it has them."""

    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] | None = None  # the update is scaled by alpha / rank; None: alpha = rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    where: base.Where = "AF"


class DoRADelta(base.Delta):
    """A low-rank pair and a magnitude per output feature.

    Raises:
        UserError: the rank is larger than the layer, or the layer's weight is not readable (it is quantised).
    """

    undecayed = ("lora_magnitude_vector",)

    def __init__(self, target: Target, config: DoRAConfig, generator: torch.Generator) -> None:
        super().__init__()
        base.check_rank(config.rank, target)
        self.target = target  # not a submodule: its layer is the base's, neither saved nor moved with the adapter
        self.lora_A = nn.Parameter(torch.empty(config.rank, target.in_features))
        self.lora_B = nn.Parameter(torch.zeros(target.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        weight_OI = target.weight().detach().to(self._norm_dtype())
        self.lora_magnitude_vector = nn.Parameter(_row_norms(weight_OI.contiguous()).to(self.lora_A))
        self.scale = (config.alpha or config.rank) / config.rank
        self.dropout = config.dropout

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """Adds ``(ratio - 1) ⊙ W x`` and ``ratio ⊙ s B A x`` to ``y``, which already contains ``W x``."""
        dtype = value_BTD.dtype
        if self.dropout:
            x_BTI = F.dropout(x_BTI, self.dropout, self.training)
        update_BTO = F.linear(F.linear(x_BTI, self.lora_A.to(x_BTI.dtype)), self.lora_B.to(x_BTI.dtype)) * self.scale
        ratio_O, bias_O = self.ratio(), self._layer_bias()
        without_bias_BTO = value_BTD if bias_O is None else value_BTD - bias_O.to(dtype)
        # Subtract before rounding to the value's dtype: ratio - 1 is small, and exactly zero at initialisation.
        return value_BTD + (ratio_O - 1).to(dtype) * without_bias_BTO + ratio_O.to(dtype) * update_BTO.to(dtype)

    def ratio(self) -> Tensor:
        """``m / ‖W + s B A‖`` (O,); the norm is a constant for the gradient."""
        a_RI, b_OR, magnitude_O = self.lora_A.detach(), self.lora_B.detach(), self.lora_magnitude_vector
        weight_OI, dtype = self.target.weight().detach().to(magnitude_O.device), self._norm_dtype()
        with maybe_autocast(magnitude_O.device.type, enabled=False):  # bf16 would make the norm imprecise
            sum_OI = torch.addmm(weight_OI.to(dtype), b_OR.to(dtype), a_RI.to(dtype), alpha=self.scale)
            norm_O = _row_norms(sum_OI).to(magnitude_O.dtype)
        return magnitude_O / norm_O

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """``ratio ⊙ (W + s B A)``; scales what an earlier method merged into the bias, but not the layer's own bias."""
        ratio_O, own_O = self.ratio(), self._layer_bias()
        own_O = torch.zeros_like(bias_O) if own_O is None else own_O
        merged_OI = ratio_O[:, None] * (weight_OI + self.scale * self.lora_B @ self.lora_A)
        return merged_OI, bias_O + (ratio_O - 1) * (bias_O - own_O)

    def _norm_dtype(self) -> torch.dtype:
        return torch.promote_types(self.lora_A.dtype, torch.float32)

    def _layer_bias(self) -> Tensor | None:
        bias_O = cast("Tensor | None", tensor_of(self.target.layer, "bias"))
        if bias_O is None:
            return None
        bias_O = bias_O.to(self.lora_B.device)
        if self.target.rows is None:
            return bias_O
        return bias_O.index_select(0, torch.as_tensor(self.target.rows, device=bias_O.device))


def _row_norms(weight_OI: Tensor) -> Tensor:
    """L2 norm of every row (O,), clamped above zero so that a row of zeros does not give 0 / 0."""
    norms_O: Tensor = torch.linalg.vector_norm(weight_OI, dim=1)
    return norms_O.clamp(min=torch.finfo(weight_OI.dtype).tiny)


class DoRAChange(base.Change):
    """Applies every delta once, to all its spans together: its norm costs the same for one token as for all."""

    def _by_span(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        assert layout.spans is not None  # noqa: S101 - for the type checker
        sizes = [span.stop - span.start for span in layout.spans]
        xs, pieces = torch.split(x_BTI, sizes, dim=1), list(torch.split(value_BTD, sizes, dim=1))
        for group in self.groups:
            own = [index for index, span in enumerate(layout.spans) if span.group == group]
            if own:
                x_BMI, value_BMD = (torch.cat([of[index] for index in own], dim=1) for of in (xs, pieces))
                changed = torch.split(self.delta(group)(x_BMI, value_BMD), [sizes[index] for index in own], dim=1)
                for index, piece in zip(own, changed, strict=True):
                    pieces[index] = piece
            elif torch.is_grad_enabled():  # a group without tokens stays in the graph (see Change)
                pieces.append(self.delta(group)(x_BTI[:, :0], value_BTD[:, :0]))
        return torch.cat(pieces, dim=1)


class DoRA(base.AdapterMethod):
    """Weight-decomposed low-rank adaptation."""

    summary = "LoRA on the weight's direction, and a trained magnitude per output feature"
    Config = DoRAConfig
    config: DoRAConfig

    def label(self) -> str:
        """``DoRA r=8``, plus `where` if it is not AF."""
        return f"DoRA r={self.config.rank}" + base.place_label(self.config.where)

    def roles(self) -> frozenset[str]:
        """Attention, feed-forward or both."""
        return base.roles_of(self.config.where)

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """One low-rank pair and one magnitude vector."""
        return DoRADelta(target, self.config, generator)

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """A change that computes each group's norm once."""
        return DoRAChange(deltas)
