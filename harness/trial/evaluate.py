"""What a model is judged by: perplexity over all references, over one, with the wrong inputs; generated texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.experiment.sections import Evaluation
from harness.model.batches import BatchMaker
from harness.model.budget import by_member
from harness.model.context_model import ContextModel
from tasks.base import Example


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


@dataclass(frozen=True)
class Evaluator:
    """Scores examples with a model, batch by batch.

    Attributes:
        model: put into evaluation mode by the caller.
        batches: makes the batches.
        options: batch size, and how texts are generated.
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
        """Score every reference of every example.

        Args:
            examples: whose references are scored.
            shown: whose inputs stand before them, one per example; None: each example's own.
        """
        pairs = [(i, n, text) for i, example in enumerate(examples) for n, text in enumerate(example.references)]
        pairs.sort(key=lambda pair: self.batches.target_length(pair[2]))  # targets of like length: little padding
        shown, size = examples if shown is None else shown, self.options.per_device_eval_batch_size
        nll, tokens, first_nll, first_tokens = (np.zeros(len(examples), dtype) for dtype in (float, int, float, int))
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            batch = self.batches.make([shown[i] for i, _, _ in part], [text for _, _, text in part])
            nll_B, tokens_B = (x.double().cpu().numpy() for x in self.model(batch.to(self.device)))
            rows = [i for i, _, _ in part]
            np.add.at(nll, rows, nll_B)
            np.add.at(tokens, rows, tokens_B.astype(int))
            firsts = [(row, i) for row, (i, n, _) in enumerate(part) if n == 0]
            for row, i in firsts:
                first_nll[i], first_tokens[i] = nll_B[row], int(tokens_B[row])
            self.tick()
        return Likelihood(nll, tokens, first_nll, first_tokens)

    def generate(self, examples: Sequence[Example]) -> dict[str, str]:
        """Texts by example id, greedy or by beam search; a batch's prompts may be of any length."""
        predictions: dict[str, str] = {}
        size, options = self.options.per_device_eval_batch_size, self.options
        by_target: dict[str, list[Example]] = {}
        for example in examples:  # what is written in one batch is of one context
            by_target.setdefault(self.batches.target_context(example), []).append(example)
        for target, group in by_target.items():
            for start in range(0, len(group), size):
                part = group[start : start + size]
                prompt = self.batches.prompts(part).to(self.device)
                eos_id = self.batches.language_model.eos_id
                ids_BT = self.model.generate(prompt, target, options.max_new_tokens, eos_id, options.num_beams)
                predictions.update(zip([example.id for example in part], self.batches.decode(ids_BT), strict=True))
                self.tick()
        return {example.id: predictions[example.id] for example in examples}
