"""Validates the inputs of an adapted model: input, context ids, and the contexts of the tokens in a KV cache.

Shapes: B rows, T positions of this pass, K positions in the cache, D the model's width, X 1 or B rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, int64

from adapters.base import AdapterMethod
from adapters.placement.router import Ids, not_compiled, on_host
from harness.core.errors import UserError

_STATES = ("cache_params", "state", "mems")  # what transformers calls the states of recurrences


def only_input(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one of the two that is given: (B, T) or (B, T, D).

    Raises:
        UserError: neither or both are given, or the number of dimensions is wrong.
    """
    given = [tensor for tensor in (input_ids, inputs_embeds) if tensor is not None]
    if len(given) != 1:
        raise UserError(f"pass either input_ids (B, T) or inputs_embeds (B, T, D); found {len(given)} of the two")
    dims = 2 if inputs_embeds is None else 3
    if given[0].dim() != dims:
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        raise UserError(f"{name}: found shape {tuple(given[0].shape)}; allowed: {dims} dimensions")
    return given[0]


class ContextIds(NamedTuple):
    """Context ids with a row dimension, where X is 1 or B."""

    ids_XT: Tensor
    host_XT: Ids  # the same on the host, read once


@not_compiled
def checked_context_ids(context_ids: Any, given: Tensor, contexts: Sequence[str]) -> ContextIds:
    """The caller's context ids, here and on the host: the one time that a pass reads a tensor back.

    Args:
        context_ids: the caller's, (T,) or (B, T).
        given: the input that they belong to.
        contexts: names of the contexts that they index.

    Raises:
        UserError: they are missing, or their dtype, shape, device or values are wrong.
    """
    rows, length = given.shape[:2]
    if not isinstance(context_ids, Tensor):
        found = "none" if context_ids is None else type(context_ids).__name__
    elif context_ids.dtype != int64:
        found = f"dtype {context_ids.dtype}"
    elif tuple(context_ids.shape) not in ((length,), (rows, length)):
        found = f"shape {tuple(context_ids.shape)}"
    elif context_ids.device != given.device:
        found = f"device {context_ids.device}"
    else:
        host_XT = on_host(context_ids).reshape(-1, length)
        if not host_XT.size or (host_XT.min() >= 0 and host_XT.max() < len(contexts)):
            return ContextIds(context_ids if context_ids.dim() == 2 else context_ids[None], host_XT)
        found = f"values from {host_XT.min()} to {host_XT.max()}"
    names = ", ".join(f"{index} ({name})" for index, name in enumerate(contexts))
    raise UserError(
        f"context_ids: found {found}; allowed: int64 of shape ({length},) or ({rows}, {length}) on {given.device}, "
        f"values {names}"
    )


def cached_positions(cache: Any) -> int:
    """Number of positions in a KV cache; 0 for None.

    Raises:
        UserError: it does not tell.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        raise UserError(
            f"past_key_values: found {type(cache).__name__}, which does not tell its number of positions; allowed: a "
            "cache of transformers, such as DynamicCache"
        )
    return int(cache.get_seq_length())


def check_no_state(given: Mapping[str, Any], methods: Iterable[AdapterMethod]) -> None:
    """Check that no state of a recurrence is given to a method that needs the contexts of the tokens before.

    Raises:
        UserError: it is: a state, unlike a KV cache, does not keep them.
    """
    for name in _STATES:
        joining = [part.name for method in methods for part in method.parts if part.joins_groups]
        if joining and given.get(name) is not None:
            raise UserError(
                f"{name}: a state of earlier tokens does not keep their contexts, which {joining[0]} needs; pass the "
                "whole sequence"
            )


class _Seen(NamedTuple):
    """The contexts (X, K) of a cache, and its first keys, which tell whether its rows were exchanged since."""

    ids_XK: Tensor
    keys: Tensor | None


class CacheContexts:
    """The contexts of the tokens in each KV cache, kept with the cache itself: a copy of it has them too.

    Args:
        rows_matter: whether a method reads them, so that the rows of a cache must still be those of the contexts.
    """

    def __init__(self, rows_matter: bool = False) -> None:
        self._rows_matter = rows_matter
        self._name = f"_context_peft_{uuid.uuid4().hex}"  # of this model

    def __reduce__(self) -> tuple[type[CacheContexts], tuple[bool]]:
        return CacheContexts, (self._rows_matter,)  # a copy does not know the caches that the original filled

    def remember(self, cache: Any, context_ids_XK: Tensor) -> None:
        """Store the context ids (X, K) of a cache after a pass; does nothing if the pass used no KV cache."""
        if hasattr(cache, "get_seq_length"):  # not RWKV's state, which is a list
            keys = _first_keys(cache) if self._rows_matter and context_ids_XK.shape[0] > 1 else None
            setattr(cache, self._name, _Seen(context_ids_XK, keys))

    def of(self, cache: Any, rows: int) -> Tensor | None:
        """Context ids (X, K) of the positions in a cache; None if it is empty.

        Raises:
            UserError: another model filled it, its number of rows has changed, or their order where that matters.
        """
        cached = cached_positions(cache)
        if not cached:
            return None
        seen: _Seen | None = getattr(cache, self._name, None)
        known = 0 if seen is None else seen.ids_XK.shape[1]
        if seen is None or known < cached or seen.ids_XK.shape[0] not in (1, rows):
            raise UserError(
                f"past_key_values: found {cached} positions for {rows} rows, {known} of them from this adapted model; "
                "allowed: the cache of an earlier pass of this model over the same rows"
            )
        if seen.keys is not None and not _same_storage(seen.keys, _first_keys(cache)):
            raise UserError(
                "past_key_values: its rows were exchanged (reorder_cache, batch_select_indices) after the pass that "
                "filled it, and the contexts of the cached tokens did not follow; allowed: the same order, rows "
                "that all have the same contexts, or adapted.generate"
            )
        return seen.ids_XK[:, :cached]  # the cache may have been cropped


def _first_keys(cache: Any) -> Tensor | None:
    found = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()))
    return next((keys for keys in found if isinstance(keys, Tensor)), None)


def _same_storage(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are the same numbers or a part of them, as those of a cropped cache are."""
    return other is not None and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
