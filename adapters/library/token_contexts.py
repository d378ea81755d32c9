"""Contexts of tokens from their ids, as ``contexts_from={image_token_id: "image"}``: all others are of the last one.

A vision-language model's processor writes one placeholder for each vector of a picture, so that the ids alone tell
which positions are the picture's. Shapes: B rows, T positions, X 1 or B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from adapters.library.context_ids import ContextIds
from adapters.placement.router import not_compiled, on_host, to_device
from harness.core.errors import UserError, did_you_mean

_MEDIA = ("image_token_id", "video_token_id", "audio_token_id")  # of a config; they may lie outside the embedding


def checked_contexts_from(given: Any, contexts: Sequence[str]) -> dict[int, str] | None:
    """Token id → context, as the caller gave it.

    Raises:
        UserError: it is no mapping of token ids, or names an unknown context.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"contexts_from: found {given!r}; allowed: token id → context, as {{32000: {contexts[0]!r}}}")
    for token, context in given.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise UserError(f"contexts_from: found the token id {token!r}; allowed: an integer of the vocabulary")
        if context not in contexts:
            raise UserError(
                f"contexts_from: {token}: unknown context {context!r}; {did_you_mean(str(context), contexts)}"
            )
    return dict(given)


def check_takes_tokens(model: Any, contexts_from: Mapping[int, str]) -> None:
    """Check that a model reads token ids as one sequence, and has these ids.

    Raises:
        UserError: it does not, or an id is outside its vocabulary.
    """
    config, embedding = getattr(model, "config", None), model.get_input_embeddings()
    vocabulary = getattr(embedding, "num_embeddings", None)
    if vocabulary is None or getattr(config, "is_encoder_decoder", False):
        why = "reads no token ids" if vocabulary is None else "has an encoder, whose tokens its decoder does not see"
        raise UserError(
            f"contexts_from: a {type(model).__name__} {why}; allowed: a causal language model, or a vision- or "
            "audio-language model that puts pictures and recordings in the places of tokens"
        )
    media = {name: getattr(config, name, None) for name in _MEDIA}
    for token in contexts_from:
        if token >= vocabulary and token not in media.values():
            own = ", ".join(f"{name} {value}" for name, value in media.items() if value is not None)
            raise UserError(
                f"contexts_from: found the token id {token}; allowed: 0 to {vocabulary - 1}"
                + (f" (of this model's config: {own})" if own else "")
            )


@not_compiled
def contexts_of_tokens(input_ids_BT: Tensor, contexts_from: Mapping[int, str], contexts: Sequence[str]) -> ContextIds:
    """The context of every token, from one read of the ids; one row where all rows are alike.

    Args:
        input_ids_BT: token ids; those of padding do not matter.
        contexts_from: token id → context.
        contexts: names of all contexts, of which the last has all other tokens.
    """
    host_BT = on_host(input_ids_BT)
    host_XT = np.full(host_BT.shape, len(contexts) - 1, dtype=np.int64)
    for token, context in contexts_from.items():
        host_XT[host_BT == token] = contexts.index(context)
    if len(host_XT) > 1 and (host_XT == host_XT[:1]).all():
        host_XT = host_XT[:1]
    return ContextIds(to_device(host_XT, input_ids_BT.device), host_XT)
