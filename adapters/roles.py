"""Which linear layer plays which role in a language model: q, k, v, o (attention), gate, up, down (feed-forward).

Roles are read from a table by exact layer path, never by matching parts of names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.errors import UserError

ATTENTION = frozenset({"q", "k", "v", "o"})
FEED_FORWARD = frozenset({"gate", "up", "down"})

_LLAMA = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_OPT = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.out_proj": "o",
    "fc1": "up",
    "fc2": "down",
}
# transformers' model_type → (path of the list of layers, path inside a layer → role)
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("model.layers", _LLAMA),  # SmolLM and SmolLM2 too
    "mistral": ("model.layers", _LLAMA),
    "qwen2": ("model.layers", _LLAMA),
    "qwen3": ("model.layers", _LLAMA),
    "opt": ("model.decoder.layers", _OPT),
}


@dataclass(frozen=True)
class Target:
    """One linear layer an adapter may act on."""

    path: str  # in the language model: "model.layers.0.self_attn.q_proj"
    role: str
    in_features: int
    out_features: int


def find_targets(language_model: nn.Module, roles: frozenset[str]) -> list[Target]:
    """The linear layers that play one of ``roles``, in the model's order.

    Raises:
        UserError: the architecture is unknown (its linear layers are printed), or lacks all of the roles.
    """
    config = getattr(language_model, "config", None)
    model_type = getattr(config, "model_type", type(language_model).__name__)
    linears = {name: m for name, m in language_model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if model_type not in FAMILIES:
        shapes = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in linears)
        raise UserError(
            f"language model of type {model_type!r}: the roles of its layers are not known; "
            f"known types: {', '.join(sorted(FAMILIES))}; its linear layers: {', '.join(shapes)}"
        )
    layers, table = FAMILIES[model_type]
    pattern = re.compile(re.escape(layers) + r"\.\d+\.(.+)")
    targets = []
    for name, module in linears.items():
        match = pattern.fullmatch(name)
        role = table.get(match.group(1)) if match else None
        if role in roles and isinstance(module, nn.Linear):
            targets.append(Target(name, role, module.in_features, module.out_features))
    if not targets:
        raise UserError(
            f"a {model_type} model has no layer in any of the roles {sorted(roles)}; "
            f"it has {sorted(set(table.values()))}"
        )
    return targets
