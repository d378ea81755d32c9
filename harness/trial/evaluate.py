"""Evaluates a model: likelihood of references, with the right or with mismatched inputs, and generated texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.core.origin import during
from harness.experiment.sections import Evaluation
from harness.model.batches import BatchMaker
from harness.model.budget import by_member
from harness.model.context_model import ContextModel
from tasks.base import Example


@dataclass(frozen=True)
class Likelihood:
    """Negative log likelihood of every example, summed over its references, and their number of tokens."""

    nll: np.ndarray  # (examples,), nats
    tokens: np.ndarray  # (examples,)
    first_nll: np.ndarray  # (examples,), nats; of the first reference only
    first_tokens: np.ndarray  # (examples,)

    @property
    def perplexity(self) -> float:
        """Token-weighted perplexity over all examples and references: exp(Σ nll / Σ tokens).

        Raises:
            FloatingPointError: it is not finite.
        """
        return _perplexity(self.nll, self.tokens)

    @property
    def perplexity_one_reference(self) -> float | None:
        """Perplexity over the first reference of every example; None if no example has several references."""
        if (self.first_tokens == self.tokens).all():
            return None
        return _perplexity(self.first_nll, self.first_tokens)

    def of(self, indices: Sequence[int]) -> Likelihood:
        """The likelihood of a subset of the examples."""
        part = list(indices)
        return Likelihood(self.nll[part], self.tokens[part], self.first_nll[part], self.first_tokens[part])


def _perplexity(nll: np.ndarray, tokens: np.ndarray) -> float:
    mean = float(nll.sum() / tokens.sum())
    if not math.isfinite(mean) or mean > math.log(np.finfo(np.float64).max):
        raise FloatingPointError(f"perplexity is not finite (mean NLL {mean}); a lower learning_rate may help")
    return math.exp(mean)


def _check_finite(nll_B: np.ndarray) -> None:
    if not np.isfinite(nll_B).all():
        value = nll_B[~np.isfinite(nll_B)][0]
        raise FloatingPointError(f"perplexity is not finite (an NLL is {value}); a lower learning_rate may help")


def mismatched(examples: Sequence[Example], seed: int) -> list[Example] | None:
    """Pair every example with another one, whose inputs are used for its references.

    The examples are shuffled by seed and shifted by one, so that every input is used exactly once and never for its own
    references; in a mixture, within each task.

    Args:
        examples: of a split.
        seed: of the shuffle.

    Returns:
        For each example, the one whose inputs it gets; None if a task has only one example.
    """
    others: list[Example] = list(examples)
    for indices in by_member(examples).values():
        if len(indices) < 2:
            return None
        order = np.random.Generator(np.random.Philox(key=[seed, len(indices)])).permutation(len(indices))
        for place, source in zip(order, np.roll(order, 1), strict=True):
            others[indices[place]] = examples[indices[source]]
    return others


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on examples, batch by batch.

    Attributes:
        model: in evaluation mode.
        batches: makes the batches.
        options: batch size and generation options.
        device: of the model.
        tick: called after every batch, for progress.
    """

    model: ContextModel
    batches: BatchMaker
    options: Evaluation
    device: torch.device
    tick: Callable[[], None] = lambda: None

    @torch.inference_mode()
    def likelihood(self, examples: Sequence[Example], shown: Sequence[Example] | None = None) -> Likelihood:
        """Compute the likelihood of all references of all examples.

        Args:
            examples: for their references.
            shown: for the inputs, one per example; None: each example's own inputs.
        """
        pairs = [(i, n, text) for i, example in enumerate(examples) for n, text in enumerate(example.references)]
        pairs.sort(key=lambda pair: self.batches.target_length(pair[2]))  # by length: less padding
        shown, size = examples if shown is None else shown, self.options.per_device_eval_batch_size
        nll, tokens, first_nll, first_tokens = (np.zeros(len(examples), dtype) for dtype in (float, int, float, int))
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            rows = [i for i, _, _ in part]
            with during("evaluation", dict.fromkeys(examples[i].id for i in rows)):
                batch = self.batches.make([shown[i] for i in rows], [text for _, _, text in part])
                nll_B, tokens_B = (x.double().cpu().numpy() for x in self.model(batch.to(self.device)))
                _check_finite(nll_B)
            np.add.at(nll, rows, nll_B)
            np.add.at(tokens, rows, tokens_B.astype(int))
            firsts = [(row, i) for row, (i, n, _) in enumerate(part) if n == 0]
            for row, i in firsts:
                first_nll[i], first_tokens[i] = nll_B[row], int(tokens_B[row])
            self.tick()
        return Likelihood(nll, tokens, first_nll, first_tokens)

    def generate(self, examples: Sequence[Example]) -> dict[str, str]:
        """Generate a text for every example, by greedy or beam search; returns texts by example id."""
        predictions: dict[str, str] = {}
        size, options = self.options.per_device_eval_batch_size, self.options
        by_target: dict[str, list[Example]] = {}
        for example in examples:  # generated tokens of a batch belong to one context
            by_target.setdefault(self.batches.target_context(example), []).append(example)
        for target, group in by_target.items():
            for start in range(0, len(group), size):
                part = group[start : start + size]
                eos_id = self.batches.language_model.eos_id
                with during("generation", (example.id for example in part)):
                    prompt = self.batches.prompts(part).to(self.device)
                    ids_BT = self.model.generate(prompt, target, options.max_new_tokens, eos_id, options.num_beams)
                predictions.update(zip([example.id for example in part], self.batches.decode(ids_BT), strict=True))
                self.tick()
        return {example.id: predictions[example.id] for example in examples}
