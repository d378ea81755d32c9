"""Which layer plays which role in a language model.

Roles: q, k, v, o (attention), gate, up, down (feed-forward), ``mlp`` (the whole feed-forward block), ``norm``. They are
read from a table by exact layer path, never by matching parts of names. A fused layer plays several roles at once:
a method that wants all of them gets the layer as one (``qkv``, as the paper counts its fused gate and up), a method
that wants some of them gets each as a layer of its own that owns some of the fused layer's outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.errors import UserError, did_you_mean

ATTENTION = frozenset({"q", "k", "v", "o"})
FEED_FORWARD = frozenset({"gate", "up", "down"})
ROLES = ATTENTION | FEED_FORWARD | {"mlp", "norm"}


@dataclass(frozen=True)
class Fused:
    """Several roles in one layer, its outputs in their order: a block for each, or one block per head and role."""

    roles: tuple[str, ...]
    per_head: bool = False

    @property
    def name(self) -> str:
        """Of the layer as a whole: ``qkv``, ``gate_up``."""
        return "".join(self.roles) if max(map(len, self.roles)) == 1 else "_".join(self.roles)

    def rows(self, out_features: int, config: Any) -> dict[str, tuple[int, ...]]:
        """Role → which of the layer's outputs are its own. Keys and values may have fewer heads than queries."""
        if self.per_head:
            size = out_features // (config.num_attention_heads * len(self.roles))
            return {
                role: tuple(row for row in range(out_features) if row // size % len(self.roles) == index)
                for index, role in enumerate(self.roles)
            }
        sizes = [out_features // len(self.roles)] * len(self.roles)
        key_heads = getattr(config, "num_key_value_heads", None)
        if self.roles == ("q", "k", "v") and key_heads:
            size = out_features // (config.num_attention_heads + 2 * key_heads)
            sizes = [size * config.num_attention_heads, size * key_heads, size * key_heads]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return {r: tuple(range(a, a + n)) for r, a, n in zip(self.roles, starts, sizes, strict=True)}


def _gated(attention: Mapping[str, Any], feed_forward: Mapping[str, Any], *norms: str) -> dict[str, Any]:
    inside = {**attention, **feed_forward, "mlp": "mlp", **dict.fromkeys(norms, "norm")}
    return {**{f"model.layers.*.{path}": role for path, role in inside.items()}, "model.norm": "norm"}


_QKVO = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o"}
_GATE_UP_DOWN = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
_LLAMA = _gated(_QKVO, _GATE_UP_DOWN, "input_layernorm", "post_attention_layernorm")
_OPT = {
    "model.decoder.layers.*.self_attn.q_proj": "q",
    "model.decoder.layers.*.self_attn.k_proj": "k",
    "model.decoder.layers.*.self_attn.v_proj": "v",
    "model.decoder.layers.*.self_attn.out_proj": "o",
    "model.decoder.layers.*.fc1": "up",
    "model.decoder.layers.*.fc2": "down",
    "model.decoder.layers.*.self_attn_layer_norm": "norm",
    "model.decoder.layers.*.final_layer_norm": "norm",
    "model.decoder.final_layer_norm": "norm",
}
# transformers' model_type → path pattern (a * stands for a layer's number) → role, or several in a fused layer
FAMILIES: dict[str, Mapping[str, str | Fused]] = {
    "llama": _LLAMA,  # SmolLM and SmolLM2 too
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": _OPT,
}


@dataclass(frozen=True)
class Target:
    """One layer an adapter may act on, or one role's part of a fused layer."""

    path: str  # in the language model: "model.layers.0.self_attn.q_proj"
    role: str
    in_features: int
    out_features: int
    rows: tuple[int, ...] | None = None  # the fused layer's outputs that are this role's; None: all
    layer: nn.Module | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Unique name without a dot, which the name of a submodule may not have."""
        return self.path.replace(".", "/") + ("" if self.rows is None else f":{self.role}")

    def weight(self) -> Tensor:
        """The layer's weight (O, I), in that order also where the layer stores it the other way round.

        Raises:
            UserError: the layer has none that can be read as a matrix (a quantised one).
        """
        layer = self.layer
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.Linear | Conv1D) or weight is None or not weight.is_floating_point():
            raise UserError(f"layer {self.path} ({type(layer).__name__}) has no weight matrix that can be read")
        weight_OI: Tensor = weight.T if isinstance(layer, Conv1D) else weight
        return weight_OI if self.rows is None else weight_OI[torch.as_tensor(self.rows, device=weight.device)]


def find_targets(
    language_model: nn.Module, roles: frozenset[str], by_hand: Mapping[str, Any] | None = None
) -> list[Target]:
    """The layers that play one of ``roles``, in the model's order.

    Args:
        language_model: a Hugging Face causal LM.
        roles: wanted.
        by_hand: path pattern → role (or list of roles in a fused layer), before the table of known families.

    Raises:
        UserError: the architecture is unknown (its linear layers are printed), or lacks all of the roles.
    """
    table = _by_hand(by_hand) if by_hand else _family(language_model)
    patterns = [(re.compile(re.escape(path).replace(r"\*", r"\d+")), role) for path, role in table.items()]
    targets: list[Target] = []
    for name, module in language_model.named_modules():
        for pattern, role in patterns:
            if pattern.fullmatch(name):
                targets += _targets(name, module, role, roles, getattr(language_model, "config", None))
    if not targets:
        has = sorted({r for role in table.values() for r in (role.roles if isinstance(role, Fused) else (role,))})
        raise UserError(
            f"a {_model_type(language_model)} model has no layer in any of the roles {sorted(roles)}; it has {has}"
        )
    return targets


def _targets(name: str, layer: nn.Module, role: str | Fused, wanted: frozenset[str], config: Any) -> list[Target]:
    inside, outside = _features(layer)
    if isinstance(role, str):
        return [Target(name, role, inside, outside, layer=layer)] if role in wanted else []
    if set(role.roles) <= wanted:
        return [Target(name, role.name, inside, outside, layer=layer)]
    rows = role.rows(outside, config)
    return [Target(name, r, inside, len(rows[r]), rows[r], layer) for r in role.roles if r in wanted]


def _features(layer: nn.Module) -> tuple[int, int]:
    """Input and output features; of a norm its width, of a whole block zero (nobody asks)."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    if hasattr(layer, "in_features") and hasattr(layer, "out_features"):  # nn.Linear and the quantised ones
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    weight = getattr(layer, "weight", None)
    return (int(weight.shape[-1]), int(weight.shape[-1])) if isinstance(weight, Tensor) else (0, 0)


def _model_type(language_model: nn.Module) -> str:
    return str(getattr(getattr(language_model, "config", None), "model_type", type(language_model).__name__))


def _family(language_model: nn.Module) -> Mapping[str, str | Fused]:
    model_type = _model_type(language_model)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    linears = [name for name, m in language_model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    shapes = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in linears)
    raise UserError(
        f"language model of type {model_type!r}: the roles of its layers are not known; "
        f"known types: {', '.join(sorted(FAMILIES))}; its linear layers: {', '.join(shapes)}"
    )


def _by_hand(table: Mapping[str, Any]) -> dict[str, str | Fused]:
    for role in (r for value in table.values() for r in ([value] if isinstance(value, str) else value)):
        if role not in ROLES:
            raise UserError(f"unknown role {role!r}; {did_you_mean(str(role), ROLES)}")
    return {path: role if isinstance(role, str) else Fused(tuple(role)) for path, role in table.items()}
