"""Greedy decoding of a batch that shrinks: a row that has ended is computed no further.

transformers' ``generate`` computes every row until the longest has ended, and copies its whole cache for every token.
Here the tokens are the same, for language models whose cache and preparation of inputs are transformers' plain ones
(``decodes``); all others, and beams, are left to ``generate``.

Shapes: B rows of the prompt, L rows that have not ended, T positions of the prompt, N new tokens, K positions so far,
D width, V vocabulary, H heads, E width of a head; X is B, or 1 where all rows are alike.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin

from adapters.placement.router import Router, on_host
from harness.model.past import Past

# Settings of a model's ``generation_config`` that have no effect on greedy decoding to a given length and end.
_WITHOUT_EFFECT = {
    *("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
}
_NEEDED = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_OWN_WAYS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "generate", "_sample", "_prefill")
_DROPPED_AT = 7 / 8  # of the rows: so few left pay for copying their cache


class _AllocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of the cache in memory that is allocated once: a token is written, and nothing else is copied."""

    def __init__(self, new_tokens: int) -> None:
        super().__init__()
        self._new_tokens, self._length = new_tokens, 0
        self._stored: list[Tensor] = []  # keys and values (L, H, length of the prompt + new tokens, E)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        capacity = key_states.shape[-2] + self._new_tokens
        self._stored = [x.new_empty(*x.shape[:-2], capacity, x.shape[-1]) for x in (key_states, value_states)]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._length = self._length, self._length + key_states.shape[-2]
        for stored, new in zip(self._stored, (key_states, value_states), strict=True):
            stored[..., start : self._length, :] = new
        self._view()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._stored = [stored.index_select(0, indices.to(stored.device)) for stored in self._stored]
        self._view()

    def _view(self) -> None:
        self.keys, self.values = (stored[..., : self._length, :] for stored in self._stored)


def decodes(language_model: Any) -> bool:
    """Whether ``greedy`` gives the tokens of the language model's own ``generate``."""
    if not has_plain_cache(language_model):
        return False
    if any(getattr(type(language_model), name) is not getattr(GenerationMixin, name) for name in _OWN_WAYS):
        return False
    settings = language_model.generation_config.to_diff_dict()
    return not {name for name, value in settings.items() if value not in (None, False)} - _WITHOUT_EFFECT


def has_plain_cache(language_model: Any) -> bool:
    """Whether a language model goes on from the keys and values of all positions before."""
    kind = type(language_model)
    if not isinstance(language_model, GenerationMixin) or kind._is_stateful:
        return False
    if not set(inspect.signature(kind.forward).parameters) >= _NEEDED:
        return False
    layers = DynamicCache(config=language_model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def greedy(
    language_model: Any,
    router: Router,
    embeds_BTD: Tensor,
    mask_BT: Tensor,
    target_context: str,
    max_new_tokens: int,
    eos_id: int,
    positions_3BT: Tensor | None = None,
    past: Past | None = None,
) -> Tensor:
    """Generate the likeliest token, one after the other. Set the prompt's layout before.

    Args:
        language_model: one that ``decodes``.
        router: of its adapters.
        embeds_BTD: the prompts, padded on the left; of a past their last positions alone.
        mask_BT: bool: False for padding; of a past and these positions.
        target_context: context of the generated tokens.
        max_new_tokens: the most for a row.
        eos_id: token that ends a row.
        positions_3BT: of the prompts, where they tell a grid; None: in order.
        past: what the model has read of the prompts.

    Returns:
        Token ids (B, at most max_new_tokens), those of a row padded with ``eos_id``.
    """
    cache = DynamicCache(config=language_model.config)
    cache.layers = [_AllocatedLayer(max_new_tokens + (past is not None)) for _ in cache.layers]
    if past is not None:
        past.fill(cache)
    seen_XK, before = router.layout.context_ids_XK, router.layout.past
    new_11 = seen_XK.new_full((1, 1), router.contexts.index(target_context))
    host_11 = on_host(new_11)
    positions_BT = (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)[:, before:]
    mask_LK = None if mask_BT.all() else mask_BT.long()
    found_BN = torch.full((len(embeds_BTD), max_new_tokens), eos_id, device=embeds_BTD.device)
    rows_L = torch.arange(len(embeds_BTD), device=embeds_BTD.device)
    going_L = torch.ones_like(rows_L, dtype=torch.bool)

    def likeliest(position_ids: Tensor, **inputs: Tensor) -> Tensor:
        logits_L1V = language_model(
            **inputs,
            attention_mask=mask_LK,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        tokens_L: Tensor = logits_L1V[:, -1].float().argmax(dim=-1)
        return tokens_L

    with router.one_generation():
        router.set_context_ids(seen_XK[:, before:], seen_XK[:, :before] if before else None)
        next_L = likeliest(positions_BT if positions_3BT is None else positions_3BT, inputs_embeds=embeds_BTD)
        positions_L1 = positions_BT[:, -1:] if positions_3BT is None else positions_3BT.amax(0).amax(1, keepdim=True)
        for number in range(max_new_tokens):
            next_L = next_L.masked_fill(~going_L, eos_id)
            found_BN[rows_L, number] = next_L
            going_L = next_L != eos_id
            left = int(going_L.sum())
            if not left or number == max_new_tokens - 1:
                return found_BN[:, : number + 1]
            if left <= _DROPPED_AT * len(rows_L):
                kept_N = going_L.nonzero()[:, 0]
                rows_L, going_L, next_L, positions_L1 = (x[kept_N] for x in (rows_L, going_L, next_L, positions_L1))
                mask_LK = None if mask_LK is None else mask_LK[kept_N]
                seen_XK = seen_XK if len(seen_XK) == 1 else seen_XK[kept_N]
                cache.batch_select_indices(kept_N)
            mask_LK = None if mask_LK is None else torch.cat([mask_LK, mask_LK.new_ones(len(mask_LK), 1)], dim=1)
            positions_L1 = positions_L1 + 1
            router.set_context_ids(new_11, seen_XK, host_11)
            seen_XK = router.layout.context_ids_XK
            next_L = likeliest(positions_L1, input_ids=next_L[:, None])
    raise AssertionError("max_new_tokens is at least 1")
