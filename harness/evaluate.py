"""What a model is judged by: perplexity over all references, over one, with the wrong inputs; generated texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.batches import BatchMaker
from harness.budget import by_member
from harness.model import ContextModel
from tasks.base import Example

Tick = Callable[[], None]  # called after every batch, for progress


@dataclass(frozen=True)
class Likelihood:
    """Negative log likelihood of every example, summed over its references, and the tokens it is summed over."""

    nll: np.ndarray  # (examples,), nats
    tokens: np.ndarray  # (examples,)
    first_nll: np.ndarray  # (examples,): of the first reference alone
    first_tokens: np.ndarray

    @property
    def perplexity(self) -> float:
        """Token-weighted over all examples and references: exp(Σ nll / Σ tokens).

        Raises:
            FloatingPointError: it is not a finite number.
        """
        return _perplexity(self.nll, self.tokens)

    @property
    def perplexity_one_reference(self) -> float | None:
        """The same over the first reference of every example; None where no example has another one."""
        if (self.first_tokens == self.tokens).all():
            return None
        return _perplexity(self.first_nll, self.first_tokens)

    def of(self, indices: Sequence[int]) -> Likelihood:
        """Of some of the examples."""
        part = list(indices)
        return Likelihood(self.nll[part], self.tokens[part], self.first_nll[part], self.first_tokens[part])


def _perplexity(nll: np.ndarray, tokens: np.ndarray) -> float:
    mean = float(nll.sum() / tokens.sum())
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
    pairs = [(i, n, text) for i, example in enumerate(examples) for n, text in enumerate(example.references)]
    pairs.sort(key=lambda pair: batches.target_length(pair[2]))  # targets of like length: little padding
    shown = examples if shown is None else shown
    nll, tokens, first_nll, first_tokens = (np.zeros(len(examples), dtype) for dtype in (float, int, float, int))
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        batch = batches.make([shown[i] for i, _, _ in part], [text for _, _, text in part])
        nll_B, tokens_B = (x.double().cpu().numpy() for x in model(batch.to(device)))
        rows = [i for i, _, _ in part]
        np.add.at(nll, rows, nll_B)
        np.add.at(tokens, rows, tokens_B.astype(int))
        firsts = [(row, i) for row, (i, n, _) in enumerate(part) if n == 0]
        for row, i in firsts:
            first_nll[i], first_tokens[i] = nll_B[row], int(tokens_B[row])
        tick()
    return Likelihood(nll, tokens, first_nll, first_tokens)


def exchanged(examples: Sequence[Example], seed: int) -> list[Example] | None:
    """For every example another one, whose inputs will stand before its references; none keeps its own.

    The order is shuffled by seed and turned by one, so every input is used exactly once; in a mixture within each of
    its tasks. None where a task has a single example.
    """
    others: list[Example] = list(examples)
    for indices in by_member(examples).values():
        if len(indices) < 2:
            return None
        order = np.random.Generator(np.random.Philox(key=[seed, len(indices)])).permutation(len(indices))
        for place, source in zip(order, np.roll(order, 1), strict=True):
            others[indices[place]] = examples[indices[source]]
    return others


def generate(
    model: ContextModel,
    batches: BatchMaker,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
    num_beams: int,
    device: torch.device,
    tick: Tick,
) -> dict[str, str]:
    """Texts by example id, greedy or by beam search; a batch's prompts may be of any length."""
    predictions: dict[str, str] = {}
    by_target: dict[str, list[Example]] = {}
    for example in examples:  # what is written in one batch is of one context
        by_target.setdefault(batches.target_context(example), []).append(example)
    for target, group in by_target.items():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            prompt = batches.prompts(part).to(device)
            ids_BT = model.generate(prompt, target, max_new_tokens, batches.language_model.eos_id, num_beams)
            predictions.update(zip([example.id for example in part], batches.decode(ids_BT), strict=True))
            tick()
    return {example.id: predictions[example.id] for example in examples}
