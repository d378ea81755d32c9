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
import operator
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

from adapters import base
from adapters.methods.lora_forms import low_rank, whole
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
        ratio_O, bias_O = self.ratio(), self.layer_bias()
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

    def written(self) -> _Written | None:
        """What ``ratio`` depends on, as it is now; None: a weight may change without a sign (offloaded, a part)."""
        weight = getattr(self.target.layer, "weight", None)
        tensors: tuple[Any, ...] = (self.lora_A, self.lora_B, self.lora_magnitude_vector, weight)
        if not all(
            isinstance(x, Tensor) and not (x.is_meta or x.is_inference() or hasattr(x, "ds_id")) for x in tensors
        ):
            return None
        return _Written(tensors, tuple((x.data_ptr(), x._version) for x in tensors))

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """``ratio ⊙ (W + s B A)``; scales what an earlier method merged into the bias, but not the layer's own bias."""
        ratio_O, own_O = self.ratio(), self.layer_bias()
        own_O = torch.zeros_like(bias_O) if own_O is None else own_O
        merged_OI = ratio_O[:, None] * (weight_OI + self.scale * self.lora_B @ self.lora_A)
        return merged_OI, bias_O + (ratio_O - 1) * (bias_O - own_O)

    def _norm_dtype(self) -> torch.dtype:
        return torch.promote_types(self.lora_A.dtype, torch.float32)

    def layer_bias(self) -> Tensor | None:
        """The layer's own bias (O,), or this role's part of it."""
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


class _Scaled(NamedTuple):
    """One group's ratio minus one (O,), and ``ratio ⊙ B`` (O, R)."""

    added_O: Tensor
    B_OR: Tensor


class _Written(NamedTuple):
    """Tensors, and of each where its numbers are and how often they were written."""

    tensors: tuple[Any, ...]
    state: tuple[tuple[int, int], ...]

    def same(self, other: _Written) -> bool:
        """Whether they are the same tensors, and none was written in between."""
        return self.state == other.state and all(map(operator.is_, self.tensors, other.tensors))


class _Kept(dict[str, tuple[_Written, Tensor]]):
    """Group → its ratio (O,), and what that was computed from. A copy of it (deepcopy, pickle) is empty."""

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


class DoRAChange(base.Change):
    """Scales the layer's output by each token's ratio, then adds LoRA with ``ratio ⊙ B`` in one of its forms.

    The norm, which costs the same for one token as for all, is computed once per pass, and once in a generation. A loop
    that decodes with a KV cache of its own uses that of its first pass, as long as no tensor was written.
    """

    def __init__(self, deltas: Mapping[str, base.Delta]) -> None:
        super().__init__(deltas)
        self._kept = _Kept()

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + (ratio_c - 1) ⊙ (y - b) + s · (ratio_c ⊙ B_c) A_c dropout(x)``."""
        if torch._C._are_functorch_transforms_active():  # torch.func does not see through the forms' own backward
            return super().forward(x_BTI, value_BTD, layout)
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or not layout.past):
            self._kept.clear()  # of all groups: DeepSpeed and others write through `.data`, which no counter sees
        first: DoRADelta = self.delta(self.groups[0])
        if first.dropout and first.training:
            x_BTI = F.dropout(x_BTI, first.dropout)
        dtype, alone = value_BTD.dtype, self.alone(layout)
        scaled = {group: self._scaled(group, layout) for group in (self.groups if alone is None else (alone,))}
        # Subtract before rounding to the value's dtype: ratio - 1 is small, and exactly zero at initialisation.
        if alone is None:
            added = self.of_tokens({group: of.added_O for group, of in scaled.items()}, layout, 0.0).to(dtype)
        else:
            added = scaled[alone].added_O.to(dtype)
        bias_O = first.layer_bias()
        without_bias_BTO = value_BTD if bias_O is None else value_BTD - bias_O.to(dtype)
        value_BTD = torch.addcmul(value_BTD, added, without_bias_BTO)
        if alone is not None and not torch.is_grad_enabled():
            A_RI, B_OR = self.delta(alone).lora_A, scaled[alone].B_OR
            pair = layout.constant((self, alone, dtype), lambda: (A_RI.to(dtype), B_OR.to(dtype)))
            return whole(x_BTI, value_BTD, pair, first.scale)
        pairs = {group: (self.delta(group).lora_A, of.B_OR) for group, of in scaled.items()}
        return low_rank(x_BTI, value_BTD, layout, pairs, first.scale)

    def _scaled(self, group: str, layout: Layout) -> _Scaled:
        delta: DoRADelta = self.delta(group)
        if torch.compiler.is_compiling() or layout.has_tokens_of(group):
            return layout.constant((self, group), lambda: _scaled(delta, self._ratio(group, layout)))
        # A group without tokens stays in the graph (see Change), where its zero gradients need no norm.
        return _scaled(delta, delta.lora_magnitude_vector)

    def _ratio(self, group: str, layout: Layout) -> Tensor:
        delta: DoRADelta = self.delta(group)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return delta.ratio()
        written, kept = delta.written(), self._kept.get(group)
        # Only passes that continue a sequence use what an earlier one of it computed.
        if layout.past and written and kept and written.same(kept[0]):
            return kept[1]
        ratio_O = delta.ratio()
        if written:
            self._kept[group] = written, ratio_O
        return ratio_O


def _scaled(delta: DoRADelta, ratio_O: Tensor) -> _Scaled:
    return _Scaled(ratio_O - 1, ratio_O[:, None] * delta.lora_B)


class DoRA(base.AdapterMethod):
    """Weight-decomposed low-rank adaptation."""

    summary = "LoRA on the weight's direction, and a trained magnitude per output feature"
    not_stacked = "its magnitude is of one direction, whose norm is not the sum of two groups' norms"
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
        """A change that computes each group's norm once, and all groups in one form."""
        return DoRAChange(deltas)
