"""Tiny language models with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tests.support.adapters import disturb


def tiny_llama(seed: int = 0, initializer_range: float = 0.2) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=initializer_range,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def tiny_opt(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, init_std=0.2,
    )  # fmt: skip
    return OPTForCausalLM(config).eval().requires_grad_(False)


MODELS = {"llama": tiny_llama, "opt": tiny_opt}
each_model = pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)


def with_biases(make_model: Any) -> Any:
    """Biases that are not zero, as they are in a model that was just made."""
    model = make_model()
    disturb(p for name, p in model.named_parameters() if name.endswith("bias"))
    return model


def tiny_gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def tiny_neox() -> Any:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval().requires_grad_(False)
