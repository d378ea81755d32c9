"""Language model families with known layer roles: per ``model_type`` of transformers, a table of exact layer paths.

Roles: q, k, v, o (attention), gate, up, down (feed-forward), ``mlp`` (the whole feed-forward block), ``norm`` (the
norms of the blocks and the final norm; not the per-head query and key norms).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.core.errors import UserError

ATTENTION = frozenset({"q", "k", "v", "o"})
FEED_FORWARD = frozenset({"gate", "up", "down"})
ROLES = ATTENTION | FEED_FORWARD | {"mlp", "norm"}


@dataclass(frozen=True)
class Fused:
    """A layer that fuses several roles.

    Args:
        roles: in the order of the layer's outputs.
        per_head: the outputs are grouped by head, each with its own q, k and v; otherwise by role.
        sizes: outputs of each role in one period, which repeats; None: computed from the numbers of heads.
    """

    roles: tuple[str, ...]
    per_head: bool = False
    sizes: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Name of the whole layer's role: ``qkv``, ``gate_up``."""
        return "".join(self.roles) if max(map(len, self.roles)) == 1 else "_".join(self.roles)

    def rows(self, path: str, out_features: int, config: Any) -> dict[str, tuple[int, ...]]:
        """Role → indices of the layer's outputs that belong to it. Keys and values may have fewer heads than queries.

        Args:
            path: the layer's path, for error messages.
            out_features: outputs of the whole layer.
            config: the language model's config, for the numbers of heads.

        Raises:
            UserError: the number of outputs does not fit these roles and heads.
        """
        if self.sizes is not None:
            if out_features % sum(self.sizes):
                parts = ", ".join(f"{role} ({n})" for role, n in zip(self.roles, self.sizes, strict=True))
                raise UserError(f"layer {path} has {out_features} outputs, which are not a multiple of {parts}")
            return _periodic(self.roles, self.sizes, out_features)
        heads, key_heads, head_dim = _heads(config) if set(self.roles) <= ATTENTION else (1, 1, None)
        number = {role: key_heads if role in {"k", "v"} else heads for role in self.roles}
        # In units of one head: each role's share of one period, and the number of periods.
        sizes = [1 if self.per_head else number[role] for role in self.roles]
        repeats = heads if self.per_head else 1
        unit, rest = divmod(out_features, repeats * sum(sizes))
        unequal = self.per_head and (head_dim is None or key_heads != heads)
        if rest or unequal or unit != (head_dim or unit):
            parts = ", ".join(f"{role} ({n} × {head_dim})" if head_dim else role for role, n in number.items())
            order = "grouped by head" if self.per_head else "concatenated"
            raise UserError(f"layer {path} has {out_features} outputs, which does not fit {parts}, {order}")
        return _periodic(self.roles, [unit * size for size in sizes], out_features)


def _periodic(roles: Sequence[str], sizes: Sequence[int], out_features: int) -> dict[str, tuple[int, ...]]:
    rows: dict[str, tuple[int, ...]] = {}
    for index, role in enumerate(roles):
        start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
        periods = range(0, out_features, sum(sizes))
        rows[role] = tuple(row for at in periods for row in range(at + start, at + stop))
    return rows


def _heads(config: Any) -> tuple[int, int, int | None]:
    """Query heads, key and value heads, outputs per head; (1, 1, None) if the config does not say."""
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not heads or not width:
        return 1, 1, None
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(config, "head_dim", None) or width // heads


Table = Mapping[str, str | Fused]  # path pattern, where * matches a layer number → role


def _table(blocks: str, inside: Table, *norms: str, last: str) -> Table:
    within = {**inside, **dict.fromkeys(norms, "norm")}
    return {**{f"{blocks}.*.{path}": role for path, role in within.items()}, last: "norm"}


_QKVO: Table = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o"}
_FUSED_QKVO: Table = {"self_attn.qkv_proj": Fused(("q", "k", "v")), "self_attn.o_proj": "o"}
_GATED: Table = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down", "mlp": "mlp"}
_FUSED_GATED: Table = {"mlp.gate_up_proj": Fused(("gate", "up")), "mlp.down_proj": "down", "mlp": "mlp"}
_TWO = ("input_layernorm", "post_attention_layernorm")
_LLAMA = _table("model.layers", {**_QKVO, **_GATED}, *_TWO, last="model.norm")
_GEMMA_2 = _table(
    "model.layers",
    {**_QKVO, **_GATED},
    *(*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    last="model.norm",
)
# transformers' model_type → its table
FAMILIES: dict[str, Table] = {
    "llama": _LLAMA,  # SmolLM and SmolLM2 too
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA_2,
    "gemma3_text": _GEMMA_2,
    "phi3": _table("model.layers", {**_FUSED_QKVO, **_FUSED_GATED}, *_TWO, last="model.norm"),
    "glm": _table("model.layers", {**_QKVO, **_FUSED_GATED}, *_TWO, last="model.norm"),
    "glm4": _table(
        "model.layers",
        {**_QKVO, **_FUSED_GATED},
        *(*_TWO, "post_self_attn_layernorm", "post_mlp_layernorm"),
        last="model.norm",
    ),
    "opt": _table(
        "model.decoder.layers",
        {
            "self_attn.q_proj": "q",
            "self_attn.k_proj": "k",
            "self_attn.v_proj": "v",
            "self_attn.out_proj": "o",
            "fc1": "up",
            "fc2": "down",
        },
        *("self_attn_layer_norm", "final_layer_norm"),
        last="model.decoder.final_layer_norm",
    ),
    "gpt2": _table(
        "transformer.h",
        {
            "attn.c_attn": Fused(("q", "k", "v")),
            "attn.c_proj": "o",
            "mlp.c_fc": "up",
            "mlp.c_proj": "down",
            "mlp": "mlp",
        },
        *("ln_1", "ln_2"),
        last="transformer.ln_f",
    ),
    "gpt_neox": _table(
        "gpt_neox.layers",
        {
            "attention.query_key_value": Fused(("q", "k", "v"), per_head=True),
            "attention.dense": "o",
            "mlp.dense_h_to_4h": "up",
            "mlp.dense_4h_to_h": "down",
            "mlp": "mlp",
        },
        *_TWO,
        last="gpt_neox.final_layer_norm",
    ),
}
