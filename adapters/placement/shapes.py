"""Sizes of a language model and its attention, and whether layers have the shapes that their roles need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


def number(thing: Any, *names: str) -> int | None:
    """The first of these attributes that is a positive integer."""
    for name in names:
        try:
            value = getattr(thing, name, None)
        except Exception:  # noqa: S112 - a config may have a value per layer, and refuses to name one for all
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def hidden_size(config: Any) -> int | None:
    """The width of the model, if the config says it."""
    return number(config, "hidden_size", "d_model", "n_embd")


@dataclass(frozen=True)
class Heads:
    """Numbers of heads of one attention module: its own where it keeps them, else the config's."""

    queries: int | None
    keys: int | None

    @classmethod
    def of(cls, module: nn.Module, config: Any) -> Heads:
        """The numbers of heads of ``module``."""
        own = number(module, "num_heads", "num_attention_heads", "n_heads", "n_head")
        queries = own or number(config, "num_attention_heads", "n_head", "n_heads")
        own_keys = number(module, "num_key_value_heads", "num_kv_heads")
        groups = number(module, "num_key_value_groups")
        if own_keys is None and groups is not None and queries is not None:
            own_keys = queries // groups
        keys = own_keys or number(config, "num_key_value_heads", "num_kv_heads") or queries
        return cls(queries, keys)


Shapes = Mapping[str, tuple[int, int]]


def wrong_attention(shapes: Shapes, heads: Heads, hidden: int | None) -> tuple[frozenset[str], str] | None:
    """The roles whose layers do not have the shapes of one attention, and what is wrong; None: they fit."""
    if hidden is not None and "o" in shapes and shapes["o"][1] != hidden:
        return frozenset(shapes), f"attention's output has {shapes['o'][1]} features, the model {hidden}"
    inputs = {role: shapes[role][0] for role in "kv" if role in shapes}
    # Queries alone may come from a compressed form.
    if "q" in shapes and inputs and set(inputs.values()) not in ({shapes["q"][0]}, {hidden}):
        return frozenset("qkv"), f"queries read {shapes['q'][0]} features, keys and values {sorted(inputs.values())}"
    if "k" not in shapes or "v" not in shapes or heads.queries is None or heads.keys is None:
        return None
    for role, number in (("q", heads.queries), ("k", heads.keys), ("v", heads.keys)):
        if role in shapes and shapes[role][1] % number:
            return frozenset(role), f"its {shapes[role][1]} outputs are not those of {number} heads"
    return None


def wrong_feed_forward(shapes: Shapes, hidden: int | None) -> str | None:
    """What is wrong with the shapes of one feed-forward block; None: they fit."""
    inner = shapes["down"][0]
    for role in ("gate", "up", "gate_up"):
        if role in shapes and shapes[role][1] != inner * (2 if role == "gate_up" else 1):
            return f"{role} has {shapes[role][1]} outputs, but down has {inner} inputs"
        if role in shapes and hidden is not None and shapes[role][0] != hidden:
            return f"{role} has {shapes[role][0]} inputs, but the model has {hidden} features"
    if hidden is not None and shapes["down"][1] != hidden:
        return f"down has {shapes['down'][1]} outputs, but the model has {hidden} features"
    return None
