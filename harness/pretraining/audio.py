"""Pre-training of the built-in audio encoder: classify the phoneme of every 20 ms of synthetic pseudo-words.

Shapes: B utterances, F frames of 10 ms, M mel bands, N tokens, L labels of 20 ms, K classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from harness.pretraining.loop import Recipe, train, write_training
from harness.pretraining.sounds import LABELS, utterance
from tasks.modalities.encoders.tiny_audio import TinyAudio

AUDIO_ENCODER = "tiny-audio"
AUDIO_ENCODER_RECIPE = Recipe(4000, 48, 2e-3, training_items=10_000, held_out_items=500)

_LABELS_PER_TOKEN = 4
_IGNORED = -100  # cross_entropy's default ignore_index
_LABEL_SMOOTHING = 0.1
_POOL = 8  # a batch is drawn from a pool of this many batches of similar length


@dataclass(frozen=True)
class Utterances:
    """Spoken pseudo-words, shortest first: log-mel frames (F, M) and phonemes (L,) of each."""

    mels: list[Tensor]
    labels: list[Tensor]

    def batch(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A padded batch: mel_BFM, frames_B, labels_BL with L = 4 N."""
        mel_BFM = nn.utils.rnn.pad_sequence([self.mels[index] for index in chosen], batch_first=True)
        frames_B = torch.tensor([len(self.mels[index]) for index in chosen])
        labels_BL = torch.full((len(chosen), -(-mel_BFM.shape[1] // 8) * _LABELS_PER_TOKEN), _IGNORED)
        for row_L, index in zip(labels_BL, chosen, strict=True):
            row_L[: len(self.labels[index])] = self.labels[index]
        return mel_BFM, frames_B, labels_BL


def speak(count: int, *key: int) -> Utterances:
    """Synthesize ``count`` utterances by different speakers; they depend only on the key."""
    spoken = [utterance(np.random.default_rng((*key, index))) for index in range(count)]
    spoken.sort(key=lambda one: len(one.samples))
    mels = [TinyAudio.log_mel(torch.from_numpy(one.samples)) for one in spoken]
    return Utterances(mels, [torch.from_numpy(one.labels) for one in spoken])


def disturb(mel_BFM: Tensor, draws: torch.Generator) -> Tensor:
    """Augment: a different recorder (tilt, noise), a different speaker (shifted bands), and masks as in SpecAugment.

    SpecAugment: Park et al. 2019, https://arxiv.org/abs/1904.08779. Values stay in the range of ``TinyAudio.log_mel``.
    """
    batch, frames, bands = mel_BFM.shape
    column_B = (batch, 1, 1)

    def curve(knots: int, scale: float) -> Tensor:
        return F.interpolate(scale * torch.randn((batch, 1, knots), generator=draws), size=bands, mode="linear")

    def gap(length: int, widest: int) -> Tensor:
        start_B = torch.randint(length, column_B, generator=draws)
        place = torch.arange(length)
        return (place >= start_B) & (place < start_B + torch.randint(widest, column_B, generator=draws))

    shifted_BM = torch.arange(bands) + torch.randint(-2, 3, (batch, 1), generator=draws)
    mel_BFM = mel_BFM.gather(2, shifted_BM.clamp(0, bands - 1)[:, None].expand(mel_BFM.shape)) + curve(6, 0.12)
    noise_BFM = torch.rand(column_B, generator=draws) - 1.2 + curve(4, 0.15)
    noise_BFM = noise_BFM + 0.1 * torch.randn(mel_BFM.shape, generator=draws)
    # Powers add up; if they differ a lot, the sum is close to the larger one.
    mel_BFM = torch.maximum(mel_BFM, noise_BFM).clamp(min=-1)
    gaps_BFM = gap(bands, 10) | gap(frames, 6).transpose(1, 2)
    return torch.where(gaps_BFM, mel_BFM.mean((1, 2), keepdim=True), mel_BFM)


class PhonemeHead(nn.Module):
    """An encoder with a linear head for the four phonemes of a token; the head is discarded afterwards."""

    def __init__(self, encoder: TinyAudio) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, _LABELS_PER_TOKEN * len(LABELS))

    def forward(self, mel_BFM: Tensor, frames_B: Tensor) -> Tensor:
        """Return logits_BLK, with L = 4 N."""
        logits_BNK: Tensor = self.head(self.encoder(mel_BFM, frames_B))
        return logits_BNK.reshape(len(logits_BNK), -1, len(LABELS))


def build_audio_encoder(folder: Path, seed: int, recipe: Recipe, console: Console | None = None) -> dict[str, float]:
    """Train the audio encoder; return the quality on unseen speakers."""
    started = time.perf_counter()
    heard, held_out = speak(recipe.training_items, seed, 0), speak(recipe.held_out_items, seed, 1)
    torch.manual_seed(seed)
    model = PhonemeHead(TinyAudio())
    draws = torch.Generator().manual_seed(seed)
    pool = min(_POOL * recipe.batch_size, recipe.training_items)

    def loss() -> Tensor:
        # The pool may start outside, so that the shortest and longest utterances are drawn as often as the others.
        start = int(torch.randint(-pool // 2, recipe.training_items - pool // 2, (), generator=draws))
        start = min(max(start, 0), recipe.training_items - pool)
        chosen_B = start + torch.randperm(pool, generator=draws)[: recipe.batch_size]
        mel_BFM, frames_B, labels_BL = heard.batch(chosen_B.tolist())
        logits_BLK = model(disturb(mel_BFM, draws), frames_B)
        return F.cross_entropy(logits_BLK.flatten(0, 1), labels_BL.flatten(), label_smoothing=_LABEL_SMOOTHING)

    log = train(model, loss, recipe, "audio encoder", console)
    quality = _quality(model, heard, held_out)
    model.encoder.save(folder)
    seconds = time.perf_counter() - started
    write_training(folder, model.encoder, seed=seed, recipe=recipe, quality=quality, log=log, seconds=seconds)
    return quality


@torch.no_grad()
def _quality(model: PhonemeHead, heard: Utterances, held_out: Utterances) -> dict[str, float]:
    """Accuracy of the phoneme per 20 ms, with and without silence, and that of the majority class."""
    mel_BFM, frames_B, labels_BL = held_out.batch(list(range(len(held_out.mels))))
    right_BL = model(mel_BFM, frames_B).argmax(-1) == labels_BL
    said_BL, sounds_BL = labels_BL != _IGNORED, labels_BL > 0
    known_L = torch.cat(heard.labels)
    commonest = known_L[known_L > 0].mode().values
    return {
        "phoneme_accuracy": right_BL[said_BL].double().mean().item(),
        "phoneme_without_silence_accuracy": right_BL[sounds_BL].double().mean().item(),
        "phoneme_without_silence_majority_accuracy": (labels_BL[sounds_BL] == commonest).double().mean().item(),
    }
