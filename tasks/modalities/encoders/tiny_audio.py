"""The built-in audio encoder: small enough for a CPU, good enough for single spoken words.

Shapes: B recordings, S samples, F frames of 10 ms, M mel bands, N tokens of 80 ms, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from tasks.modalities.encoders.recording import SAMPLING_RATE, Recording
from tasks.modalities.encoders.tiny_encoder import TinyEncoder

_WINDOW = 400  # samples: 25 ms
_HOP = 160  # samples: 10 ms
_N_FFT = 512
_MEL_BANDS = 64
_RANGE = 6.0  # powers of ten below the loudest value that are distinguished (60 dB)
_SILENCE = -4.0  # powers of ten; below the loudest mel power of any signal that reaches full scale
_FRAMES_PER_TOKEN = 8
_NEIGHBOURS = 8  # tokens to either side that attention sees


class TinyAudio(TinyEncoder):
    """Log-mel frames, three strided convolutions to a token every 80 ms, pre-norm transformer layers.

    Attention sees 0.64 s to either side and uses no positions, so that a long recording is encoded like short ones.
    """

    model_type = "tiny_audio"
    max_seconds = 30.0

    def __init__(self, width: int = 96, layers: int = 2, heads: int = 4) -> None:
        super().__init__(width, layers, heads)
        self.heads = heads
        self.stem = nn.ModuleList(
            nn.Conv1d(inputs, width, kernel_size=5, stride=2, padding=2) for inputs in (_MEL_BANDS, width, width)
        )
        self.stem_norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.stem)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 3 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, mel_BFM: Tensor, frames_B: Tensor) -> Tensor:
        """Encode padded ``log_mel`` frames, of which ``frames_B`` count, into features_BND with N = ceil(F / 8).

        Tokens after an item's first ceil(frames / 8) are undefined.
        """
        x_BMF = mel_BFM.transpose(1, 2)
        x_BMF = F.pad(x_BMF, (0, -x_BMF.shape[2] % _FRAMES_PER_TOKEN))
        valid_BF = _valid(frames_B, x_BMF.shape[2])
        x_BMF = x_BMF * valid_BF[:, None]
        for convolution, norm in zip(self.stem, self.stem_norms, strict=True):
            x_BFD = F.gelu(norm(convolution(x_BMF).transpose(1, 2)))
            frames_B = (frames_B + 1) // 2
            # Zeros after an item's end, as the convolution pads when the item is alone.
            valid_BF = _valid(frames_B, x_BFD.shape[1])
            x_BMF = (x_BFD * valid_BF[:, :, None]).transpose(1, 2)
        x_BND = x_BMF.transpose(1, 2)
        closed_BNN = _closed(valid_BF).repeat_interleave(self.heads, dim=0)
        for layer in self.layers:
            x_BND = layer(x_BND, src_mask=closed_BNN)
        features_BND: Tensor = self.norm(x_BND)
        return features_BND

    @torch.no_grad()
    def encode(self, items: Sequence[Recording]) -> list[Tensor]:
        """Features (N, width) of each recording: one token per 80 ms, including the last incomplete one."""
        mels_FM = [self.log_mel(torch.from_numpy(item.samples).to(self.device)) for item in items]
        frames_B = torch.tensor([len(mel_FM) for mel_FM in mels_FM], device=self.device)
        features_BND = self(nn.utils.rnn.pad_sequence(mels_FM, batch_first=True), frames_B)
        counts = (math.ceil(len(mel_FM) / _FRAMES_PER_TOKEN) for mel_FM in mels_FM)
        return [features_ND[:count] for features_ND, count in zip(features_BND, counts, strict=True)]

    def check(self, item: Recording) -> str | None:
        """Reject recordings longer than ``max_seconds``."""
        if item.seconds > self.max_seconds:
            return f"{item.seconds:.1f} s long; builtin/tiny-audio takes at most {self.max_seconds:g} s"
        return None

    @staticmethod
    def log_mel(samples_S: Tensor) -> Tensor:
        """Mel powers of 25 ms every 10 ms, in powers of ten below the recording's loudest, as values in [-1, 1].

        Args:
            samples_S: mono, 16 kHz, at any level.

        Returns:
            mel_FM, with F = ceil(S / 160).
        """
        filters = mel_filter_bank(_N_FFT // 2 + 1, _MEL_BANDS, 0, SAMPLING_RATE / 2, SAMPLING_RATE, "slaney", "slaney")
        samples_S = samples_S / samples_S.abs().max().clamp(min=1e-9)
        frames = math.ceil(len(samples_S) / _HOP)
        # Frame f is centred on the middle of its 10 ms.
        padded_S = F.pad(samples_S, ((_N_FFT - _HOP) // 2, (_N_FFT - _HOP) // 2 + frames * _HOP - len(samples_S)))
        window = torch.hann_window(_WINDOW, device=samples_S.device)
        spectrum = torch.stft(padded_S, _N_FFT, _HOP, _WINDOW, window, center=False, return_complex=True)
        power_FK = spectrum.abs().square().T
        mel_FM = power_FK @ torch.from_numpy(filters).to(power_FK)
        log_FM = mel_FM.clamp(min=1e-10).log10()
        # All zeros is silence, not the loudest sound.
        loudest = log_FM.max().clamp(min=_SILENCE)
        return (log_FM - loudest).clamp(min=-_RANGE) / (_RANGE / 2) + 1


def _valid(frames_B: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=frames_B.device) < frames_B[:, None]


def _closed(valid_BN: Tensor) -> Tensor:
    """The pairs (query, key) that attention masks: distant ones, and keys that are padding."""
    place_N = torch.arange(valid_BN.shape[1], device=valid_BN.device)
    distance_NN = (place_N[:, None] - place_N).abs()
    # A padded query sees itself: with nothing to see it would become NaN, which spreads.
    return (distance_NN > _NEIGHBOURS) | (~valid_BN[:, None, :] & (distance_NN > 0))
