"""A tiny random model of every known family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.placement.roles import FAMILIES
from tests.support.adapters import disturb, embeds

# Heads are 12 wide where a family lets them be, so that no size is right by accident.
_COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    **{family: {**_GROUPED, "head_dim": 12} for family in FAMILIES},
    "qwen2": _GROUPED,
    "smollm3": _GROUPED,
    "phi3": _GROUPED,
    "gpt_neox": {**_COMMON, "hidden_dropout": 0.0},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2},
    "opt": {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2},
}  # fmt: skip


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model; its biases and norms are random too, or a bias in the wrong place would not show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **OPTIONS[family]))
    disturb([p for p in model.parameters() if p.dim() == 1], scale=0.1)
    return model.eval().requires_grad_(False).to(dtype)


def logits(model: Any) -> Tensor:
    found_BTV: Tensor = model(inputs_embeds=embeds().to(next(model.parameters()).dtype), use_cache=False).logits
    return found_BTV
