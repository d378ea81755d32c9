"""The features of a layer of a pretrained encoder, and its dtype, as an experiment names them.

Shapes: B items, N tokens, D features, H × W cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.core.errors import UserError
from tasks.modalities.encoders.options import EncoderOptions

DTYPES: Mapping[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": "auto"}


def dtype_without_weights(options: EncoderOptions, config: Any) -> torch.dtype:
    """The dtype of an encoder whose weights are not read; ``auto`` is what its configuration says."""
    wanted = DTYPES[options.dtype]
    found: torch.dtype = (config.dtype or torch.float32) if wanted == "auto" else wanted
    return found


def hidden_states_of(layer: int | None) -> dict[str, bool]:
    """The arguments of a model that returns what ``features_of`` reads."""
    return {} if layer is None else {"output_hidden_states": True}


def features_of(made: Any, layer: int | None) -> Tensor:
    """The features of a layer in what a model of ``transformers`` returned: a sequence (B, N, D) or a map (B, D, H, W).

    Hiera keeps the tokens of inner layers in an order of its own, and returns maps beside them, as Swin does, which are
    read here.

    Raises:
        UserError: there is no such layer.
    """
    if layer is None:
        last: Tensor = made.last_hidden_state
        return last
    states = made.hidden_states or ()
    if not -len(states) <= layer < len(states):
        known = (
            f"{-len(states)} to {len(states) - 1}, one of its hidden states" if states else "none, its class tells none"
        )
        raise UserError(f"layer: found {layer}; allowed: {known}")
    own: Tensor = states[layer]
    if maps := getattr(made, "reshaped_hidden_states", None):
        of_layer: Tensor = maps[layer]
        return of_layer if of_layer.shape[1] == own.shape[-1] else of_layer.movedim(-1, 1)
    return own
