"""Multi-modal causal attention: text attends to each modality with a separate softmax; the results are summed.

DeepSpeed-VisualChat, Yao et al. 2023, arXiv 2309.14327, section 4.1: visual tokens attend only to themselves; textual
tokens attend to all earlier tokens, with one attention matrix for text and another for images. For a text token at t

    o_t = softmax_{s ≤ t, s text}(q_t K_s) V_s + Σ_m softmax_{s ≤ t, s in m}(q_t K_s) V_s

over the other contexts m, unscaled, so weights sum to the number of visible sources. A source without an earlier token
adds nothing, so text without other contexts has ordinary attention. The authors' code
(https://github.com/deepspeedai/DeepSpeedExamples, applications/DeepSpeed-VisualChat, modeling_llama.py) lets an image
token see its own position and no other image token (here: ``itself``). There it also sees earlier text, which the paper
does not describe and this implementation does not do.

Shapes: B rows, H heads, E features of a head, T queries, K keys (including the KV cache), X 1 or B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from adapters import base
from adapters.placement.router import Layout, Router, to_device
from harness.core.contexts import TEXT_CONTEXT
from harness.core.errors import UserError, did_you_mean

NAME = "harness_mmca"  # in transformers' attention registry; models that do not select it are unaffected
_ATTENTION = "_harness_mmca"  # an attribute of the modules of an adapted model: its attention
_MASKS_OF_A_PASS = 4  # one per kind of layer
_UNKNOWN = ("softcap", "s_aux", "position_bias")  # attention features of some families that are not supported


class MMCAConfig(base.Config):
    """Options."""

    # contexts that together form the text source; every other context is a source of its own. None: the one named text
    text_contexts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    non_text_attention: Literal["itself", "own_context"] = (
        "itself"  # own_context: also earlier tokens of the same context
    )


class MultiModalAttention(base.ModelChange):
    """Replaces one model's attention through transformers' registry of attention functions."""

    def __init__(self, config: MMCAConfig, router: Router) -> None:
        super().__init__()
        text = config.text_contexts or _known_text(router.contexts)
        for context in text:
            if context not in router.contexts:
                raise UserError(f"text_contexts: unknown context {context!r}; {did_you_mean(context, router.contexts)}")
        self.router = router
        self.itself = config.non_text_attention == "itself"
        # Source 0 is text.
        self.source_of = [0 if context in text else 1 + index for index, context in enumerate(router.contexts)]

    def attach(self, language_model: Any) -> Callable[[], None]:
        """Replace the model's attention. Returns a function that restores it.

        Raises:
            UserError: the architecture does not use transformers' attention registry.
        """
        of_parts = language_model.config.get_text_config() is not language_model.config
        inner = language_model.get_decoder() if of_parts else language_model  # a vision tower keeps its own attention
        before = inner.config._attn_implementation
        inner.set_attn_implementation(NAME)
        if inner.config._attn_implementation != NAME:
            raise UserError(f"mmca cannot replace the attention of a {language_model.config.model_type} model")
        if getattr(inner.config, "attn_logit_softcapping", None) is not None:
            _restore(inner, before)
            raise UserError(
                f"mmca cannot replace the attention of a {language_model.config.model_type} model, "
                "which caps its logits"
            )
        for module in inner.modules():
            vars(module)[_ATTENTION] = self  # not by setattr, which would register a submodule
        return partial(_restore, inner, before)

    def weights(self, scores_BHTK: Tensor, allowed_BHTK: Tensor, layout: Layout) -> Tensor:
        """Attention weights (B, H, T, K): the sum over sources of a softmax over the source's keys.

        Args:
            scores_BHTK: scaled products of queries and keys.
            allowed_BHTK: where causality and padding let a query see a key: True, or not the lowest number. All
                dimensions but the last may be 1.
            layout: layout of the pass.
        """
        lowest = torch.finfo(scores_BHTK.dtype).min
        of_sources = [
            # Weights of blocked keys are zero, except of a query that sees no key of the source, which adds nothing.
            scores_BHTK.masked_fill(blocked_BHTK, lowest).softmax(dim=-1) * some_BHT1
            for blocked_BHTK, some_BHT1 in self._seen(allowed_BHTK, layout, scores_BHTK.shape[-1])
        ]
        return sum(of_sources[1:], of_sources[0])

    def _seen(self, allowed_BHTK: Tensor, layout: Layout, keys: int) -> list[tuple[Tensor, Tensor]]:
        """Per source: which keys a query does not see, and whether it sees any. Computed once for layers with one mask.

        Layers share the mask's tensor, except those with a sliding window, which share another.
        """
        kept: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = layout.keep((self, "seen"), dict)
        found = kept.get(id(allowed_BHTK))  # of a tensor that is kept too: no other can have its id
        if found is None:
            if len(kept) >= _MASKS_OF_A_PASS:  # a layout that was set once for several passes
                kept.clear()
            found = kept[id(allowed_BHTK)] = (allowed_BHTK, self._compute_seen(_allowed(allowed_BHTK), layout, keys))
        return found[1]

    def _compute_seen(self, allowed_BHTK: Tensor, layout: Layout, keys: int) -> list[tuple[Tensor, Tensor]]:
        # A sliding-window cache holds only the latest keys; a static cache has unused slots after them (never allowed).
        source_XK = to_device(self.source_of, allowed_BHTK.device)[layout.context_ids_XK]
        of_query_XT1 = source_XK[:, -layout.length :, None]
        first_key = max(source_XK.shape[1] - keys, 0)
        key_XK = F.pad(source_XK[:, first_key:], (0, keys - source_XK.shape[1] + first_key))
        seen_XTK = (of_query_XT1 == 0) | (of_query_XT1 == key_XK[:, None])
        if self.itself:
            place_K = torch.arange(first_key, first_key + keys, device=allowed_BHTK.device)
            own_TK = torch.arange(layout.past, layout.past + layout.length, device=place_K.device)[:, None] == place_K
            seen_XTK = seen_XTK & ((of_query_XT1 == 0) | own_TK)
        allowed_BHTK = allowed_BHTK & seen_XTK[:, None]
        masks = (allowed_BHTK & (key_XK == source)[:, None, None] for source in sorted(set(self.source_of)))
        return [(~mask_BHTK, mask_BHTK.any(dim=-1, keepdim=True)) for mask_BHTK in masks]


def _allowed(mask_BHTK: Tensor) -> Tensor:
    """Where a mask lets a query see a key; an additive one comes from the caller."""
    if mask_BHTK.dtype == torch.bool:
        return mask_BHTK
    return mask_BHTK > torch.finfo(mask_BHTK.dtype).min / 2


def _known_text(contexts: tuple[str, ...]) -> tuple[str, ...]:
    """The context named text, or the only one.

    Raises:
        UserError: there are several, none of this name.
    """
    if TEXT_CONTEXT in contexts or len(contexts) == 1:
        return (TEXT_CONTEXT,) if TEXT_CONTEXT in contexts else contexts
    raise UserError(
        f"text_contexts: found none, and no context is named {TEXT_CONTEXT!r}; allowed: a list of those that are text, "
        f"of {', '.join(contexts)}"
    )


def _restore(language_model: Any, implementation: str) -> None:
    language_model.set_attn_implementation(implementation)
    for module in language_model.modules():
        vars(module).pop(_ATTENTION, None)


def _attention(
    module: nn.Module,
    query_BHTE: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Called by transformers instead of its own attention. Returns output (B, T, H, E) and weights (B, H, T, K)."""
    attention: MultiModalAttention | None = vars(module).get(_ATTENTION)
    if attention is None:
        raise RuntimeError(
            f"attention {NAME!r} was set on another model with the same config object; give every model its own config"
        )
    extra = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if extra or attention_mask is None:
        needs = " and ".join(extra) or "attention without a causal mask"
        raise UserError(f"mmca cannot replace the attention of {type(module).__name__}, which needs {needs}")
    layout = attention.router.layout_of(query_BHTE.shape[2]).on(query_BHTE.device)
    shared_by = query_BHTE.shape[1] // key.shape[1]  # query heads of each key head
    key_BHKE, value_BHKE = key.repeat_interleave(shared_by, dim=1), value.repeat_interleave(shared_by, dim=1)
    scale = query_BHTE.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHTK = query_BHTE @ key_BHKE.transpose(2, 3) * scale
    scores_BHTK = scores_BHTK.to(torch.promote_types(scores_BHTK.dtype, torch.float32))
    if attention_mask.dtype != torch.bool:
        scores_BHTK = scores_BHTK + attention_mask
    weights_BHTK = attention.weights(scores_BHTK, attention_mask, layout).to(value.dtype)
    weights_BHTK = F.dropout(weights_BHTK, dropout, module.training)
    return (weights_BHTK @ value_BHKE).transpose(1, 2).contiguous(), weights_BHTK


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Causality and padding (B, 1, T, K), True where attended; never None, even if plain attention needs no mask."""
    mask_B1TK: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask_B1TK


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class MMCA(base.AdapterMethod):
    """Attention without own parameters: ``mmca`` trains the projector only, ``mmca+lora`` adapters too."""

    summary = "multi-modal causal attention: one softmax per source modality, summed"
    grouped = False
    reads_past = True
    identity_at_start = False
    Config = MMCAConfig
    config: MMCAConfig

    def label(self) -> str:
        """``MMCA``, plus ``own context`` if non-text tokens attend to their whole context."""
        return "MMCA" if self.config.non_text_attention == "itself" else "MMCA own context"

    def model_change(
        self,
        language_model: nn.Module,
        groups: Sequence[str],
        router: Router,
        shared: nn.Module | None,
        generator: torch.Generator,
    ) -> base.ModelChange:
        """The replaced attention.

        Raises:
            UserError: ``text_contexts`` names an unknown context, or must be given.
        """
        return MultiModalAttention(self.config, router)
