"""Evaluates a model: likelihood of references, with the right or with mismatched inputs, and generated texts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.core.errors import UserError
from harness.core.origin import during
from harness.experiment.sections import Evaluation
from harness.model.batch import Batch
from harness.model.batches import BatchMaker
from harness.model.budget import by_member
from harness.model.context_model import ContextModel
from harness.model.past import Past, Prefix
from harness.model.prefixes import Prefixes
from harness.model.shared_prefix import MOST_TARGETS, agrees, fits
from harness.model.workers import ALONE, Workers
from tasks.base import Example

logger = logging.getLogger(__name__)


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
class _Target:
    """One reference of an example."""

    example: int
    reference: int
    text: str


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on examples, batch by batch; its weights do not change as long as this lives.

    Several workers share the examples; all of them get all results.

    Attributes:
        model: in evaluation mode.
        batches: makes the batches.
        options: batch size (of each worker) and generation options.
        device: of the model.
        tick: called after every batch, for progress.
        workers: of the trial.
        shared_prefix: whether a prompt is read once for all texts that go on from it, where the model allows it; or at
            least once for the references of an example, which then share a row.
        synced: every worker takes part in every batch, also without a row of its own, because the model is spread over
            them (ZeRO-3).
    """

    model: ContextModel
    batches: BatchMaker
    options: Evaluation
    device: torch.device
    tick: Callable[[], None] = lambda: None
    workers: Workers = ALONE
    shared_prefix: bool = True
    synced: bool = False

    def likelihood(self, examples: Sequence[Example], shown: Sequence[Example] | None = None) -> Likelihood:
        """Compute the likelihood of all references of all examples.

        Args:
            examples: for their references.
            shown: for the inputs, one per example; None: each example's own inputs.
        """
        shown = examples if shown is None else shown
        if self._goes_on(examples, shown):
            return self._after_prompts(examples, shown)
        rows, most = self._rows(examples, shown)
        targets = [target for row in rows for target in row]
        starts = np.cumsum([0, *map(len, rows)])
        nll_P, tokens_P = np.zeros(len(targets)), np.zeros(len(targets), dtype=int)
        for own, chosen in self._shares(len(rows), max(1, self.options.per_device_eval_batch_size // most)):
            part = [rows[number] for number in chosen]
            with during("evaluation", dict.fromkeys(examples[row[0].example].id for row in part)):
                with self._without_gradients():
                    nll_B, tokens_B = (x.double().cpu().numpy() for x in self._score(part, shown))
                if self.workers.count == 1:
                    _check_finite(nll_B)
            if own:
                at = np.concatenate([np.arange(starts[number], starts[number + 1]) for number in own])
                nll_P[at], tokens_P[at] = nll_B, tokens_B.astype(int)
            self.tick()
        return self._summed(nll_P, tokens_P, targets, examples)

    @cached_property
    def _prefixes(self) -> Prefixes:
        return Prefixes(self.model, self.batches, self.device, self.options.per_device_eval_batch_size)

    def _goes_on(self, examples: Sequence[Example], shown: Sequence[Example]) -> bool:
        """Whether texts go on from cached prompts; found out with two examples, and told where they do not."""
        if not self.shared_prefix or self.synced or not examples or self.batches.writes_turns:
            return False
        if self.model.goes_on is None:
            from harness.model.decoding import has_plain_cache  # imports transformers' generation: a second

            self.model.goes_on = has_plain_cache(self.model.language_model) and self._tried(examples, shown)
        return self.model.goes_on

    def _tried(self, examples: Sequence[Example], shown: Sequence[Example]) -> bool:
        targets = [_Target(i, 0, examples[i].references[0]) for i in dict.fromkeys((0, len(examples) - 1))]
        own = [shown[target.example] for target in targets]
        reason = "it gives other likelihoods"
        with during("evaluation", (examples[target.example].id for target in targets)), self._without_gradients():
            alone_P = self._score_alone([targets], shown)[0]
            try:
                found_P = self._score_after(targets, own, Prefixes(self.model, self.batches, self.device, 2).of(own))[0]
                if agrees(found_P, alone_P, self.model.language_model.dtype):
                    return True
            except (TypeError, ValueError, RuntimeError, UserError) as error:
                reason = str(error)
        logger.info("prompts are read again for every text: %s", reason)
        return False

    def _after_prompts(self, examples: Sequence[Example], shown: Sequence[Example]) -> Likelihood:
        """The likelihoods of references that go on from cached prompts; each worker has its share of the examples."""
        starts = np.cumsum([0, *(len(example.references) for example in examples)])
        targets = [_Target(i, n, text) for i, one in enumerate(examples) for n, text in enumerate(one.references)]
        nll_P, tokens_P = np.zeros(len(targets)), np.zeros(len(targets), dtype=int)
        order = sorted(range(len(examples)), key=lambda i: self.batches.prompt_length(shown[i]))
        own = list(self.workers.share(order))
        size = self.options.per_device_eval_batch_size
        while own:
            at_once = self._prefixes.at_once
            block, own = own[:at_once], own[at_once:]
            with during("evaluation", (examples[i].id for i in block)), self._without_gradients():
                prefixes = dict(zip(block, self._prefixes.of([shown[i] for i in block]), strict=True))
            places = [p for i in block for p in range(starts[i], starts[i + 1])]
            places.sort(key=lambda p: self.batches.target_length(targets[p].text))  # padding is computed too
            for first in range(0, len(places), size):
                at = places[first : first + size]
                part = [targets[p] for p in at]
                with during("evaluation", dict.fromkeys(examples[target.example].id for target in part)):
                    with self._without_gradients():
                        inputs = [shown[target.example] for target in part]
                        scores = self._score_after(part, inputs, [prefixes[target.example] for target in part])
                        nll_B, tokens_B = (x.double().cpu().numpy() for x in scores)
                    if self.workers.count == 1:
                        _check_finite(nll_B)
                nll_P[at], tokens_P[at] = nll_B, tokens_B.astype(int)
                self.tick()
        return self._summed(nll_P, tokens_P, targets, examples)

    def _score_after(
        self, targets: Sequence[_Target], shown: Sequence[Example], prefixes: Sequence[Prefix]
    ) -> tuple[Tensor, Tensor]:
        """NLL and number of tokens of targets, each after its prompt."""
        past = self._past(shown, prefixes)
        batch = self.batches.going_on(shown, [target.text for target in targets], past)
        scores: tuple[Tensor, Tensor] = self.model(batch.to(self.device), past)
        return scores

    def _past(self, examples: Sequence[Example], prefixes: Sequence[Prefix]) -> Past:
        padding = self.batches.contexts.index(self.batches.target_context(examples[0]))
        return Past(prefixes, again=True, padding=padding)

    def _summed(
        self, nll_P: np.ndarray, tokens_P: np.ndarray, targets: Sequence[_Target], examples: Sequence[Example]
    ) -> Likelihood:
        """What all workers have found together, by example."""
        nll_P, tokens_P = self.workers.sum(nll_P), self.workers.sum(tokens_P)
        wrong = dict.fromkeys(examples[targets[int(p)].example].id for p in np.flatnonzero(~np.isfinite(nll_P)))
        with during("evaluation", wrong):
            _check_finite(nll_P)
        return _by_example(nll_P, tokens_P, targets, len(examples))

    def _rows(self, examples: Sequence[Example], shown: Sequence[Example]) -> tuple[list[list[_Target]], int]:
        """The references that share a row, rows of similar lengths beside each other, and the most in one row."""
        most = min(MOST_TARGETS, self.options.per_device_eval_batch_size)
        most = most if self.shared_prefix and not self.synced else 1
        rows = [
            [_Target(i, n, example.references[n]) for n in range(start, min(start + most, len(example.references)))]
            for i, example in enumerate(examples)
            for start in range(0, len(example.references), most)
        ]
        prompts = [self.batches.prompt_length(example) for example in shown]
        rows.sort(key=lambda row: prompts[row[0].example] + sum(self.batches.target_length(t.text) for t in row))
        return rows, max(map(len, rows), default=1)

    def _score(self, rows: Sequence[Sequence[_Target]], shown: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """NLL and number of tokens of all targets of some rows, which are split up where the model cannot share."""
        if all(len(row) == 1 for row in rows) or self.model.shares_prefixes is False:
            return self._score_alone(rows, shown)
        batch = self._shared(rows, shown)
        if not fits(self.model.language_model.config, batch.length):
            return self._score_alone(rows, shown)
        if self.model.shares_prefixes is None:
            several = [row for row in rows if len(row) > 1]
            self.model.shares_prefixes = self._agrees([several[0], *several[1:][-1:]], shown)
            return self._score(rows, shown)
        shared: tuple[Tensor, Tensor] = self.model(batch.to(self.device))
        return shared

    def _shared(self, rows: Sequence[Sequence[_Target]], shown: Sequence[Example]) -> Batch:
        return self.batches.make_shared([[(shown[target.example], target.text) for target in row] for row in rows])

    def _agrees(self, rows: Sequence[Sequence[_Target]], shown: Sequence[Example]) -> bool:
        """Whether the language model and its adapters score these shared rows as they score rows of one target."""
        alone_P = self._score_alone(rows, shown)[0]
        reason = "shared rows give other likelihoods"
        try:
            shared_P = self.model(self._shared(rows, shown).to(self.device))[0]
            if agrees(shared_P, alone_P, self.model.language_model.dtype):
                return True
        except (TypeError, ValueError, RuntimeError, UserError) as error:  # no position_ids, or no mask of its own
            reason = str(error)
        logger.info("references are scored in rows of their own: %s", reason)
        return False

    def _score_alone(self, rows: Sequence[Sequence[_Target]], shown: Sequence[Example]) -> tuple[Tensor, Tensor]:
        targets = [target for row in rows for target in row]
        batch = self.batches.make([shown[target.example] for target in targets], [target.text for target in targets])
        scores: tuple[Tensor, Tensor] = self.model(batch.to(self.device))
        return scores

    def _without_gradients(self) -> AbstractContextManager[Any]:
        """Parameters that ZeRO-3 gathers in inference mode could not be trained afterwards."""
        return torch.no_grad() if self.synced else torch.inference_mode()

    def _shares(self, count: int, rows: int) -> Iterator[tuple[list[int], list[int]]]:
        """For every batch that this worker computes, of up to ``rows`` of ``count``: its rows, and what to compute.

        They differ where a worker without a row must take part: there it computes the first row, for nobody.
        """
        size = rows * self.workers.count
        for start in range(0, count, size):
            own = list(self.workers.share(range(start, min(start + size, count))))
            if own or self.synced:
                yield own, own or [start]

    def _decodes(self) -> bool:
        from harness.model.decoding import decodes  # imports transformers' generation: a second

        return decodes(self.model.language_model)

    def generate(self, examples: Sequence[Example]) -> dict[str, str]:
        """Generate a text for every example, by greedy or beam search; returns texts by example id."""
        predictions: dict[str, str] = {}
        options, eos_id = self.options, self.batches.language_model.eos_id
        after = options.num_beams == 1 and self._goes_on(examples, examples) and self._decodes()
        by_target: dict[str, list[Example]] = {}
        for example in examples:  # generated tokens of a batch belong to one context
            by_target.setdefault(self.batches.target_context(example), []).append(example)
        for target, group in by_target.items():
            group.sort(key=self.batches.prompt_length)  # padding is computed too
            for own, rows in self._shares(len(group), options.per_device_eval_batch_size):
                part = [group[row] for row in rows]
                with during("generation", (example.id for example in part)):
                    if after:
                        past = self._past(part, self._prefixes.of(part))
                        ids_BT = self.model.generate_after(past, target, options.max_new_tokens, eos_id)
                    else:
                        prompt = self.batches.prompts(part).to(self.device)
                        ids_BT = self.model.generate(
                            prompt, target, options.max_new_tokens, eos_id, options.num_beams, self.synced
                        )
                if own:
                    texts = self.batches.decode(ids_BT)
                    predictions.update(zip([example.id for example in part], texts, strict=True))
                self.tick()
        for found in self.workers.gather(predictions):
            predictions |= found
        return {example.id: predictions[example.id] for example in examples}


def _by_example(nll_P: np.ndarray, tokens_P: np.ndarray, targets: Sequence[_Target], examples: int) -> Likelihood:
    """Sum over the references of each example."""
    nll, tokens, first_nll, first_tokens = (np.zeros(examples, dtype) for dtype in (float, int, float, int))
    rows = [target.example for target in targets]
    np.add.at(nll, rows, nll_P)
    np.add.at(tokens, rows, tokens_P)
    for p, target in enumerate(targets):
        if target.reference == 0:
            first_nll[target.example], first_tokens[target.example] = nll_P[p], tokens_P[p]
    return Likelihood(nll, tokens, first_nll, first_tokens)
