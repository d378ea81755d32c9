"""LoRA per context group: ``h = W x + s B A x``, with ``s = alpha / r``, or ``alpha / sqrt(r)`` in rsLoRA.

Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; PiSSA: Meng et al. 2024, arXiv
2404.02948; OLoRA: Büyükakyüz 2024, arXiv 2406.01775; Context-LoRA in Context-PEFT, arXiv 2312.08900. lora_linear
computes all groups together with the layer where it can, lora_forms elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import base
from adapters.methods.lora_forms import low_rank, whole
from adapters.methods.lora_linear import linear
from adapters.placement.roles import Target
from adapters.placement.router import Layout


class LoRAConfig(base.Config):
    """Options, named as in Hugging Face PEFT where it has them.

    ``init_lora_weights``: ``true`` initialises A like ``nn.Linear``, ``gaussian`` from a normal distribution with
    standard deviation 1 / rank; B is zero in both. ``pissa`` initialises from the ``rank`` largest singular values of W
    and their vectors, ``olora`` from the first columns of W's QR decomposition. To start as the identity, their initial
    pair (A₀, B₀) is subtracted, not from W, which is unchanged, but from the update, ``s (B A - B₀ A₀) x``: the same
    training, at the cost of twice the rank.
    """

    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] | None = None  # None: equal to rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False  # s = alpha / sqrt(rank) instead of alpha / rank
    init_lora_weights: Literal[True, "gaussian", "pissa", "olora"] = True
    where: base.Where = "AF"

    @property
    def scale(self) -> float:
        """``s``."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def starts_from_weight(self) -> bool:
        """Whether A and B are initialised from the layer's own weight."""
        return self.init_lora_weights in {"pissa", "olora"}

    @model_validator(mode="after")
    def _no_dropout_of_what_the_base_computes(self) -> LoRAConfig:
        if self.starts_from_weight and self.dropout:
            raise ValueError(
                f"dropout must be 0 with init_lora_weights: {self.init_lora_weights}, which starts from W; "
                f"found {self.dropout}"
            )
        return self


class LoRADelta(base.Delta):
    """One low-rank pair. Shapes: R rank, S rank of its update: R, or 2 R if an initial pair is subtracted.

    Args:
        target: the layer.
        config: options.
        generator: source of A's initial values.

    Raises:
        UserError: the rank is larger than the layer, or the pair is initialised from a weight that is not readable.
    """

    start_A: Tensor
    start_B: Tensor

    def __init__(self, target: Target, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__()
        base.check_rank(config.rank, target)
        self.lora_A = nn.Parameter(torch.empty(config.rank, target.in_features))
        self.lora_B = nn.Parameter(torch.zeros(target.out_features, config.rank))
        self.scale = config.scale
        self.dropout = config.dropout
        self.has_start = config.starts_from_weight
        if self.has_start:
            self.undecayed = ("lora_A", "lora_B")  # their start is the identity
            start_A, start_B = _from_weight(target.weight().detach().float(), config)
            # Saved with the adapter: decomposing W again elsewhere could give other signs and rounding.
            self.register_buffer("start_A", start_A)
            self.register_buffer("start_B", start_B)
            with torch.no_grad():
                self.lora_A.copy_(start_A)
                self.lora_B.copy_(start_B)
        elif config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / config.rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (S, I) and B (O, S) of the update ``scale · B A x``; of stacked groups the pairs of both, so 2 S for S."""
        if not self.below:
            return self.own_factors()
        pairs = [delta.own_factors() for delta in (*self.below, self)]
        return torch.cat([A_SI for A_SI, _ in pairs]), torch.cat([B_OS for _, B_OS in pairs], dim=1)

    def own_factors(self) -> tuple[Tensor, Tensor]:
        """The pair of this group alone.

        With an initial pair it is ``B A - B₀ A₀ = (B - B₀) A + B₀ (A - A₀)``, whose terms are exactly zero at first.
        """
        if not self.has_start:
            return self.lora_A, self.lora_B
        A_SI = torch.cat([self.lora_A, self.lora_A - self.start_A])
        B_OS = torch.cat([self.lora_B - self.start_B, self.start_B], dim=1)
        return A_SI, B_OS

    def factors_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``factors`` in a dtype."""
        A_SI, B_OS = self.factors()
        return A_SI.to(dtype), B_OS.to(dtype)

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """``y + scale · B A dropout(x)``."""
        A_SI, B_OS = self.factors_in(value_BTD.dtype)
        x_BTI = F.dropout(x_BTI.to(value_BTD.dtype), self.dropout, self.training)
        return torch.add(value_BTD, F.linear(F.linear(x_BTI, A_SI), B_OS), alpha=self.scale)

    def merge(self, weight_OI: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """``W + scale · B A``."""
        A_SI, B_OS = self.factors()
        return weight_OI + self.scale * B_OS @ A_SI, bias_O


def _from_weight(weight_OI: Tensor, config: LoRAConfig) -> tuple[Tensor, Tensor]:
    """A₀ (R, I) and B₀ (O, R) as in Hugging Face PEFT (peft/tuners/lora/layer.py: pissa_init, olora_init)."""
    rank = config.rank
    if config.init_lora_weights == "olora":
        Q_OK, R_KI = torch.linalg.qr(weight_OI)
        return R_KI[:rank].clone(), Q_OK[:, :rank].clone()
    U_OK, S_K, V_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = (S_K[:rank] / config.scale).sqrt()
    return root_R[:, None] * V_KI[:rank], U_OK[:, :rank] * root_R


class LoRAChange(base.Change):
    """All groups' pairs, in the form that is fastest for the layout (see lora_forms)."""

    def with_layers(
        self, x_BTI: Tensor, parts: Sequence[tuple[nn.Linear, base.Change]], layout: Layout
    ) -> tuple[Tensor, ...] | None:
        """``W x + b + scale · B_c A_c x`` as one operation, where lora_linear can."""
        first: LoRADelta = self.delta(self.groups[0])
        if (first.dropout and first.training) or layout.of_generation:
            return None
        alone = None if torch.is_grad_enabled() else self.alone(layout)
        groups = self.groups if alone is None else (alone,)
        pairs = [(layer, {group: change.delta(group).factors() for group in groups}) for layer, change in parts]
        return linear(x_BTI, pairs, layout, first.scale)

    def joins(self, other: base.Change) -> bool:
        """Whether the groups, and the ranks, are the same."""
        if not isinstance(other, LoRAChange) or other.groups != self.groups:
            return False
        mine, its = self.delta(self.groups[0]), other.delta(self.groups[0])
        same: bool = mine.lora_A.shape == its.lora_A.shape and mine.scale == its.scale
        return same and mine.has_start == its.has_start and mine.dropout == its.dropout

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + scale · B_c A_c dropout(x)``."""
        if torch._C._are_functorch_transforms_active():  # torch.func does not see through the forms' own backward
            return super().forward(x_BTI, value_BTD, layout)
        deltas: dict[str, LoRADelta] = {group: self.delta(group) for group in self.groups}
        first = deltas[self.groups[0]]
        if first.dropout and first.training:
            # All groups have the same options, so one dropout over all tokens is equivalent to one per group.
            x_BTI = F.dropout(x_BTI, first.dropout)
        alone = None if torch.is_grad_enabled() else self.alone(layout)
        if alone is not None:
            dtype = value_BTD.dtype
            pair = layout.constant((self, alone, dtype), lambda: deltas[alone].factors_in(dtype))
            return whole(x_BTI, value_BTD, pair, first.scale)
        pairs = {group: delta.factors() for group, delta in deltas.items()}
        return low_rank(x_BTI, value_BTD, layout, pairs, first.scale)


class LoRA(base.AdapterMethod):
    """Low-rank adaptation of every linear layer in the chosen roles."""

    summary = "low-rank update of the linear layers: W x + (alpha / r) B A x"
    not_stacked = None
    Config = LoRAConfig
    config: LoRAConfig

    def label(self) -> str:
        """``LoRA r=4``, ``rsLoRA r=4 pissa``, plus `where` if it is not AF."""
        start = "" if self.config.init_lora_weights is True else f" {self.config.init_lora_weights}"
        name = "rsLoRA" if self.config.use_rslora else "LoRA"
        return f"{name} r={self.config.rank}{start}" + base.place_label(self.config.where)

    def roles(self) -> frozenset[str]:
        """Attention, feed-forward or both."""
        return base.roles_of(self.config.where)

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """One low-rank pair."""
        return LoRADelta(target, self.config, generator)

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """A change that computes all groups in one form."""
        return LoRAChange(deltas)
