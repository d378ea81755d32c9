"""The logits of a language model where it predicts targets, and nowhere else.

Most positions of a batch predict nothing that counts: inputs and padding. Their hidden states are dropped before the
output layer, whose logits are the largest tensor of a small model. What a family does with its logits afterwards
(scaling, capping) is done by its own ``forward``.

Shapes: B rows, T positions, K positions of which a model keeps the logits, D width, N target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from harness.model.batch import Targets


def target_logits(language_model: Any, embeds_BTD: Tensor, targets: Targets, **options: Any) -> Tensor:
    """The logits (N, V) that predict each target token.

    Args:
        language_model: a Hugging Face causal LM.
        embeds_BTD: what it reads.
        targets: of the rows.
        options: of its ``forward``.
    """
    rows, length = embeds_BTD.shape[:2]
    kept = length - targets.first_source
    index_N = targets.row_N * kept + targets.source_N - targets.first_source
    with _only(_output_layer(language_model), index_N, (rows, kept)) as picked:
        logits: Tensor = language_model(
            inputs_embeds=embeds_BTD, use_cache=False, logits_to_keep=kept, **options
        ).logits
    if picked and logits.shape[:2] == (1, len(index_N)):
        return logits[0]
    if picked or logits.shape[:2] != (rows, kept):
        raise RuntimeError(f"the language model returned logits of the shape {tuple(logits.shape)}, which is unknown")
    return logits.flatten(0, 1).index_select(0, index_N)


def _output_layer(language_model: Any) -> nn.Module | None:
    try:
        layer: nn.Module | None = language_model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return layer


@contextmanager
def _only(layer: nn.Module | None, index_N: Tensor, shape: tuple[int, int]) -> Iterator[list[bool]]:
    """Let the output layer see the hidden states at some positions only, as one row (1, N, D).

    Args:
        layer: the output layer; None: the model does not say which one it is.
        index_N: into the concatenated rows.
        shape: of the rows, (B, K), in which the layer is expected to get them.

    Yields:
        A list that is empty until the layer has seen only these: another layout is left as it is.
    """
    picked: list[bool] = []

    def pick(_layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3 or args[0].shape[:2] != shape:
            return None
        picked.append(True)
        return (args[0].flatten(0, 1).index_select(0, index_N)[None], *args[1:])

    if layer is None:
        yield picked
        return
    handle = layer.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        handle.remove()
