"""The parts of a vision- or audio-language model: language model, tower, and the connector between the two.

The language model's layers are found as in any causal LM, below ``get_decoder()``. Towers and connectors are found by
exact path, in tables here. Every token of theirs is of the medium's context, so it has one group, and an adapter there
needs no layout but the number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from adapters.placement.families import Fused, Table
from adapters.placement.layers import is_linear
from adapters.placement.roles import Target, matches, targets_at
from harness.core.errors import UserError, did_you_mean

PARTS = ("language", "vision", "audio", "connector")
LINEAR = "linear"  # the role of a connector's layers, which have no other


@dataclass(frozen=True)
class Medium:
    """Where a class has what reads its pictures or recordings."""

    part: str  # vision or audio
    tower: str  # its path
    connector: tuple[str, ...]  # paths; they may lie inside the tower
    token: str  # the config's name for the placeholder's id


def _vision(tower: str, *connector: str) -> Medium:
    return Medium("vision", tower, connector, "image_token_id")


def _audio(tower: str, *connector: str) -> Medium:
    return Medium("audio", tower, connector, "audio_token_id")


_LLAVA = _vision("model.vision_tower", "model.multi_modal_projector")
_IDEFICS = _vision("model.vision_model", "model.connector")
_QWEN = _vision("model.visual", "model.visual.merger")
# transformers' model_type → where its parts are
MEDIA: dict[str, Medium] = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "paligemma", "gemma3", "internvl", "mistral3"), _LLAVA),
    **dict.fromkeys(("smolvlm", "idefics3"), _IDEFICS),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN),
    "qwen3_vl": _vision("model.visual", "model.visual.merger", "model.visual.deepstack_merger_list"),
    **dict.fromkeys(
        ("qwen2_audio", "voxtral", "glmasr", "audioflamingo3"),
        _audio("model.audio_tower", "model.multi_modal_projector"),
    ),
    "granite_speech": _audio("model.encoder", "model.projector"),
}


def _blocks(blocks: str, inside: Table, *norms: str) -> Table:
    return {f"{blocks}.*.{path}": role for path, role in {**inside, **dict.fromkeys(norms, "norm")}.items()}


_QKV: Table = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.out_proj": "o"}
_CLIP = _blocks(
    "encoder.layers",
    {**_QKV, "mlp.fc1": "up", "mlp.fc2": "down", "mlp": "mlp"},
    *("layer_norm1", "layer_norm2"),
)
_WHISPER = _blocks("layers", {**_QKV, "fc1": "up", "fc2": "down"}, "self_attn_layer_norm", "final_layer_norm")
_FUSED: Table = {"attn.qkv": Fused(("q", "k", "v")), "attn.proj": "o", "mlp": "mlp"}
_NORMS = ("norm1", "norm2")
# The tower's class → path pattern inside it → role
TOWERS: dict[str, Table] = {
    **dict.fromkeys(("CLIPVisionModel", "SiglipVisionModel"), _CLIP),
    **dict.fromkeys(("Idefics3VisionTransformer", "SmolVLMVisionTransformer"), _CLIP),
    **dict.fromkeys(("Qwen2AudioEncoder", "VoxtralEncoder", "AudioFlamingo3Encoder"), _WHISPER),
    "GlmAsrEncoder": _blocks(
        "layers",
        {
            **{"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o"},
            **{"mlp.fc1": "up", "mlp.fc2": "down", "mlp": "mlp"},
        },
        *("input_layernorm", "post_attention_layernorm"),
    ),
    "Qwen2VisionTransformerPretrainedModel": _blocks("blocks", {**_FUSED, "mlp.fc1": "up", "mlp.fc2": "down"}, *_NORMS),
    "Qwen2_5_VisionTransformerPretrainedModel": _blocks(
        "blocks", {**_FUSED, "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}, *_NORMS
    ),
    "Qwen3VLVisionModel": _blocks(
        "blocks", {**_FUSED, "mlp.linear_fc1": "up", "mlp.linear_fc2": "down"}, *_NORMS
    ),
    "InternVLVisionModel": _blocks(
        "encoder.layer",
        {
            **{"attention.q_proj": "q", "attention.k_proj": "k", "attention.v_proj": "v"},
            **{"attention.projection_layer": "o", "mlp.fc1": "up", "mlp.fc2": "down", "mlp": "mlp"},
        },
        *("layernorm_before", "layernorm_after"),
    ),
    "PixtralVisionModel": _blocks(
        "transformer.layers",
        {
            **{"attention.q_proj": "q", "attention.k_proj": "k", "attention.v_proj": "v", "attention.o_proj": "o"},
            **{"feed_forward.gate_proj": "gate", "feed_forward.up_proj": "up", "feed_forward.down_proj": "down"},
            "feed_forward": "mlp",
        },
        *("attention_norm", "ffn_norm"),
    ),
    "GraniteSpeechCTCEncoder": _blocks(
        "layers",
        {
            **{"attn.to_q": "q", "attn.to_kv": Fused(("k", "v")), "attn.to_out": "o"},
            **{"ff1.up_proj": "up", "ff1.down_proj": "down", "ff2.up_proj": "up", "ff2.down_proj": "down"},
        },
        *("ff1.pre_norm", "attn.pre_norm", "ff2.pre_norm", "post_norm"),
    ),
}  # fmt: skip


def medium_of(model: Any) -> Medium | None:
    """Where a model has its tower and connector; None: it has none that is known."""
    return MEDIA.get(_kind(model))


def medium_context(
    model: Any, contexts_from: Mapping[int, str] | None, grouping: Mapping[str, str | None]
) -> str | None:
    """The context of the tower's tokens: that of the placeholders in the sequence.

    Args:
        model: a vision- or audio-language model.
        contexts_from: token id → context; other tokens are of the last context.
        grouping: context → group.

    Returns:
        None: it is not known, and contexts differ in their groups.
    """
    medium, contexts = medium_of(model), list(grouping)
    if medium is None:
        return None
    if contexts_from is not None:
        return contexts_from.get(getattr(model.config, medium.token), contexts[-1])
    return contexts[0] if len(set(grouping.values())) == 1 else None


def check_part(model: Any, part: str) -> Medium:
    """Check that a model has a part, other than language.

    Raises:
        UserError: it has not.
    """
    medium, kind = medium_of(model), _kind(model)
    if medium is None:
        raise UserError(
            f"where: {part}: the {kind} model has no such part that is known; allowed: language, and on "
            f"{', '.join(MEDIA)} also the tower (vision or audio) and the connector"
        )
    has = ("language", medium.part, "connector")
    if part not in has:
        raise UserError(f"where: {part}: the {kind} model has no such part; {did_you_mean(part, has)}")
    return medium


def targets_of_part(model: nn.Module, part: str, roles: frozenset[str], named: frozenset[str]) -> list[Target]:
    """The layers of a tower or connector that have one of ``roles``, in the model's order.

    Args:
        model: a vision- or audio-language model.
        part: one of ``PARTS``, other than language.
        roles: roles to find.
        named: the subset of ``roles`` that the user named individually, which the part must have.

    Raises:
        UserError: the model has no such part, or the part lacks all of ``roles`` or one of ``named``.
    """
    medium, kind = check_part(model, part), _kind(model)
    table = _connector(model, medium, kind) if part == "connector" else _tower(model, medium, kind)
    found = [match for match in matches(model, table) if part == "connector" or _is_read(model, match[0])]
    own = {role for _, _, name in found for role in (name.roles if isinstance(name, Fused) else (name,))}
    missing = named - own or (frozenset() if roles & own else roles)
    if missing:
        raise UserError(
            f"where: {part}: this part of the {kind} model has no layer with the role {', '.join(sorted(missing))}; it "
            f"has {', '.join(sorted(own))}"
        )
    targets = [target for path, layer, role in found for target in targets_at(path, layer, role, roles, None)]
    return [replace(target, part=part) for target in targets]


def parameters_of_part(model: Any, part: str) -> list[nn.Parameter]:
    """The parameters of a part, each once; of a tower without those of a connector in it.

    Those of layers that nothing reads are left out, as far as ``vision_feature_layer`` tells.

    Args:
        model: a vision- or audio-language model; any causal LM for ``language``.
        part: one of ``PARTS``.

    Raises:
        UserError: the model has no such part.
    """
    if part == "language":
        medium = medium_of(model)
        modules = [model] if medium is None else [model.get_decoder(), model.get_output_embeddings()]
        return list({id(p): p for module in modules for p in module.parameters()}.values())
    medium = check_part(model, part)
    connector = {id(p): p for path in medium.connector for p in model.get_submodule(path).parameters()}
    if part == "connector":
        return list(connector.values())
    tower = model.get_submodule(medium.tower).named_parameters(prefix=medium.tower)
    return [p for path, p in tower if id(p) not in connector and _is_read(model, path)]


def _connector(model: nn.Module, medium: Medium, kind: str) -> dict[str, str | Fused]:
    inside = {
        path: layer for at in medium.connector for path, layer in model.get_submodule(at).named_modules(prefix=at)
    }
    found: dict[str, str | Fused] = {path: LINEAR for path, layer in inside.items() if is_linear(layer)}
    if not found:
        raise UserError(
            f"where: connector: that of the {kind} model is a matrix that belongs to no linear layer, and adapters act "
            "on layers; leave it out"
        )
    return found


def _is_read(model: Any, path: str) -> bool:
    """Whether the language model gets what a layer of the tower computes: LLaVA reads the last block but one."""
    read = getattr(model.config, "vision_feature_layer", None)
    if read is None:
        return True
    found = re.split(r"\.([0-9]+)\.", path, maxsplit=1)
    if len(found) == 1:  # beside the blocks; hidden states are those before what follows the last one
        return not {"post_layernorm", "head"} & set(path.split("."))
    stack, number, _ = found
    count = len(model.get_submodule(stack))
    hidden = [read] if isinstance(read, int) else read  # indices of the states before, between and after the blocks
    return int(number) < max(index if index >= 0 else count + 1 + index for index in hidden)


def _tower(model: nn.Module, medium: Medium, kind: str) -> dict[str, str | Fused]:
    tower = type(model.get_submodule(medium.tower)).__name__
    if tower not in TOWERS:
        raise UserError(
            f"where: {medium.part}: the layers of a {tower}, which this {kind} model has, are not known; allowed: the "
            f"other parts, or a model with one of {', '.join(TOWERS)}"
        )
    return {f"{medium.tower}.{path}": role for path, role in TOWERS[tower].items()}


def _kind(model: Any) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
