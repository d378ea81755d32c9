"""Fused layers: the order of their outputs, as each class of transformers splits them. No shape tells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from adapters.placement.families import Fused
from adapters.placement.shapes import Heads

Layout = tuple[Fused, int]  # one period's roles and sizes, and the number of periods


def _per_head(module: Any, config: Any, outputs: int) -> Layout:
    heads = Heads.of(module, config).queries or 1
    return Fused(("q", "k", "v"), sizes=(outputs // (3 * heads),) * 3), heads


def _thirds(_module: Any, _config: Any, outputs: int) -> Layout:
    return Fused(("q", "k", "v"), sizes=(outputs // 3,) * 3), 1


def _concatenated(module: Any, config: Any, outputs: int) -> Layout:
    heads = Heads.of(module, config)
    queries, keys = heads.queries or 1, heads.keys or 1
    size = outputs // (queries + 2 * keys)
    return Fused(("q", "k", "v"), sizes=(queries * size, keys * size, keys * size)), 1


def _falcon(module: Any, config: Any, outputs: int) -> Layout:
    """Each key head with its queries; or one key head after all queries; or head by head."""
    if config.new_decoder_architecture:
        queries = config.num_attention_heads // config.num_kv_heads
        size = outputs // (config.num_kv_heads * (queries + 2))
        return Fused(("q", "k", "v"), sizes=(queries * size, size, size)), config.num_kv_heads
    if config.multi_query:
        size = outputs // (config.num_attention_heads + 2)
        return Fused(("q", "k", "v"), sizes=(config.num_attention_heads * size, size, size)), 1
    return _per_head(module, config, outputs)


def _gpt_bigcode(module: Any, config: Any, outputs: int) -> Layout:
    return _concatenated(module, config, outputs) if config.multi_query else _per_head(module, config, outputs)


def _codegen(_module: Any, _config: Any, outputs: int) -> Layout:
    """Four parts, one per device that CodeGen was trained on, each with queries, values and keys."""
    return Fused(("q", "v", "k"), sizes=(outputs // 12,) * 3), 4


def _halves(_module: Any, _config: Any, outputs: int) -> Layout:
    return Fused(("gate", "up"), sizes=(outputs // 2,) * 2), 1


def layout_of(module: nn.Module) -> Callable[[Any, Any, int], Layout] | None:
    """How the class of ``module`` splits the outputs of its fused layer; None: not known."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("transformers.models."):
            for name in (kind.__name__, f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"):
                if name in FUSED:
                    return FUSED[name]
    return None


# The class of transformers that splits the outputs → how. Any other class is refused: no shape tells the order.
FUSED: dict[str, Callable[[Any, Any, int], Layout]] = {
    **dict.fromkeys(
        ("BloomAttention", "PersimmonAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention"), _per_head
    ),
    "MiniMaxLightningAttention": _per_head,
    **dict.fromkeys(("MptAttention", "GPT2Attention", "modeling_openai.Attention"), _thirds),
    **dict.fromkeys(("DbrxAttention", "Phi3Attention", "Phi4MultimodalAttention"), _concatenated),
    "FalconAttention": _falcon,
    "GPTBigCodeAttention": _gpt_bigcode,
    "CodeGenAttention": _codegen,
    **dict.fromkeys(("Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP", "Zamba2MLP"), _halves),
    **dict.fromkeys(
        ("MoshiGatingMLP", "ModernBertDecoderMLP", "GraniteMoeHybridMLP", "GraniteMoeSharedMLP", "GraniteMoeSWAMLP"),
        _halves,
    ),
    "MiniMaxM3VLDenseMLP": _halves,
}
