"""A small random model of every vision-language and audio-language class that adapters know, and inputs for it.

Shapes: B rows, T positions, M tokens of one picture or recording, K of them in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor

VOCABULARY, PAD, BOS, EOS, MEDIA = 64, 0, 1, 2, 60
_DRAWN = {"initializer_range": 0.2}  # large enough that a wrong adapter is seen
_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
}
_TEXT |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, **_IDS, **_DRAWN}
_SEES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **_DRAWN}
_FOUR, _SIXTEEN = {"image_size": 16, "patch_size": 8}, {"image_size": 16, "patch_size": 4}  # patches of a picture
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
_HEARS = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, **_DRAWN}
_THIRDS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_QWEN_SEES = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **_DRAWN}


class VLM(NamedTuple):
    """How to make a model, and what it takes for one picture or recording of each row."""

    config: Callable[[], Any]
    tokens: int  # M
    media: Callable[[int, torch.Generator], dict[str, Tensor]]  # for B rows
    types: str | None = None  # the argument that says which tokens are of the medium
    context: str = "image"


def _drawn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _pictures(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": _drawn(rows, 3, 16, 16, generator=generator)}


def _listed_pictures(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": _drawn(rows, 1, 3, 16, 16, generator=generator)}


def _sized_pictures(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return _pictures(rows, generator) | {"image_sizes": torch.tensor([[16, 16]] * rows)}


def _tiled_pictures(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": _drawn(rows, 2, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([[16, 16]] * rows),
    }


def _patches(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": _drawn(rows * 16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
    }


def _recordings(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": _drawn(rows, 8, 16, generator=generator)}


def _masked_recordings(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return _recordings(rows, generator) | {"feature_attention_mask": torch.ones(rows, 16, dtype=torch.long)}


def _marked_recordings(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return _recordings(rows, generator) | {"input_features_mask": torch.ones(rows, 16, dtype=torch.bool)}


def _frames(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "input_features": _drawn(rows, 8, 8, generator=generator),
        "input_features_mask": torch.ones(rows, 4, dtype=torch.bool),
    }


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


_GEMMA = _TEXT | {"hidden_activation": "gelu_pytorch_tanh"}
_ROTATED = _without(_TEXT, "head_dim") | {"rope_parameters": _THIRDS}


def _idefics() -> dict[str, Any]:
    return {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _SEES | _SIXTEEN,
        "image_token_id": MEDIA,
        "scale_factor": 2,
        "pad_token_id": PAD,
    }


VLMS: dict[str, VLM] = {
    "qwen2_vl": VLM(
        lambda: hf.Qwen2VLConfig(
            text_config=_ROTATED,
            vision_config={"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, **_QWEN_SEES},
            image_token_id=MEDIA,
            video_token_id=MEDIA + 1,
        ),
        *(4, _patches, "mm_token_type_ids"),
    ),
    "qwen2_5_vl": VLM(
        lambda: hf.Qwen2_5_VLConfig(
            text_config=_ROTATED,
            vision_config={
                **{"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16},
                **{"fullatt_block_indexes": [1], **_QWEN_SEES},
            },
            image_token_id=MEDIA,
            video_token_id=MEDIA + 1,
        ),
        *(4, _patches, "mm_token_type_ids"),
    ),
    "qwen3_vl": VLM(
        lambda: hf.Qwen3VLConfig(
            text_config=_TEXT | {"rope_parameters": _THIRDS | {"mrope_section": [2, 1, 1]}},
            vision_config={
                **{"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16},
                **{"deepstack_visual_indexes": [0], **_QWEN_SEES},
            },
            image_token_id=MEDIA,
            video_token_id=MEDIA + 1,
        ),
        *(4, _patches, "mm_token_type_ids"),
    ),
    "smolvlm": VLM(
        lambda: hf.SmolVLMConfig(**_idefics()),
        *(4, _listed_pictures),
    ),
    "idefics3": VLM(
        lambda: hf.Idefics3Config(**_idefics()),
        *(4, _listed_pictures),
    ),
    "llava": VLM(
        lambda: hf.LlavaConfig(
            text_config=_TEXT | {"model_type": "llama"},
            vision_config=_SEES | _FOUR | {"model_type": "clip_vision_model", "projection_dim": 32},
            image_token_index=MEDIA,
        ),
        *(4, _pictures),
    ),
    "llava_next": VLM(
        lambda: hf.LlavaNextConfig(
            text_config=_TEXT | {"model_type": "llama"},
            vision_config=_SEES | _FOUR | {"model_type": "clip_vision_model", "projection_dim": 32},
            image_token_index=MEDIA,
            image_grid_pinpoints=[[16, 16]],
        ),
        *(10, _tiled_pictures),
    ),
    "llava_onevision": VLM(
        lambda: hf.LlavaOnevisionConfig(
            text_config=_TEXT | {"model_type": "qwen2"},
            vision_config=_SEES | _FOUR | _SIGLIP,
            image_token_index=MEDIA,
            video_token_index=MEDIA + 1,
            image_grid_pinpoints=[[16, 16]],
        ),
        *(10, _tiled_pictures),
    ),
    "paligemma": VLM(
        lambda: hf.PaliGemmaConfig(
            text_config=_GEMMA | {"model_type": "gemma2", "query_pre_attn_scalar": 8},
            vision_config=_SEES | _FOUR | _SIGLIP | {"projection_dim": 32},
            image_token_index=MEDIA,
            projection_dim=32,
            hidden_size=32,
            tie_word_embeddings=False,
        ),
        *(4, _pictures, "token_type_ids"),
    ),
    "gemma3": VLM(
        lambda: hf.Gemma3Config(
            text_config=_GEMMA | {"query_pre_attn_scalar": 8, "sliding_window": 16},
            vision_config=_SEES | _SIXTEEN | {"vision_use_head": False},
            image_token_index=MEDIA,
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
        ),
        *(4, _pictures, "token_type_ids"),
    ),
    "internvl": VLM(
        lambda: hf.InternVLConfig(
            text_config=_TEXT | {"model_type": "qwen2"},
            vision_config=_SEES | {"image_size": [16, 16], "patch_size": [4, 4]},
            image_token_id=MEDIA,
            image_seq_length=4,
        ),
        *(4, _pictures),
    ),
    "mistral3": VLM(
        lambda: hf.Mistral3Config(
            text_config=_TEXT | {"model_type": "mistral"},
            vision_config=_SEES | _SIXTEEN | {"model_type": "pixtral", "head_dim": 8},
            image_token_index=MEDIA,
            spatial_merge_size=2,
        ),
        *(4, _sized_pictures),
    ),
    "qwen2_audio": VLM(
        lambda: hf.Qwen2AudioConfig(
            text_config=_TEXT | {"model_type": "qwen2"},
            audio_config={
                **{"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
                **{"num_mel_bins": 8, "max_source_positions": 8, "model_type": "qwen2_audio_encoder", **_DRAWN},
            },
            audio_token_index=MEDIA,
        ),
        *(4, _masked_recordings, None, "audio"),
    ),
    "voxtral": VLM(
        lambda: hf.VoxtralConfig(
            text_config=_TEXT | {"model_type": "llama"},
            audio_config=_HEARS | {"num_mel_bins": 8, "max_source_positions": 8, "head_dim": 8},
            audio_token_id=MEDIA,
        ),
        *(2, _recordings, None, "audio"),
    ),
    "glmasr": VLM(
        lambda: hf.GlmAsrConfig(
            text_config=_TEXT | {"model_type": "llama"},
            audio_config=_HEARS | {"model_type": "glmasr_encoder", "num_mel_bins": 8, "max_position_embeddings": 8},
            audio_token_id=MEDIA,
            tie_word_embeddings=False,
        ),
        *(2, _marked_recordings, None, "audio"),
    ),
    "audioflamingo3": VLM(
        lambda: hf.AudioFlamingo3Config(
            text_config=_TEXT | {"model_type": "qwen2"},
            audio_config=_HEARS
            | {"model_type": "audioflamingo3_encoder", "num_mel_bins": 8, "max_source_positions": 8},
            audio_token_id=MEDIA,
        ),
        *(4, _marked_recordings, None, "audio"),
    ),
    "granite_speech": VLM(
        lambda: hf.GraniteSpeechConfig(
            text_config=_without(_TEXT, "head_dim") | {"model_type": "granite"},
            encoder_config={
                **{"input_dim": 8, "hidden_dim": 32, "num_layers": 2, "num_heads": 4, "dim_head": 8, "output_dim": 10},
                **{"context_size": 4, "max_pos_emb": 8, "conv_kernel_size": 3, "feedforward_mult": 2, "dropout": 0.0},
            },
            projector_config={
                **{"model_type": "blip_2_qformer", "encoder_hidden_size": 32, "cross_attention_frequency": 1},
                **{**_SEES, "vocab_size": VOCABULARY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            },
            audio_token_index=MEDIA,
            has_lora_adapter=False,
            window_size=4,
            downsample_rate=2,
        ),
        *(4, _frames, None, "audio"),
    ),
}  # fmt: skip


def small(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small random model of a class, in eval mode."""
    torch.manual_seed(0)
    config = VLMS[name].config()
    known = type(config) in hf.AutoModelForMultimodalLM._model_mapping
    model = (hf.AutoModelForMultimodalLM if known else hf.AutoModelForSeq2SeqLM).from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():  # biases, and Gemma 3's connector, which would make every picture the same
                p.normal_(std=0.2)
    return model.to(dtype).eval()


def inputs(
    name: str, rows: Sequence[tuple[int, int]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What a model is called with.

    Args:
        name: of the class.
        rows: text tokens before and after the row's one picture or recording; padded on the left to the longest.
        seed: of everything that is drawn.
        dtype: of what is no integer.
    """
    vlm, generator = VLMS[name], torch.Generator().manual_seed(seed)
    length = 1 + vlm.tokens + max(before + after for before, after in rows)
    ids_BT = torch.full((len(rows), length), PAD)
    for row, (before, after) in enumerate(rows):
        texts = torch.randint(5, 50, (before + after,), generator=generator)
        media = torch.full((vlm.tokens,), MEDIA)
        whole = torch.cat([torch.tensor([BOS]), texts[:before], media, texts[before:]])
        ids_BT[row, length - len(whole) :] = whole
    given = {"input_ids": ids_BT, "attention_mask": (ids_BT != PAD).long(), **vlm.media(len(rows), generator)}
    if vlm.types is not None:
        given[vlm.types] = (ids_BT == MEDIA).long()
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in given.items()}
