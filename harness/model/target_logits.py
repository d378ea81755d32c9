"""The logits of a language model where it predicts targets, and nowhere else.

Most positions of a batch predict nothing that counts: inputs and padding. Their hidden states are dropped before the
output layer, whose logits are the largest tensor of a small model. What a family does with its logits afterwards
(scaling, capping) is done by its own ``forward``. Where it does nothing and the logits are many, they are computed in
chunks, and again in backward, so that they are never there as a whole.

Shapes: B rows, T positions, K positions of which a model keeps the logits, D width, N target tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.model.batch import IGNORED, Targets

CHUNK_BYTES = 1 << 26  # of the logits of a chunk, in fp32


def target_logits(language_model: Any, embeds_BTD: Tensor, targets: Targets, **options: Any) -> Tensor:
    """The logits (N, V) that predict each target token.

    Args:
        language_model: a Hugging Face causal LM.
        embeds_BTD: what it reads.
        targets: of the rows.
        options: of its ``forward``.
    """
    shape, index_N, asked = _kept(language_model, embeds_BTD, targets)
    with _rows_not_packed(), _only(_output_layer(language_model), index_N, shape) as picked:
        logits: Tensor = language_model(inputs_embeds=embeds_BTD, use_cache=False, **asked, **options).logits
    if picked and logits.shape[:2] == (1, len(index_N)):
        return logits[0]
    if picked or logits.shape[:2] != shape:
        raise RuntimeError(f"the language model returned logits of the shape {tuple(logits.shape)}, which is unknown")
    return logits.flatten(0, 1).index_select(0, index_N)


def nll_of(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """The negative log likelihood (N,) of each label in nats, in fp32 or better; 0 where it is IGNORED."""
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, label_N, ignore_index=IGNORED, reduction="none")


def wants_chunks(language_model: Any, targets: Targets) -> bool:
    """Whether the logits of all targets are more than a chunk, and chunks can be computed of them.

    They cannot where the output layer is no plain one, has adapters, or its weights are spread over processes (ZeRO-3).
    """
    layer = _output_layer(language_model)
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    whole = hasattr(layer.weight, "ds_id") is False
    return whole and _tokens_of_chunk(layer) < len(targets.label_N)


def nll_in_chunks(language_model: Any, embeds_BTD: Tensor, targets: Targets, **options: Any) -> Tensor | None:
    """The negative log likelihood (N,) of each target token, its logits computed in chunks.

    Args:
        language_model: that ``wants_chunks``.
        embeds_BTD: what it reads.
        targets: of the rows.
        options: of its ``forward``.

    Returns:
        None if the model does something with what its output layer computes.
    """
    shape, index_N, asked = _kept(language_model, embeds_BTD, targets)
    layer = _output_layer(language_model)
    assert isinstance(layer, nn.Linear)  # noqa: S101 - as `wants_chunks` has found
    made: list[tuple[Tensor, Tensor]] = []

    def keep(_layer: nn.Module, _args: tuple[Any, ...], y: Tensor) -> None:
        made.append((y, y.detach().clone()))

    # The layer sees the first of them alone, which tells whether its output is that of the model.
    handle = layer.register_forward_hook(keep)
    try:
        with _rows_not_packed(), _only(layer, index_N, shape, first=True) as picked:
            logits: Tensor = language_model(inputs_embeds=embeds_BTD, use_cache=False, **asked, **options).logits
    finally:
        handle.remove()
    if len(picked) != 1 or len(made) != 1 or not _unchanged(logits, *made[0]):
        return None
    size = _tokens_of_chunk(layer)
    parts = zip(torch.split(picked[0], size), torch.split(targets.label_N, size), strict=True)
    return torch.cat([_nll_of_chunk(layer, hidden_CD, label_C) for hidden_CD, label_C in parts])


def _kept(language_model: Any, embeds_BTD: Tensor, targets: Targets) -> tuple[tuple[int, int], Tensor, dict[str, int]]:
    """The shape (B, K) in which logits are kept, indices of the targets in it (N,), and the option that asks for it.

    Some families (xLSTM) have no such option, and keep all positions.
    """
    rows, length = embeds_BTD.shape[:2]
    if not _keeps_some(language_model.__class__):
        return (rows, length), targets.row_N * length + targets.source_N, {}
    kept = length - targets.first_source
    index_N = targets.row_N * kept + targets.source_N - targets.first_source
    return (rows, kept), index_N, {"logits_to_keep": kept}


@cache
def _keeps_some(family: type) -> bool:
    return "logits_to_keep" in inspect.signature(family.forward).parameters  # type: ignore[attr-defined]


def _nll_of_chunk(layer: nn.Linear, hidden_CD: Tensor, label_C: Tensor) -> Tensor:
    def nll(hidden_CD: Tensor) -> Tensor:
        return nll_of(F.linear(hidden_CD, layer.weight, layer.bias), label_C)

    if not torch.is_grad_enabled():
        return nll(hidden_CD)
    found: Tensor = checkpoint(nll, hidden_CD, use_reentrant=False, preserve_rng_state=False)
    return found


def _unchanged(logits: Tensor, made: Tensor, copy: Tensor) -> bool:
    """Whether the logits are what the output layer has made, and nothing was done to them in place."""
    if logits is not made:
        return False
    return torch.equal(made, copy) if made.is_inference() else made._version == 0


def _tokens_of_chunk(layer: nn.Linear) -> int:
    return max(1, CHUNK_BYTES // (4 * layer.out_features))


def _output_layer(language_model: Any) -> nn.Module | None:
    try:
        layer: nn.Module | None = language_model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return layer


@contextmanager
def _rows_not_packed() -> Iterator[None]:
    """Say that no row has several sequences one after the other, which transformers would read from the positions.

    There the host would wait for its device, which still has the last step to end. Rows of several targets say what
    they see by a mask of their own.
    """
    from transformers import masking_utils

    asked = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


@contextmanager
def _only(
    layer: nn.Module | None, index_N: Tensor, shape: tuple[int, int], first: bool = False
) -> Iterator[list[Tensor]]:
    """Let the output layer see the hidden states at some positions only, as one row (1, N, D).

    Args:
        layer: the output layer; None: the model does not say which one it is.
        index_N: into the concatenated rows.
        shape: of the rows, (B, K), in which the layer is expected to get them.
        first: the layer sees the first of these alone.

    Yields:
        A list that is empty until the layer has seen only these, and then has them (N, D): another layout is left as
        it is.
    """
    picked: list[Tensor] = []

    def pick(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3 or args[0].shape[:2] != shape:
            return None
        picked.append(args[0].flatten(0, 1).index_select(0, index_N))
        return (picked[-1][:1][None] if first else picked[-1][None], *args[1:])

    if layer is None:
        yield picked
        return
    handle = layer.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        handle.remove()
