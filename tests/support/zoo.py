"""A small random model of every causal LM class of the installed transformers, and what the adapters make of it."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adapters.placement.discovery import Discovery, discover
from adapters.placement.families import FAMILIES
from tests.support import vlm_zoo

FAMILIES_PAGE = Path(__file__).parent.parent.parent / "docs" / "families.md"
# Set in any config that has them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "emb_dim", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_head_dim": 8, "index_n_heads": 2},
    **{"index_topk": 4, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "rotary_dim": 4},
    **{"max_position_embeddings": 64, "n_positions": 64, "initializer_range": 0.2, "init_std": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"state_size": 8, "ssm_state_size": 8, "n_mamba_heads": 2, "mamba_num_heads": 8, "mamba_head_dim": 8},
    **{"mamba_d_ssm": 64, "n_groups": 1, "chunk_size": 4, "mamba_dt_rank": 4, "time_step_rank": 4},
    **{"first_k_dense_replace": 1},
}
# What some need besides, or instead.
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"moe_layer_freq": 1, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "intermediate_size": 48,
                     "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "kimi_linear": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"], "num_hidden_layers": 6},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def causal_lms() -> list[str]:
    """One model type for every class, in alphabetical order of the types; that of the text model if there are more."""
    types: dict[str, str] = {}
    for model_type, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if name not in types or model_type == f"{types[name]}_text":
            types[name] = model_type
    return sorted(types.values())


def small(model_type: str, device: str = "cpu", **more: Any) -> Any:
    """A small random model, in eval mode."""
    torch.manual_seed(0)
    options = {**_options(type(AutoConfig.for_model(model_type))), **MORE.get(model_type, {}), **more}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    return model.eval().requires_grad_(False)


def _options(kind: Any) -> dict[str, Any]:
    default = kind()
    known = {name for name in SMALL if name in default.to_dict() or hasattr(kind, name) or name in kind.attribute_map}
    known -= {name for name in known if isinstance(getattr(kind, name, None), property)}
    options = {name: SMALL[name] for name in sorted(known)}
    if "qk_rope_head_dim" in options and "head_dim" in options:
        options["head_dim"] = options["qk_rope_head_dim"]  # of the rotary embedding
    if "kv_lora_rank" in options and "num_key_value_heads" in options:
        options["num_key_value_heads"] = options["num_attention_heads"]
    parts = {name: getattr(default, name, None) for name in kind.sub_configs}
    return options | {name: _options(type(part)) for name, part in parts.items() if part is not None}


def axes_of_calls(model: Any, paths: Collection[str], ids_BT: Tensor) -> dict[str, list[tuple[int, ...]]]:
    """Per layer that ran: of every call, all axes of its input but the last; those of its output are the same."""
    calls: dict[str, list[tuple[int, ...]]] = {}

    def hook(path: str) -> Any:
        def after(_module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], y: Tensor) -> None:
            assert not kwargs
            assert y.shape[:-1] == args[0].shape[:-1], path
            calls.setdefault(path, []).append(tuple(args[0].shape[:-1]))

        return after

    for path in paths:
        model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids_BT, use_cache=False)
    return calls


# ── The page in the docs

_HEAD = """# Language model families

Which layers of each causal LM class of transformers {version} have roles without `roles`. Written by
`python -m tests.support.zoo` and compared by a slow test, from a model of every class. Roles are found by exact
names and verified by shape ([Which layers](adapters.md#which-layers)); a type in bold has a table of its own. `qkv` and
`gate_up` are fused layers. An empty cell: the model has no such layer, or it cannot be adapted for the reason given. If
other layers of the same role can be, `where: AF` adapts these with a warning, and naming the role is an error.

Of {classes} classes, {attention} have roles in attention, where most methods act by default, {elsewhere} only elsewhere
({names}), {none} none at all; and of {unknown} transformers builds no model from a small config or its default one.

| model type | attention | feed-forward | norms | not adapted |
|---|---|---|---|---|
"""


def page() -> str:
    """``docs/families.md``."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = {model_type: _cells(model_type) for model_type in causal_lms()}
    known = {model_type: cells for model_type, cells in rows.items() if cells is not None}
    elsewhere = [model_type for model_type, cells in known.items() if not cells[0] and any(cells[1:3])]
    head = _HEAD.format(
        version=transformers.__version__,
        classes=len(rows),
        attention=sum(bool(cells[0]) for cells in known.values()),
        elsewhere=len(elsewhere),
        names=", ".join(elsewhere),
        none=sum(not any(cells[:3]) for cells in known.values()),
        unknown=len(rows) - len(known),
    )
    lines = (f"| {_name(model_type)} | {' | '.join(cells or _UNKNOWN)} |\n" for model_type, cells in rows.items())
    return head + "".join(lines) + vlm_zoo.section()


def _name(model_type: str) -> str:
    return f"**{model_type}**" if model_type in FAMILIES else model_type


_UNKNOWN = ["", "", "", "not known: transformers builds no model from its default config"]


def _cells(model_type: str) -> list[str] | None:
    """Roles in attention, in feed-forward layers, whether norms have one, what is refused; None: no model is built."""
    model = _on_meta(model_type)
    if model is None:
        return None
    found = Discovery(dict(FAMILIES[model_type])) if model_type in FAMILIES else discover(model)
    has = {role if isinstance(role, str) else role.name: None for role in found.table.values()}
    cells = [
        " ".join(role for role in order if role in has)
        for order in (("q", "k", "v", "qkv", "qvk", "o"), ("gate", "up", "gate_up", "down"))
    ]
    refused = {f"`{r.path.partition('*.')[2] or r.path}`: {r.reason}": None for r in found.refusals}
    if not found.table and not refused:
        refused = {"no layers of known names: `roles` are needed": None}
    return [*cells, "yes" if "norm" in has else "", "; ".join(refused)]


def _on_meta(model_type: str) -> Any:
    for options in (None, {}):
        try:
            if options is None:
                return small(model_type, "meta")
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type))
        except Exception:
            continue
    return None


if __name__ == "__main__":
    FAMILIES_PAGE.write_text(page(), encoding="utf-8")
