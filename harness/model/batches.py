"""Makes batches of examples: the features of their files and the token ids of their texts, in padded rows.

Shapes: B rows, T positions, N tokens of an item, M feature vectors of all items, P positions of all items, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.core.contexts import Segment
from harness.core.errors import UserError
from harness.experiment.sections import Backbone, Budget
from harness.model.backbones import LanguageModel
from harness.model.batch import Batch, Items, Targets
from harness.model.checks import check_ids
from harness.model.features import Features
from harness.model.frame import frame_of
from harness.model.shared_prefix import arranged
from tasks.base import Example


@dataclass(frozen=True)
class _Chunk:
    """Consecutive positions of one row: a text, or the tokens of one encoded file."""

    context: str
    length: int
    token_ids: Sequence[int] = ()
    features_ND: Tensor | None = None
    is_target: bool = False


def text_key(text: str) -> int:
    """A number of 64 bits for a text: what a checkpoint keeps of those that were truncated."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True)


class BatchMaker:
    """Makes batches of one task for one backbone.

    Args:
        features: of the examples' files, with their task.
        language_model: for its tokenizer.
        budget: for ``max_target_length`` and ``max_input_length``. Longer texts are truncated, and collected in
            ``cut_targets`` and ``cut_inputs``, by their keys.
        backbone: for ``projector_boundary_tokens`` and ``add_prefix_space``.
    """

    def __init__(
        self, features: Features, language_model: LanguageModel, budget: Budget, backbone: Backbone | None = None
    ) -> None:
        self.features, self.language_model, self.budget = features, language_model, budget
        self.backbone = backbone or Backbone()
        self.contexts = features.task.contexts
        self._frame = frame_of(language_model.tokenizer, self.backbone)
        self._max_positions = language_model.max_positions
        self.cut_targets: set[int] = set()
        self.cut_inputs: set[int] = set()
        # Read here, because ZeRO-3 partitions the table later.
        self._vocabulary = int(language_model.model.get_input_embeddings().num_embeddings)

    def make(self, examples: Sequence[Example], texts: Sequence[str], views: Sequence[int] | None = None) -> Batch:
        """A batch with one row per example, its inputs followed by a target, padded on the right.

        Args:
            examples: for their inputs.
            texts: the target of each row.
            views: for training, the seed of each example's augmentation.
        """
        rows = []
        for example, row, text in zip(examples, self._inputs(examples, views), texts, strict=True):
            target = self._target(text)
            rows.append([*row, _Chunk(self.target_context(example), len(target), target, is_target=True)])
        return self._pad(rows, [self.target_context(example) for example in examples], left=False)

    def make_shared(self, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> Batch:
        """A batch with one row per example: its inputs once, followed by several targets that do not see each other.

        Args:
            examples: for their inputs.
            texts: the targets of each row.
        """
        rows, prefixes = self._inputs(examples, None), []
        targets = [[self._target(text) for text in own] for own in texts]
        for example, row, own in zip(examples, rows, targets, strict=True):
            prefixes.append(sum(chunk.length for chunk in row))
            inputs = [token for target in own for token in target[:-1]]  # the last token of each is only a target
            row.append(_Chunk(self.target_context(example), len(inputs), inputs, is_target=True))
        padded = self._pad(rows, [self.target_context(example) for example in examples], left=False)
        return arranged(padded, prefixes, targets)

    def prompts(self, examples: Sequence[Example]) -> Batch:
        """A batch with one row per example, without targets, padded on the left for generation."""
        return self._pad(self._inputs(examples, None), [self.target_context(e) for e in examples], left=True)

    def target_context(self, example: Example) -> str:
        """The context of the example's target."""
        return example.target or self.contexts[-1]

    def target_length(self, text: str) -> int:
        """Number of tokens of a target, with EOS."""
        return len(self._target(text))

    def prompt_length(self, example: Example) -> int:
        """Positions that the frame and the input texts of a row take; those of its files come on top."""
        inputs = [value for _, value in example.inputs if isinstance(value, str)]
        return self._frame.length + sum(
            len(self._encode(value, self.budget.max_input_length, self.cut_inputs)) for value in inputs
        )

    def text_positions(self, example: Example, text: str) -> int:
        """Positions that the texts of a row take, with its frame and the target; those of its files come on top."""
        return self.prompt_length(example) + self.target_length(text)

    def decode(self, ids_BT: Tensor) -> list[str]:
        """Decode generated ids (B, T) to texts without special tokens."""
        texts: list[Any] = self.language_model.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    def _encode(self, text: str, limit: int, cut: set[int]) -> list[int]:
        tokens = self.language_model.tokens
        if text not in tokens:
            tokens[text] = self.language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokens[text]
        if len(ids) > limit:
            cut.add(text_key(text))
        return ids[:limit]

    def spaced(self, text: str) -> str:
        """The target text as it is tokenized: with a leading space if the backbone has ``add_prefix_space``."""
        return f" {text}" if self.backbone.add_prefix_space and not text[:1].isspace() else text

    def _target(self, text: str) -> list[int]:
        ids = self._encode(self.spaced(text), self.budget.max_target_length, self.cut_targets)
        return [*ids, self.language_model.eos_id]

    def _inputs(self, examples: Sequence[Example], views: Sequence[int] | None) -> list[list[_Chunk]]:
        """The chunks before a target: the frame and the inputs, for each example."""
        rows = []
        for example, features in zip(examples, self.features.of(examples, views), strict=True):
            encoded = iter(features)
            row = [_Chunk(self.target_context(example), len(self._frame.before), self._frame.before)]
            for context, value in example.inputs:
                if isinstance(value, str):
                    ids = self._encode(value, self.budget.max_input_length, self.cut_inputs)
                    row.append(_Chunk(context, len(ids), ids))
                else:
                    features_ND = next(encoded)
                    length = len(features_ND) + 2 * self.backbone.projector_boundary_tokens
                    row.append(_Chunk(context, length, features_ND=features_ND))
            if self._frame.after:
                row.append(_Chunk(self.target_context(example), len(self._frame.after), self._frame.after))
            rows.append(row)
        return rows

    def _pad(self, rows: Sequence[Sequence[_Chunk]], targets: Sequence[str], left: bool) -> Batch:
        lengths = [sum(chunk.length for chunk in row) for row in rows]
        shape = (len(rows), max(lengths))
        if self._max_positions is not None and shape[1] > self._max_positions:
            raise UserError(
                f"a row takes {shape[1]} positions, but the language model has {self._max_positions} "
                "(max_position_embeddings); lower budget.max_input_length or budget.max_target_length, or use an "
                "encoder with fewer tokens per item"
            )
        ids, contexts = np.zeros(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        mask, tokens = np.zeros(shape, dtype=bool), list[list[tuple[int, int, int]]]()
        items: dict[str, list[tuple[Tensor, np.ndarray]]] = {context: [] for context in self.features.task.modalities}
        for number, (row, target) in enumerate(zip(rows, targets, strict=True)):
            contexts[number] = self.contexts.index(target)
            start = shape[1] - lengths[number] if left else 0
            mask[number, start : start + lengths[number]] = True
            tokens.append([])
            for chunk in row:
                stop = start + chunk.length
                contexts[number, start:stop] = self.contexts.index(chunk.context)
                if chunk.features_ND is None:
                    ids[number, start:stop] = chunk.token_ids
                else:
                    items[chunk.context].append((chunk.features_ND, number * shape[1] + np.arange(start, stop)))
                if chunk.is_target:
                    tokens[-1] += [(number, start - 1 + n, label) for n, label in enumerate(chunk.token_ids)]
                start = stop
        check_ids(ids, self._vocabulary)
        return Batch(
            token_ids_BT=torch.from_numpy(ids),
            context_ids_BT=torch.from_numpy(contexts),
            mask_BT=torch.from_numpy(mask),
            items={context: self._items(context, found) for context, found in items.items()},
            segments=_common_segments(rows, shape[1]),
            targets=Targets.of(tokens),
            host_context_ids_BT=contexts,
        )

    def _items(self, context: str, found: Sequence[tuple[Tensor, np.ndarray]]) -> Items:
        empty_0D = torch.zeros(0, self.features.width(context))
        return Items(
            features_MD=torch.cat([features_ND for features_ND, _ in found]) if found else empty_0D,
            lengths=tuple(len(features_ND) for features_ND, _ in found),
            positions_P=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *(at for _, at in found)])),
        )


def _common_segments(rows: Sequence[Sequence[_Chunk]], length: int) -> tuple[Segment, ...] | None:
    """The segments that all rows share; None if they differ. Lengths of targets may differ: only padding follows."""
    layouts = {tuple((s.context, None if s.is_target else s.length) for s in row) for row in rows}
    if len(layouts) > 1:
        return None
    segments: list[Segment] = []
    for context, given in layouts.pop():
        start = segments[-1].stop if segments else 0
        segments.append(Segment(start, length if given is None else start + given, context))
    return tuple(segments)
