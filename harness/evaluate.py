"""What a model is judged by: perplexity over all references, the same with the wrong inputs, generated texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.batches import BatchMaker
from harness.model import ContextModel
from tasks.base import Example

Tick = Callable[[], None]  # called after every batch, for progress


@dataclass(frozen=True)
class Likelihood:
    """Negative log likelihood of every example, summed over its references, and the tokens it is summed over."""

    nll: np.ndarray  # (examples,), nats
    tokens: np.ndarray  # (examples,)

    @property
    def perplexity(self) -> float:
        """Token-weighted over all examples and references: exp(Σ nll / Σ tokens).

        Raises:
            FloatingPointError: it is not a finite number.
        """
        mean = float(self.nll.sum() / self.tokens.sum())
        if not math.isfinite(mean) or mean > math.log(np.finfo(np.float64).max):
            raise FloatingPointError(f"perplexity is not finite (mean NLL {mean}); a lower learning_rate may help")
        return math.exp(mean)


@torch.inference_mode()
def likelihood(
    model: ContextModel,
    batches: BatchMaker,
    examples: Sequence[Example],
    batch_size: int,
    device: torch.device,
    tick: Tick,
    shown: Sequence[Example] | None = None,
) -> Likelihood:
    """Score every reference of every example.

    Args:
        model: put into evaluation mode by the caller.
        batches: makes the batches.
        examples: whose references are scored.
        batch_size: references per batch.
        device: of the model.
        tick: called after each batch.
        shown: whose inputs stand before them, one per example; by default each example's own.
    """
    pairs = [(index, text) for index, example in enumerate(examples) for text in example.references]
    pairs.sort(key=lambda pair: batches.target_length(pair[1]))  # targets of like length: little padding
    shown = examples if shown is None else shown
    nll, tokens = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        batch = batches.make([shown[index] for index, _ in part], [text for _, text in part])
        nll_B, tokens_B = model(batch.to(device))
        rows = [index for index, _ in part]
        np.add.at(nll, rows, nll_B.double().cpu().numpy())
        np.add.at(tokens, rows, tokens_B.cpu().numpy())
        tick()
    return Likelihood(nll, tokens)


def exchanged(examples: Sequence[Example], seed: int) -> list[Example] | None:
    """For every example another one, whose inputs will stand before its references; none keeps its own.

    The order is shuffled by seed and turned by one, so every input is used exactly once. None for a single example.
    """
    if len(examples) < 2:
        return None
    order = np.random.Generator(np.random.Philox(key=[seed, len(examples)])).permutation(len(examples))
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)
    return [examples[index] for index in other]


def generate(
    model: ContextModel,
    batches: BatchMaker,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
    device: torch.device,
    tick: Tick,
) -> dict[str, str]:
    """Greedy texts by example id."""
    predictions: dict[str, str] = {}
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        features = {context: x.to(device) for context, x in batches.features.of(part).items()}
        ids_BT = model.generate(features, max_new_tokens, batches.language_model.eos_id)
        predictions.update(zip([example.id for example in part], batches.decode(ids_BT), strict=True))
        tick()
    return predictions
