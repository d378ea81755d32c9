"""Layer roles of a language model that is not in the table of known families, found by structure and exact names.

A model is searched for its stack of blocks; each block for attention and feed-forward modules with known names and
complete sets of known layers. What is found is verified by shape against the config and the other layers. A layer whose
name says what it is for, but which adapters cannot act on, is *refused*: recorded with the reason, never skipped
silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from adapters.placement.families import ATTENTION, FEED_FORWARD, Fused
from adapters.placement.fused import layout_of
from adapters.placement.layers import features_of, is_linear
from adapters.placement.shapes import Heads, hidden_size, wrong_attention, wrong_feed_forward

_FEED_FORWARD = FEED_FORWARD | {"mlp"}
_ALL = ATTENTION | _FEED_FORWARD | {"norm"}
# ── Names, exact and relative to a block; "" is the block itself, * a number
_ATTENTION_MODULES = (
    *("self_attn", "self_attn.*", "attn", "attn.attention", "attention", "attention.self", "self_attention"),
    *("multi_head_attention", "mixer", "temporal_block", "linear_attn", "norm_attn_norm.attn"),
    *("shared_transf.self_attn", "shared_transformer.self_attn", ""),
)
_CERTAINLY_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_ATTENTION_LAYERS = {
    **dict.fromkeys(("q_proj", "q_proj.linear", "q_b_proj", "query", "Wq", "q_lin"), "q"),
    **dict.fromkeys(("k_proj", "k_proj.linear", "key", "Wk", "k_lin"), "k"),
    **dict.fromkeys(("v_proj", "v_proj.linear", "value", "Wv", "v_lin"), "v"),
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "c_attn"), "qkv"),
    **dict.fromkeys(("o_proj", "o_proj.linear", "out_proj", "dense", "Wo", "c_proj", "out_lin"), "o"),
}
_OUTPUT_BESIDE = {"attention.self": "attention.output.dense"}  # an output layer that is not in the attention module
_FEED_FORWARD_MODULES = (
    *("mlp", "mlps.*", "feed_forward", "ffn", "mlp_block", "mixer", "shared_mlp", ""),
    *("shared_transf.feed_forward", "shared_transformer.feed_forward"),
    *("mlp.shared_experts", "mlp.shared_expert", "feed_forward.shared_expert", "mixer.shared_experts"),
    "mlp.shared_mlp",
)
_FEED_FORWARD_LAYERS: tuple[Mapping[str, str], ...] = (  # complete sets; the first that a module has applies
    {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    {"up_proj": "up", "down_proj": "down"},
    {"gate_up_proj": "gate_up", "down_proj": "down"},
    {"w1": "gate", "w3": "up", "w2": "down"},
    {"proj_up_gate": "gate", "proj_up": "up", "proj_down": "down"},
    {"fc1": "up", "fc2": "down"},
    {"c_fc": "up", "c_proj": "down"},
    {"fc_in": "up", "fc_out": "down"},
    {"dense_h_to_4h": "up", "dense_4h_to_h": "down"},
    {"Wi": "up", "Wo": "down"},
    {"input_linear": "up", "output_linear": "down"},
    {"intermediate.dense": "up", "output.dense": "down"},
    {"lin1": "up", "lin2": "down"},
    {"0": "up", "2": "down"},
)
_BLOCK_NORMS = frozenset({
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("post_self_attn_layernorm", "post_mlp_layernorm", "pre_mlp_layernorm", "feedforward_layernorm"),
    *("pre_ff_layernorm", "self_attn_layer_norm", "final_layer_norm", "layer_norm", "layer_norm1", "layer_norm2"),
    *("ln", "ln_1", "ln_2", "ln_attn", "ln_mlp", "layernorm1", "layernorm2", "norm", "norm1", "norm2", "norm_1"),
    *("norm_2", "input_norm", "post_attention_norm", "attention_norm", "ffn_norm", "operator_norm", "attn_norm"),
    *("mlp_norm", "temporal_pre_norm", "channel_pre_norm", "norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),
    *("attention.output.LayerNorm", "output.LayerNorm", "attention.LayerNorm", "LayerNorm", "norm_mlstm", "norm_ffn"),
    *("post_norm1", "post_norm2", "pre_layernorm", "post_layernorm", "attention.ln", "intermediate.LayerNorm"),
    *("input_layernorm.0", "input_layernorm.1", "post_attention_layernorm.0", "post_attention_layernorm.1"),
})  # fmt: skip
_LAST_NORMS = frozenset({
    *("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "layer_norm", "final_norm", "embedding_norm"),
    *("out_norm", "LayerNorm", "ln"),
})  # fmt: skip

# ── Layers that adapters cannot act on
_COMPRESSED = "it computes keys and values of all positions, cached ones included, from their compressed form"
_SHARED_KV = "its outputs are keys and values at once, in an order that is not known"
_EXPERTS = "its experts are fused in one parameter or see only the tokens routed to them"
_REFUSED = {
    "kv_b_proj": ("kv", _COMPRESSED),
    "kv_proj": ("kv", _SHARED_KV),
    "o_a_proj": ("o", "it projects the heads in groups, each as a row of its own"),
}
# (class that holds the layer, its name) → why
_NOT_CALLED = "its weight is used directly, the layer itself is never called"
NOT_CALLED = {(name, "dt_proj"): _NOT_CALLED for name in ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")} | {
    ("MultiheadAttention", "out_proj"): _NOT_CALLED
}

# Types whose layers have known names, but do not see one sequence of rows and positions.
_OTHER_AXES = {
    "blt": "its stacks act on bytes and on patches of them",
    "cpmant": "it adds positions of its own before the caller's",
    "prophetnet": "its decoder acts on several streams of positions",
    "reformer": "its attention hashes and sorts positions",
    "xlnet": "its layers see positions before rows",
}


@dataclass(frozen=True)
class Refusal:
    """A layer that has roles by its name, but that adapters cannot act on."""

    path: str  # with * for numbers
    roles: frozenset[str]
    reason: str


@dataclass
class Discovery:
    """What was found: path pattern, where * matches a number → role; and what was refused.

    ``paths``: the layers that were looked at one by one, of all that the patterns match; empty: all that match.
    """

    table: dict[str, str | Fused] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def refuse(self, path: str, roles: frozenset[str], reason: str) -> None:
        """Record a refusal, once for all blocks."""
        if Refusal(path, roles, reason) not in self.refusals:
            self.refusals.append(Refusal(path, roles, reason))


def with_stars(path: str) -> str:
    """The path with * for every number."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", path)


def discover(language_model: nn.Module) -> Discovery:
    """Roles of the layers in the blocks of a causal LM's text decoder; empty if no stack of blocks has known names."""
    found, config = Discovery(), _text_config(language_model)
    model_type = str(getattr(getattr(language_model, "config", None), "model_type", None))
    reason = _OTHER_AXES.get(model_type)
    if reason is not None:
        found.refuse(type(language_model).__name__, _ALL, reason)
        return found
    stacks = _stacks(language_model)
    widths = {path: _width(stack) for path, stack in stacks.items()}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{path} ({width} wide)" for path, width in widths.items())
        found.refuse(listed, _ALL, "several stacks of blocks of different widths")
        return found
    for path, stack in stacks.items():
        for index, block in enumerate(stack):
            _Block(path, index, block, config, found).search()
        above = path.rpartition(".")[0]
        for place in (above, *([above.rpartition(".")[0]] if above.endswith(".encoder") else [])):
            for name, module in language_model.get_submodule(place).named_children():
                if name in _LAST_NORMS and _is_norm(module, config):
                    found.table[_join(place, name)] = "norm"
                    found.paths.add(_join(place, name))
    return found


def why_not(language_model: nn.Module, path: str) -> str | None:
    """Why no adapter can act on a layer that was named explicitly; None: it can, as far as its place says."""
    above, _, name = path.rpartition(".")
    holder = language_model.get_submodule(above)
    if (reason := NOT_CALLED.get((type(holder).__name__, name))) is not None:
        return reason
    if name == "kv_b_proj" and hasattr(holder, "kv_lora_rank"):
        return _COMPRESSED
    inside = re.match(r"(.*\.experts)\.[0-9]+\.", path)
    return None if inside is None else "an expert sees only the tokens routed to it"


# ── The stack of blocks


def _text_config(language_model: Any) -> Any:
    config = getattr(language_model, "config", None)
    get = getattr(config, "get_text_config", None)
    return config if get is None else get(decoder=True)


def _stacks(language_model: Any) -> dict[str, nn.ModuleList]:
    """The text decoder's outermost lists of blocks with attention or feed-forward layers, by path."""
    get = getattr(language_model, "get_decoder", None)
    decoder = get() if callable(get) else None
    root = next((path for path, module in language_model.named_modules() if module is decoder), "")
    lists: dict[str, nn.ModuleList] = {}
    for place in dict.fromkeys((root, "")):  # ModernBERT's decoder is its output layer
        lists = lists or {
            path: module
            for path, module in language_model.get_submodule(place).named_modules(prefix=place)
            if isinstance(module, nn.ModuleList) and any(_modules(block) for block in module)
        }
    depth = min((path.count(".") for path in lists), default=0)
    return {path: module for path, module in lists.items() if path.count(".") == depth}


def _modules(block: nn.Module) -> list[str]:
    attention = [prefix for prefix, layers in _attentions(block) if _is_attention(layers)]
    return attention + [prefix for prefix, _ in _feed_forwards(block)]


def _is_attention(layers: Mapping[str, str]) -> bool:
    """An attention has queries: other modules share names such as ``out_proj`` with it."""
    return bool({"q", "qkv"} & set(layers.values()))


def _width(stack: nn.ModuleList) -> int:
    for block in stack:
        for prefix, layers in [*_attentions(block), *_feed_forwards(block)]:
            for name, role in layers.items():
                if role in {"o", "down"}:
                    return features_of(block.get_submodule(_join(prefix, name)))[1]
    return 0


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _get(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else ():
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module


def _expand(block: nn.Module, patterns: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    for pattern in patterns:
        name, star, _ = pattern.partition(".*")
        module = _get(block, name)
        if star and isinstance(module, nn.ModuleList):
            yield from ((f"{name}.{index}", item) for index, item in enumerate(module))
        elif module is not None and not star:
            yield name, module


def _attentions(block: nn.Module) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Path in the block, and layer → role, of every module that has layers with known names."""
    for prefix, module in _expand(block, _ATTENTION_MODULES):
        layers = {name: role for name, role in _ATTENTION_LAYERS.items() if _is_layer(_get(module, name))}
        if _is_attention(layers):
            yield prefix, layers


def _feed_forwards(block: nn.Module) -> Iterator[tuple[str, Mapping[str, str]]]:
    for prefix, module in _expand(block, _FEED_FORWARD_MODULES):
        for layers in _FEED_FORWARD_LAYERS:
            if all(_is_layer(_get(module, name)) for name in layers):
                yield prefix, layers
                break


def _is_layer(module: nn.Module | None) -> bool:
    return module is not None and is_linear(module)


# ── One block


@dataclass
class _Block:
    stack: str
    index: int
    block: nn.Module
    config: Any
    found: Discovery

    def search(self) -> None:
        """Record the roles and refusals of this block."""
        attentions = list(_attentions(self.block))
        if not attentions and _get(self.block, "cross_attn") is not None:
            return  # runs only when there is something to attend to (Mllama)
        for prefix, layers in attentions:
            self._attention(prefix, layers)
        self._refuse_unknown({prefix for prefix, _ in attentions})
        for prefix, layers in _feed_forwards(self.block):
            self._feed_forward(prefix, layers)
        self._refuse_experts()
        for name in _BLOCK_NORMS:
            module = _get(self.block, name)
            if module is not None and _is_norm(module, self.config):
                self._add(name, "norm")

    def _add(self, path: str, role: str | Fused) -> None:
        self.found.table[self._full(path)] = role
        self.found.paths.add(f"{self.stack}.{self.index}.{path}")

    def _full(self, *names: str) -> str:
        return _join(self.stack, "*", *names)

    def _attention(self, prefix: str, layers: Mapping[str, str]) -> None:
        module = self.block.get_submodule(prefix)
        paths = {role: _join(prefix, name) for name, role in layers.items()}
        beside = _OUTPUT_BESIDE.get(prefix)
        if beside is not None and _is_layer(_get(self.block, beside)):
            paths["o"] = beside
        for name, (refused, reason) in _REFUSED.items():
            if _is_layer(_get(module, name)):
                self.found.refuse(self._full(prefix, name), frozenset(refused), reason)
        shapes = {role: features_of(self.block.get_submodule(path)) for role, path in paths.items()}
        wrong = wrong_attention(shapes, Heads.of(module, self.config), hidden_size(self.config))
        for role, path in paths.items():
            if wrong is not None and role in wrong[0]:
                self.found.refuse(self._full(path), ATTENTION & set(role), wrong[1])
            elif role == "qkv":
                self._fused(path, module, ATTENTION - {"o"})
            else:
                self._add(path, role)

    def _feed_forward(self, prefix: str, layers: Mapping[str, str]) -> None:
        module = self.block.get_submodule(prefix)
        shapes = {role: features_of(module.get_submodule(name)) for name, role in layers.items()}
        paths = {role: _join(prefix, name) for name, role in layers.items()}
        fused = "gate_up" in shapes or (layout_of(module) is not None and "gate" not in shapes)
        if fused and "up" in shapes:
            shapes["gate_up"], paths["gate_up"] = shapes.pop("up"), paths.pop("up")
        reason = wrong_feed_forward(shapes, hidden_size(self.config))
        if reason is not None:
            for role, path in paths.items():
                self.found.refuse(self._full(path), FEED_FORWARD & set(role.split("_")), reason)
            return
        for role, path in paths.items():
            if role == "gate_up":
                self._fused(path, module, frozenset({"gate", "up"}))
            else:
                self._add(path, role)
        # The whole block: the module whose output is added to the residual stream.
        if prefix and "shared_expert" not in prefix and "shared_mlp" not in prefix and prefix != "mixer":
            self._add(prefix, "mlp")

    def _fused(self, path: str, module: nn.Module, roles: frozenset[str]) -> None:
        layout = layout_of(module)
        outputs = features_of(self.block.get_submodule(path))[1]
        if layout is None:
            reason = f"it is fused, and in which order {type(module).__name__} splits its outputs is not known"
            self.found.refuse(self._full(path), roles, reason)
            return
        fused, periods = layout(module, self.config, outputs)
        if periods * sum(fused.sizes or (0,)) != outputs:
            reason = f"its {outputs} outputs are not {periods} times {' + '.join(map(str, fused.sizes or ()))}"
            self.found.refuse(self._full(path), roles, reason)
        else:
            self._add(path, fused)

    def _refuse_unknown(self, known: set[str]) -> None:
        """Refuse an attention module whose layers have other names."""
        for prefix, module in _expand(self.block, _CERTAINLY_ATTENTION):
            linear = [name for name, layer in module.named_modules() if name and is_linear(layer)]
            if prefix not in known and not any(path.startswith(f"{prefix}.") for path in known) and linear:
                self.found.refuse(
                    self._full(prefix),
                    ATTENTION,
                    f"{type(module).__name__} has no queries of a known name: {', '.join(linear)}",
                )

    def _refuse_experts(self) -> None:
        for path, module in self.block.named_modules():
            if path.rpartition(".")[2] != "experts" and not type(module).__name__.endswith("Experts"):
                continue
            in_attention = path.partition(".")[0] in {"self_attention", "self_attn", "attn", "attention"}
            roles = frozenset("qo") if in_attention else _FEED_FORWARD
            self.found.refuse(self._full(path), roles, f"{type(module).__name__}: {_EXPERTS}")


def _is_norm(module: nn.Module, config: Any) -> bool:
    """A module without submodules that scales a vector as wide as the model, or normalises without a weight."""
    if any(True for _ in module.children()):
        return False
    sizes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if not sizes:
        return hasattr(module, "normalized_shape")
    hidden = hidden_size(config)
    return set(sizes) <= {"weight", "bias"} and all(
        len(size) == 1 and (hidden is None or size[0] == hidden) for size in sizes.values()
    )
