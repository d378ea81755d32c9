"""Audio-language models of every class that the harness takes, saved with random weights and a small processor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf

from tests.support.recordings import write_wav
from tests.support.vision_language import TEXT, tokenizer

RATE, SECOND = 16_000, 100  # samples and frames of a second
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "Which digit is it?"
_HEARS = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TURNS = (
    "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content %}{% if part.type == 'audio' %}"
    "PLACE{% else %}{{ '\n' + part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


class Kind(NamedTuple):
    """A class of models.

    Attributes:
        tokens: special ones, besides those that begin and end texts.
        model: makes one, of the tokenizer.
        processor: makes its processor, of the tokenizer.
        place: what stands for a recording in the chat template.
    """

    tokens: tuple[str, ...]
    model: Callable[[Any], Any]
    processor: Callable[[Any], Any]
    place: str


def each_kind(names: Iterable[str], only_first: bool = False) -> pytest.MarkDecorator:
    """A test of each class; ``only_first``: of the others with the whole trials alone."""
    missing = find_spec("torchaudio") is None
    needs = pytest.mark.skipif(missing, reason="the processor of granite_speech needs torchaudio, which is not there")
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(name, marks=[needs] * (name == "granite_speech") + [pytest.mark.e2e] * (only_first and n > 0))
            for n, name in enumerate(names)
        ],
    )


def save(name: str, folder: Path, template: bool = True) -> Path:
    """Save a model of a class with its processor."""
    kind = KINDS[name]
    made = tokenizer(kind.tokens, said=[*DIGITS, PROMPT, "ASSISTANT: USER: Audio yes no"])
    torch.manual_seed(0)
    model = kind.model(made).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.15)
    model.save_pretrained(folder)
    processor = kind.processor(made)
    processor.chat_template = TURNS.replace("PLACE", kind.place) if template else None
    processor.save_pretrained(folder)
    return folder


def recordings(folder: Path, seconds: Iterable[float] = (0.4, 0.7, 1.0)) -> list[Path]:
    """Recordings of noise, of these lengths."""
    paths = []
    for number, length in enumerate(seconds):
        noise = np.random.default_rng(number).normal(0, 0.1, round(RATE * length))
        write_wav(path := folder / f"{number}.wav", noise)
        paths.append(path)
    return paths


def data(folder: Path, examples: Mapping[str, int]) -> Path:
    """A speech data set in the layout of audiofolder: tones of as many pitches as there are digits."""
    for split, count in examples.items():
        (folder / split).mkdir(parents=True)
        lines = ["file_name,transcription"]
        for number in range(count):
            digit = number % 4
            time = np.arange(RATE // 2) / RATE
            phase = 0.1 * number
            write_wav(folder / split / f"{number}.wav", 0.3 * np.sin(2 * np.pi * 300 * (digit + 1) * time + phase))
            lines.append(f"{number}.wav,{DIGITS[digit]}")
        (folder / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def _text(kind: str, made: Any) -> dict[str, Any]:
    ids = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}
    return {"model_type": kind, "vocab_size": len(made), **ids, **TEXT}


def _id(made: Any, token: str) -> int:
    found: int = made.convert_tokens_to_ids(token)
    return found


def _whisper(seconds: int = 1) -> Any:
    return hf.WhisperFeatureExtractor(feature_size=8, sampling_rate=RATE, chunk_length=seconds)


def _qwen2_audio(made: Any) -> Any:
    tower = {
        "model_type": "qwen2_audio_encoder", "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": SECOND // 2,
    }  # fmt: skip
    config = hf.Qwen2AudioConfig(
        audio_config=tower, text_config=_text("qwen2", made), audio_token_index=_id(made, "<|AUDIO|>")
    )
    return hf.Qwen2AudioForConditionalGeneration(config)


def _glm(made: Any) -> Any:
    tower = {**_HEARS, "num_mel_bins": 8, "max_position_embeddings": SECOND}
    config = hf.GlmAsrConfig(
        audio_config={"model_type": "glmasr_encoder", **tower}, text_config=_text("llama", made),
        audio_token_id=_id(made, "<|pad|>"), tie_word_embeddings=False,
    )  # fmt: skip
    return hf.GlmAsrForConditionalGeneration(config)


def _flamingo(made: Any) -> Any:
    tower = {**_HEARS, "num_mel_bins": 8, "max_source_positions": SECOND // 2}
    config = hf.AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **tower}, text_config=_text("qwen2", made),
        audio_token_id=_id(made, "<sound>"),
    )  # fmt: skip
    return hf.AudioFlamingo3ForConditionalGeneration(config)


def _granite(made: Any) -> Any:
    tower = {
        "input_dim": 160, "hidden_dim": 24, "num_layers": 2, "num_heads": 4, "dim_head": 6, "output_dim": 10,
        "context_size": 8, "max_pos_emb": 16, "conv_kernel_size": 3, "feedforward_mult": 2, "dropout": 0.0,
    }  # fmt: skip
    between = {
        "model_type": "blip_2_qformer", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "encoder_hidden_size": 24, "cross_attention_frequency": 1,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": len(made),
    }  # fmt: skip
    config = hf.GraniteSpeechConfig(
        encoder_config=tower, projector_config=between, text_config=_text("granite", made),
        audio_token_index=_id(made, "<|audio|>"), has_lora_adapter=False, window_size=15, downsample_rate=5,
        tie_word_embeddings=False,
    )  # fmt: skip
    return hf.GraniteSpeechForConditionalGeneration(config)


def _granite_processor(made: Any) -> Any:
    return hf.GraniteSpeechProcessor(hf.GraniteSpeechFeatureExtractor(), made)


KINDS = {
    "qwen2_audio": Kind(
        ("<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>"),
        _qwen2_audio,
        lambda made: hf.Qwen2AudioProcessor(_whisper(), made),
        "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>",
    ),
    "glmasr": Kind(
        ("<|begin_of_audio|>", "<|end_of_audio|>", "<|pad|>"),
        _glm,
        lambda made: hf.GlmAsrProcessor(_whisper(2), made),
        "<|begin_of_audio|><|pad|><|end_of_audio|>",
    ),
    "audioflamingo3": Kind(
        ("<sound>",), _flamingo, lambda made: hf.AudioFlamingo3Processor(_whisper(), made), "<sound>"
    ),
    "granite_speech": Kind(("<|audio|>",), _granite, _granite_processor, "<|audio|>"),
}
