"""MokA per context group: one A per group, low-rank cross-attention to text, one B for all groups.

Wei et al., NeurIPS 2025, arXiv 2506.05191. With z = A_g x for a token of group g, a token of a non-text group adds
cross-attention to the text tokens' low-rank states, and all states pass through the shared B:

    h = W x + (alpha / r) B (z + λ softmax(z K^T / √r) K),    K = A_t x_t of the text tokens    (non-text groups)
    h = W x + (alpha / r) B z                                                                  (text groups)

Queries are non-text and keys are text, as in the authors' code (https://github.com/GeWu-Lab/MokA), and λ is 1 there.
Its visual-text case divides by √r, as here, its audio-visual case by the root of the number of keys. B is
initialised to zero.

In the paper keys are the tokens of the instruction, at any position, and never those of the answer: set
``instruction_groups`` for that. A layout of contexts does not say which text is known before the answer, so by default
(our choice) keys are the earlier tokens of all text groups: causal, so the target cannot leak. Padding according to the
model's ``attention_mask`` is never a key.

Shapes: B rows, T positions, K positions including the KV cache, I and O input and output features, R rank, X 1 or B
rows, Q and S positions that are a query or a key in at least one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from adapters import base
from adapters.placement.packed_rows import sequences_of
from adapters.placement.roles import Target
from adapters.placement.router import Layout, Router, not_compiled, to_device
from harness.core.contexts import TEXT_CONTEXT
from harness.core.errors import UserError, did_you_mean

Groups = Annotated[tuple[str, ...], Field(min_length=1)]


class MokAConfig(base.Config):
    """Options."""

    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] | None = None  # the update is scaled by alpha / rank; None: alpha = rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    where: base.Where = "AF"
    cross_modal_scale: Annotated[float, Field(ge=0)] = 1.0  # λ
    text_groups: Groups | None = None  # groups without queries; None: the group of the context named text
    instruction_groups: Groups | None = None  # keys for all positions; None: earlier text. Never the target's group


class MokADelta(base.Delta):
    """One group's projection ``lora_A`` (R, I), which produces the low-rank state, not the layer's output."""

    def __init__(self, in_features: int, config: MokAConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(config.rank, in_features))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.dropout = config.dropout

    def forward(self, x_BTI: Tensor, value_BTD: Tensor) -> Tensor:
        """Adds ``A dropout(x)`` to the state (B, T, R), which is zero."""
        return self.add(x_BTI, value_BTD, self.lora_A.to(x_BTI.dtype))

    def add(self, x_BTI: Tensor, value_BTD: Tensor, A_RI: Tensor) -> Tensor:
        """``forward`` with the given A."""
        if self.dropout:
            x_BTI = F.dropout(x_BTI, self.dropout, self.training)
        return value_BTD + F.linear(x_BTI, A_RI)


class Visible(NamedTuple):
    """Which low-rank states attend to which in one pass."""

    queries_Q: Tensor  # positions that are a query in at least one row
    keys_S: Tensor  # positions that are a key in at least one row
    blocked_XQS: Tensor
    some_XQ1: Tensor  # whether a query has a key


class CrossModal(nn.Module):
    """Which states attend to which: computed once per pass for all layers. Has no parameters."""

    def __init__(self, config: MokAConfig) -> None:
        super().__init__()
        self.config = config
        self.known_text: tuple[str, ...] | None = None  # the group of the context named text, if there is one

    def text_groups(self, groups: Sequence[str]) -> tuple[str, ...]:
        """The text groups among ``groups``.

        Raises:
            UserError: an option names a group that is not in ``groups``, or an instruction group that is not text; or
                ``text_groups`` is missing and no context is known to be text.
        """
        text = self.config.text_groups or self._known_text(groups)
        for option, named, allowed in (
            ("text_groups", text, groups),
            ("instruction_groups", self.config.instruction_groups or (), text),
        ):
            for group in named:
                if group not in allowed:
                    raise UserError(f"{option}: found {group!r}; {did_you_mean(group, allowed)}")
        return text

    def _known_text(self, groups: Sequence[str]) -> tuple[str, ...]:
        if self.known_text is not None:
            return tuple(group for group in groups if group in self.known_text)
        if TEXT_CONTEXT in groups or len(groups) == 1:
            return (TEXT_CONTEXT,) if TEXT_CONTEXT in groups else tuple(groups)
        raise UserError(
            f"text_groups: found none, and no context is named {TEXT_CONTEXT!r}; allowed: a list of those that are "
            f"text, of {', '.join(groups)}"
        )

    @not_compiled
    def visible(self, layout: Layout, groups: tuple[str, ...]) -> Visible | None:
        """Queries, keys and their mask in the current pass; None if no token attends to another.

        Raises:
            UserError: tokens of this pass would have to attend to tokens in the KV cache, or the reverse; or the
                attention mask is not (B, K).
        """
        return layout.keep((self, groups), lambda: self._compute(layout, groups))

    def _compute(self, layout: Layout, groups: tuple[str, ...]) -> Visible | None:
        text = self.text_groups(groups)
        instruction = self.config.instruction_groups
        # On the host: which positions are keys and queries decides the shapes.
        host_key_XT, host_query_XT = (
            np.isin(layout.host_ids_XT, [layout.groups.index(group) for group in named])
            for named in (instruction or text, [group for group in groups if group not in text])
        )
        if layout.past and (host_query_XT.any() or (instruction and host_key_XT.any())):
            raise UserError(
                "moka: with a filled KV cache, new tokens must be text and not instruction "
                f"(text groups: {', '.join(text)}); otherwise generate with use_cache=False"
            )
        mask = layout.attention_mask
        if mask is not None and mask.dim() != 2:
            raise UserError(
                f"moka: attention_mask: found {mask.dim()} dimensions; allowed: 2, (rows, positions), no static cache"
            )
        device = layout.group_ids_XT.device
        queries_Q, keys_S = (
            to_device(np.flatnonzero(some_XT.any(axis=0)), device) for some_XT in (host_query_XT, host_key_XT)
        )
        if not len(queries_Q) or not len(keys_S):
            return None
        key_XT, query_XT = (torch.from_numpy(some_XT).to(device) for some_XT in (host_key_XT, host_query_XT))
        if mask is not None:
            attended_BT = mask[:, -layout.length :].to(device, torch.bool)
            # Soft prompts come before the caller's positions.
            key_XT = key_XT & F.pad(attended_BT, (layout.length - attended_BT.shape[1], 0), value=True)
        mask_XQS = query_XT[:, queries_Q, None] & key_XT[:, None, keys_S]
        if layout.sequence_XT is not None:
            prompts = layout.length - layout.sequence_XT.shape[1]
            sequence_XT = F.pad(layout.sequence_XT.to(device), (prompts, 0), value=-1)
            same_XQS = sequence_XT[:, queries_Q, None] == sequence_XT[:, None, keys_S]
            mask_XQS = mask_XQS & (same_XQS | (keys_S < prompts))
        if not instruction:
            mask_XQS = mask_XQS & (keys_S < queries_Q[:, None])
        return Visible(queries_Q, keys_S, ~mask_XQS, mask_XQS.any(dim=-1, keepdim=True))


class MokAChange(base.Change):
    """All groups' states, their cross-attention, and the shared ``lora_B`` (O, R)."""

    def __init__(self, deltas: Mapping[str, base.Delta], out_features: int, cross_modal: CrossModal) -> None:
        super().__init__(deltas)
        config = cross_modal.config
        self.cross_modal = cross_modal
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.rank))
        self.scale = (config.alpha or config.rank) / config.rank

    def forward(self, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """``y + scale · B (A_g x + λ · attention)``; tokens of other groups are unchanged."""
        rank = self.lora_B.shape[1]
        state_BTR = super().forward(x_BTI, x_BTI.new_zeros(*x_BTI.shape[:2], rank), layout)
        visible = self.cross_modal.visible(layout, self.groups)
        if visible is not None:
            found_BQR = self._attend(state_BTR, visible).to(state_BTR.dtype)
            state_BTR = state_BTR.index_add(
                1, visible.queries_Q, found_BQR, alpha=self.cross_modal.config.cross_modal_scale
            )
        dtype = value_BTD.dtype
        B_OR = layout.constant((self, "lora_B", dtype), lambda: self.lora_B.to(dtype))
        state_NR = state_BTR.to(dtype).flatten(0, 1)
        return torch.addmm(value_BTD.flatten(0, 1), state_NR, B_OR.T, alpha=self.scale).view_as(value_BTD)

    def changed(self, group: str, x_BTI: Tensor, value_BTD: Tensor, layout: Layout) -> Tensor:
        """The state ``A_g x`` of the group's tokens."""
        delta: MokADelta = self.delta(group)
        dtype = x_BTI.dtype
        A_RI = layout.constant((self, group, dtype), lambda: delta.lora_A.to(dtype))
        return delta.add(x_BTI, value_BTD, A_RI)

    def _attend(self, state_BTR: Tensor, visible: Visible) -> Tensor:
        query_BQR, key_BSR = (state_BTR.index_select(1, where) for where in (visible.queries_Q, visible.keys_S))
        scores_BQS = (query_BQR @ key_BSR.transpose(1, 2)) / math.sqrt(state_BTR.shape[-1])
        scores_BQS = scores_BQS.to(torch.promote_types(scores_BQS.dtype, torch.float32))
        lowest = torch.finfo(scores_BQS.dtype).min
        weights_BQS = scores_BQS.masked_fill(visible.blocked_XQS, lowest).softmax(dim=-1)
        # Weights of blocked keys are zero, except of a query without keys, which adds nothing.
        return (weights_BQS * visible.some_XQ1).to(state_BTR.dtype) @ key_BSR


class PaddingMask(base.ModelChange):
    """Passes the ``attention_mask``, and which sequences are packed in a row, to the layers' cross-attention."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def attach(self, language_model: nn.Module) -> Callable[[], None]:
        """Read the model's arguments before every pass, without changing them."""
        return language_model.register_forward_pre_hook(self._before, with_kwargs=True).remove

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # The second positional argument of every causal LM, or a keyword.
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        sequence_XT = sequences_of(module.config.get_text_config(), {**kwargs, "attention_mask": mask})
        self.router.use(self.router.layout.with_mask(mask, sequence_XT))


class MokA(base.AdapterMethod):
    """Low-rank adaptation with one A per modality, cross-attention to text, and a shared B."""

    summary = "low-rank update with an A per group, low-rank cross-attention to text, one shared B"
    joins_groups = True
    not_stacked = "its groups already share B, and attend to each other's states"
    Config = MokAConfig
    config: MokAConfig

    def label(self) -> str:
        """``MokA r=8``, plus `where` if it is not AF."""
        return f"MokA r={self.config.rank}" + base.place_label(self.config.where)

    def roles(self) -> frozenset[str]:
        """Attention, feed-forward or both."""
        return base.roles_of(self.config.where)

    def delta(self, target: Target, generator: torch.Generator) -> base.Delta:
        """One A.

        Raises:
            UserError: the rank is larger than the layer.
        """
        base.check_rank(self.config.rank, target)
        return MokADelta(target.in_features, self.config, generator)

    def shared(self, targets: Sequence[Target], generator: torch.Generator) -> nn.Module:
        """The attention pattern of the pass, shared by all layers."""
        return CrossModal(self.config)

    def change(
        self, target: Target, deltas: Mapping[str, base.Delta], shared: nn.Module | None, generator: torch.Generator
    ) -> base.Change:
        """Every group's A and the shared B."""
        assert isinstance(shared, CrossModal)  # noqa: S101 - for the type checker
        return MokAChange(deltas, target.out_features, shared)

    def model_change(
        self,
        language_model: nn.Module,
        groups: Sequence[str],
        router: Router,
        shared: nn.Module | None,
        generator: torch.Generator,
    ) -> base.ModelChange:
        """The hook that passes the padding mask to the layers.

        Raises:
            UserError: an option names a group that does not use this method, or ``text_groups`` must be given.
        """
        assert isinstance(shared, CrossModal)  # noqa: S101 - for the type checker
        if TEXT_CONTEXT in router.grouping:
            shared.known_text = tuple(group for group in (router.grouping[TEXT_CONTEXT],) if group is not None)
        shared.text_groups(groups)  # before the first pass
        return PaddingMask(router)
