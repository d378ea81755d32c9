"""Writes a Llama of transformers as a GGUF file, with the ``gguf`` library: for tests alone, which read it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def names_of(layers: int) -> dict[str, str]:
    """Name of a parameter of transformers → its name in the file."""
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for number in range(layers):
        names |= {f"model.layers.{number}.{a}.weight": f"blk.{number}.{b}.weight" for a, b in LAYER.items()}
    return names


def paired(x_OI: NDArray[Any], heads: int, back: bool = False) -> NDArray[Any]:
    """Rows in llama.cpp's order of rotary pairs, side by side in each head; ``back``: in transformers', in halves."""
    shape = (heads, -1, 2) if back else (heads, 2, -1)
    return x_OI.reshape(*shape, x_OI.shape[1]).swapaxes(1, 2).reshape(x_OI.shape)


def write_gguf(model: Any, tokenizer: Path, path: Path, kind: str = "Q8_0") -> None:
    """Write the file.

    Args:
        model: a ``LlamaForCausalLM`` with tied embeddings.
        tokenizer: folder with a ``tokenizer.json`` of byte-level BPE whose first tokens are bos, eos and pad.
        path: of the file.
        kind: of all matrices, by ggml's name.
    """
    import gguf

    config, quantised = model.config, gguf.GGMLQuantizationType[kind]
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(tokens)
    file.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])  # control, normal
    file.add_token_merges([" ".join(pair) for pair in content["merges"]])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    file.add_pad_token_id(2)
    names = names_of(config.num_hidden_layers)
    for name, p in model.named_parameters():
        x = p.detach().float().numpy()
        if "q_proj" in name or "k_proj" in name:
            x = paired(x, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if x.ndim == 2:
            file.add_tensor(names[name], gguf.quants.quantize(x, quantised), raw_dtype=quantised)
        else:
            file.add_tensor(names[name], x)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def read_gguf(path: Path, heads: int, kv_heads: int, layers: int) -> dict[str, NDArray[np.float32]]:
    """The numbers that a file's blocks stand for, by transformers' names: what loading it should give."""
    import gguf

    tensors = {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}
    found = {name: tensors[own] for name, own in names_of(layers).items()}
    for name, x in found.items():
        if "q_proj" in name or "k_proj" in name:
            found[name] = paired(x, heads if "q_proj" in name else kv_heads, back=True)
    return found
