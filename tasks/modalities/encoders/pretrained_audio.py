"""Audio encoders of ``transformers``, by hub id or ``save_pretrained`` folder, each with its own feature extractor.

Whisper's encoder (https://arxiv.org/abs/2212.04356) and the Audio Spectrogram Transformer (AST,
https://arxiv.org/abs/2104.01778). Both compute on a fixed length, independent of the recording's.

Shapes: B recordings, N tokens, D features.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.core import hub
from harness.core.errors import UserError
from tasks.encoder import Encoder
from tasks.modalities.encoders.layers import DTYPES, dtype_without_weights, features_of, hidden_states_of
from tasks.modalities.encoders.options import LAST_LAYER, EncoderOptions
from tasks.modalities.encoders.recording import SAMPLING_RATE, Recording


class PretrainedAudio(Encoder):
    """A model and its feature extractor, which is read when the first recording comes.

    Args:
        model: with or without weights; on the ``meta`` device, ``encode`` tells the shape of features.
        read_extractor: reads the model's own feature extractor.
        options: which layer's features are taken.
    """

    items_per_call = 1  # large, so it is as fast, and a file's features depend on no other file

    def __init__(self, model: Any, read_extractor: Callable[[], Any], options: EncoderOptions = LAST_LAYER) -> None:
        super().__init__()
        self.model, self._read_extractor, self._layer = model, read_extractor, options.layer
        self.width = int(model.config.hidden_size)

    @cached_property
    def extractor(self) -> Any:
        """The feature extractor of ``transformers``."""
        return self._read_extractor()

    @torch.no_grad()
    def encode(self, items: Sequence[Recording]) -> list[Tensor]:
        """Features (N, D) of each recording, in the encoder's precision."""
        samples = [item.samples for item in items]
        inputs = self.extractor(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        weight = next(self.model.parameters())
        made = self.model(inputs[self.extractor.model_input_names[0]].to(weight), **hidden_states_of(self._layer))
        features_BND = features_of(made, self._layer)
        return [features_ND[: self.tokens(item)] for features_ND, item in zip(features_BND, items, strict=True)]

    def check(self, item: Recording) -> str | None:
        """Reject what the feature extractor would cut off."""
        if item.seconds > self.max_seconds:
            return f"{item.seconds:.1f} s long; {self.model.config.model_type} takes at most {self.max_seconds:g} s"
        return None

    @property
    @abstractmethod
    def max_seconds(self) -> float:
        """The longest recording that is encoded whole."""

    @abstractmethod
    def tokens(self, item: Recording) -> int:
        """N of a recording."""


class WhisperEncoder(PretrainedAudio):
    """The encoder half of Whisper, on 30 s of padded mel frames; only tokens that cover the recording are kept."""

    @property
    def max_seconds(self) -> float:
        """Two mel frames of 10 ms make a token: 30 s for the published models."""
        return float(self.model.config.max_source_positions / 50)

    def tokens(self, item: Recording) -> int:
        """50 per second, including the last incomplete one."""
        return math.ceil(len(item.samples) * 50 / SAMPLING_RATE)


class SpectrogramTransformer(PretrainedAudio):
    """AST: patches of a padded spectrogram of fixed length, after a class and a distillation token."""

    def check(self, item: Recording) -> str | None:
        """Also reject what is shorter than one frame of 25 ms, which has no spectrogram."""
        if len(item.samples) < 400:
            return f"{item.seconds * 1000:.1f} ms long; {self.model.config.model_type} takes at least 25 ms"
        return super().check(item)

    @property
    def max_seconds(self) -> float:
        """``max_length`` frames of 25 ms, one every 10 ms, none of them padding."""
        return float((self.model.config.max_length - 1) * 0.01 + 0.025)

    def tokens(self, item: Recording) -> int:
        """All of them: the model was trained with padding, and attention mixes it into every patch."""
        config = self.model.config
        across = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        along = (config.max_length - config.patch_size) // config.time_stride + 1
        return 2 + int(across * along)


_KINDS: dict[str, type[PretrainedAudio]] = {
    "whisper": WhisperEncoder,
    "audio-spectrogram-transformer": SpectrogramTransformer,
}


def load(name: str, trust_remote_code: bool, options: EncoderOptions = LAST_LAYER) -> PretrainedAudio:
    """Load weights and feature extractor.

    Raises:
        UserError: one of them could not be loaded, or the model is not a known audio encoder, or has no such layer.
    """
    from transformers import AutoModel

    kind = type(empty(name, trust_remote_code, options))
    place, revision = hub.resolve(name), hub.revision_of(name)
    try:
        model = AutoModel.from_pretrained(
            place, revision=revision, dtype=DTYPES[options.dtype], trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(hub.load_error(name, error)) from error
    encoder = kind(_half(model), partial(_extractor, name, trust_remote_code), options).eval()
    _ = encoder.extractor  # one of another sampling rate is refused here
    return encoder


def empty(name: str, trust_remote_code: bool, options: EncoderOptions = LAST_LAYER) -> PretrainedAudio:
    """The encoder on the ``meta`` device.

    Raises:
        UserError: there is no such configuration, it is not an audio encoder's, or it has no such layer.
    """
    from transformers import AutoModel

    kind = _kind(name, trust_remote_code)
    config = hub.load_config(name, trust_remote_code)
    with torch.device("meta"):
        model = AutoModel.from_config(
            config, dtype=dtype_without_weights(options, config), trust_remote_code=trust_remote_code
        )
    encoder = kind(_half(model), partial(_extractor, name, trust_remote_code), options).eval()
    if options.layer is not None:  # one that is not there is refused here
        encoder.encode([Recording(np.zeros(SAMPLING_RATE, dtype=np.float32))])
    return encoder


def _extractor(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoFeatureExtractor

    try:
        extractor = AutoFeatureExtractor.from_pretrained(
            hub.resolve(name), revision=hub.revision_of(name), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(hub.load_error(name, error)) from error
    if extractor.sampling_rate != SAMPLING_RATE:
        raise UserError(f"{name}: its feature extractor takes {extractor.sampling_rate} Hz; allowed: {SAMPLING_RATE}")
    return extractor


def _kind(name: str, trust_remote_code: bool) -> type[PretrainedAudio]:
    found = hub.load_config(name, trust_remote_code).model_type
    if found not in _KINDS:
        allowed = ", ".join(sorted(_KINDS))
        raise UserError(f"backbone.encoders: {name!r} is a {found} model, not an audio encoder; allowed: {allowed}")
    return _KINDS[found]


def _half(model: Any) -> Any:
    """The encoder of a model that also has a decoder; any other model unchanged."""
    return model.encoder if hasattr(model, "decoder") else model
