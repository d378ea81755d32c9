"""Pre-training of the built-in backbones (``harness backbones build``); docs/backbones.md reports the results.

A byte-level BPE tokenizer and a tiny Llama, pre-trained on generated text without captions, and a TinyVision encoder,
pre-trained to classify the objects in each cell of pictures from the training split of ``scenes``.

Shapes: B documents or pictures, T text tokens, N image tokens, D features, K classes.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.core.errors import UserError
from harness.pretraining import loop
from harness.pretraining.audio import AUDIO_ENCODER, AUDIO_ENCODER_RECIPE, build_audio_encoder
from harness.pretraining.loop import Recipe, write_training
from harness.pretraining.text import documents
from tasks.base import Split
from tasks.drawing.scene import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    DIAMETERS,
    IMAGE_SIZE,
    SHAPES,
    draw_scene,
    generator,
    paint,
    place,
)
from tasks.modalities.encoders.tiny_vision import TinyVision

LANGUAGE_MODEL = "tiny-llama"
ENCODER = "tiny-vision"

_GRID = 4  # the encoder's tokens are a grid of 4 × 4
_IGNORED = -100  # cross_entropy's default ignore_index


LANGUAGE_MODEL_RECIPE = Recipe(3500, 16, 3e-3, training_items=60_000, held_out_items=1_000)
ENCODER_RECIPE = Recipe(5000, 64, 2e-3, training_items=40_000, held_out_items=1_000)
_VOCABULARY_SIZE = 1024
_CONTEXT_TOKENS = 128  # training length; the model has more positions
_CELL_CLASSES = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(DIAMETERS), "count": len(COUNTS)}
_PICTURE_CLASSES = {"background": len(BACKGROUNDS), "groups": 3}


def build(
    output: Path,
    seed: int = 0,
    language_model_recipe: Recipe = LANGUAGE_MODEL_RECIPE,
    encoder_recipe: Recipe = ENCODER_RECIPE,
    audio_recipe: Recipe = AUDIO_ENCODER_RECIPE,
    console: Console | None = None,
) -> None:
    """Train the built-in backbones into ``output/tiny-llama``, ``output/tiny-vision`` and ``output/tiny-audio``.

    docs/backbones.md gives times and quality.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: could not be created: {error}") from error
    build_language_model(output / LANGUAGE_MODEL, seed, language_model_recipe, console)
    build_encoder(output / ENCODER, seed, encoder_recipe, console)
    build_audio_encoder(output / AUDIO_ENCODER, seed, audio_recipe, console)


def build_language_model(folder: Path, seed: int, recipe: Recipe, console: Console | None = None) -> dict[str, float]:
    """Train tokenizer and language model; return the quality on held-out text."""
    started = time.perf_counter()
    texts = list(itertools.islice(documents(generator("pretrain", seed, "text")), recipe.training_items))
    held_out = list(itertools.islice(documents(generator("pretrain", seed, "held out")), recipe.held_out_items))
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    stream_T, held_out_T = token_stream(tokenizer, texts), token_stream(tokenizer, held_out)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    draws = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        starts_B1 = torch.randint(len(stream_T) - _CONTEXT_TOKENS, (recipe.batch_size, 1), generator=draws)
        return _next_token_loss(model, stream_T[starts_B1 + torch.arange(_CONTEXT_TOKENS + 1)])

    log = loop.train(model, loss, recipe, "language model", console)
    quality = {
        "held_out_perplexity": perplexity(model, held_out_T),
        "held_out_unigram_perplexity": _unigram_perplexity(stream_T, held_out_T, len(tokenizer)),
    }
    model.save_pretrained(folder)
    seconds = time.perf_counter() - started
    write_training(folder, model, seed=seed, recipe=recipe, quality=quality, log=log, seconds=seconds)
    return quality


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which encodes every text losslessly. It does not add special tokens by itself."""
    specials = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_SIZE,
        special_tokens=list(specials.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # Cleaning up would turn " ." into ".", but decoding must be lossless.
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **specials)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """The concatenated token ids of all documents, each between BOS and EOS."""
    ids: list[int] = []
    for document in tokenizer(texts)["input_ids"]:
        ids += [tokenizer.bos_token_id, *document, tokenizer.eos_token_id]
    return torch.tensor(ids)


def _next_token_loss(model: nn.Module, ids_BT: Tensor) -> Tensor:
    logits_BTK = model(input_ids=ids_BT[:, :-1]).logits
    return F.cross_entropy(logits_BTK.flatten(0, 1), ids_BT[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, stream_T: Tensor) -> float:
    """Perplexity over a stream of documents cut into windows of the training length."""
    windows_BT = stream_T[: len(stream_T) // _CONTEXT_TOKENS * _CONTEXT_TOKENS].view(-1, _CONTEXT_TOKENS)
    losses = [_next_token_loss(model, ids_BT).item() * len(ids_BT) for ids_BT in torch.split(windows_BT, 64)]
    return math.exp(sum(losses) / len(windows_BT))


def _unigram_perplexity(train_T: Tensor, held_out_T: Tensor, vocabulary_size: int) -> float:
    """Perplexity of a unigram model with add-one smoothing."""
    counts_K = torch.bincount(train_T, minlength=vocabulary_size).double() + 1
    return math.exp(-(counts_K / counts_K.sum()).log()[held_out_T].mean().item())


@dataclass(frozen=True)
class Pictures:
    """Pictures with their targets: per cell (token), and per picture."""

    pixels: Tensor  # (B, H, W, C), uint8
    cells: dict[str, Tensor]  # (B, N); "shape" is 0 in cells without an object centre; the others are ignored there
    pictures: dict[str, Tensor]  # (B,)


def draw_pictures(count: int, split: Split, *key: object) -> Pictures:
    """Draw scenes of a split, with their attributes as targets."""
    pixels_BHWC = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    cells_BN = {name: np.full((count, _GRID * _GRID), _IGNORED) for name in _CELL_CLASSES}
    cells_BN["shape"][:] = 0
    pictures_B = {name: np.empty(count, dtype=np.int64) for name in _PICTURE_CLASSES}
    for index in range(count):
        rng = generator(*key, index)
        scene = draw_scene(rng, split)
        objects = place(scene, rng)
        pixels_BHWC[index] = np.asarray(paint(scene, objects, rng))
        pictures_B["background"][index] = BACKGROUNDS.index(scene.background)
        pictures_B["groups"][index] = len(scene.groups) - 1
        for placed in objects:
            x, y = (int(coordinate * _GRID / IMAGE_SIZE) for coordinate in placed.centre)
            cell = (index, y * _GRID + x)
            cells_BN["shape"][cell] = 1 + SHAPES.index(placed.group.shape)
            cells_BN["colour"][cell] = tuple(COLOURS).index(placed.group.colour)
            cells_BN["size"][cell] = tuple(DIAMETERS).index(placed.group.size)
            cells_BN["count"][cell] = COUNTS.index(placed.group.count)
    tensors = ({name: torch.from_numpy(array) for name, array in part.items()} for part in (cells_BN, pictures_B))
    return Pictures(torch.from_numpy(pixels_BHWC), *tensors)


class AttributeHeads(nn.Module):
    """An encoder with linear classification heads, which are discarded after pre-training."""

    def __init__(self, encoder: TinyVision) -> None:
        super().__init__()
        self.encoder = encoder
        classes = _CELL_CLASSES | _PICTURE_CLASSES
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.width, number) for name, number in classes.items()})

    def forward(self, pixels_BHWC: Tensor) -> dict[str, Tensor]:
        """Return logits by attribute: (B, N, K) of cells, (B, K) of pictures."""
        features_BND = self.encoder(pixels_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1)
        features_BD = features_BND.mean(1)
        return {name: head(features_BND if name in _CELL_CLASSES else features_BD) for name, head in self.heads.items()}


def build_encoder(folder: Path, seed: int, recipe: Recipe, console: Console | None = None) -> dict[str, float]:
    """Train the vision encoder; return the quality on pictures of unseen scenes (the validation split)."""
    started = time.perf_counter()
    train = draw_pictures(recipe.training_items, "train", "pretrain", seed, "pictures")
    held_out = draw_pictures(recipe.held_out_items, "validation", "pretrain", seed, "held out")
    torch.manual_seed(seed)
    model = AttributeHeads(TinyVision())
    draws = torch.Generator().manual_seed(seed)
    targets = train.cells | train.pictures

    def loss() -> Tensor:
        chosen_B = torch.randint(len(train.pixels), (recipe.batch_size,), generator=draws)
        logits = model(train.pixels[chosen_B])
        losses = [
            F.cross_entropy(logits[name].flatten(0, -2), targets[name][chosen_B].flatten(), ignore_index=_IGNORED)
            for name in targets
        ]
        return torch.stack(losses).sum()

    log = loop.train(model, loss, recipe, "vision encoder", console)
    quality = _attribute_accuracy(model, train, held_out)
    model.encoder.save(folder)
    seconds = time.perf_counter() - started
    write_training(folder, model.encoder, seed=seed, recipe=recipe, quality=quality, log=log, seconds=seconds)
    return quality


@torch.no_grad()
def _attribute_accuracy(model: AttributeHeads, train: Pictures, held_out: Pictures) -> dict[str, float]:
    """Accuracy by attribute, and that of the training majority class; only cells with an object are counted."""
    parts = [model(pixels_BHWC) for pixels_BHWC in torch.split(held_out.pixels, 256)]
    known = train.cells | train.pictures
    quality = {}
    for name, targets in (held_out.cells | held_out.pictures).items():
        predicted = torch.cat([part[name] for part in parts]).argmax(-1)
        if name in _CELL_CLASSES:
            counts, commonest = held_out.cells["shape"] > 0, known[name][train.cells["shape"] > 0].mode().values
        else:
            counts, commonest = torch.ones_like(targets, dtype=torch.bool), known[name].mode().values
        quality[f"{name}_accuracy"] = (predicted == targets)[counts].double().mean().item()
        quality[f"{name}_majority_accuracy"] = (targets[counts] == commonest).double().mean().item()
    return quality
