"""Makes batches of examples: the features of their files and the token ids of their texts, in padded rows.

Shapes: B rows, T positions, N tokens of an item, M feature vectors of all items, P positions of all items, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.core.errors import UserError
from harness.experiment.sections import Backbone, Budget
from harness.model.backbones import LanguageModel
from harness.model.batch import Batch, Items, Targets
from harness.model.budget import Draw, leading_inputs
from harness.model.checks import check_ids
from harness.model.chunks import (
    Chunk,
    Item,
    chunks_of_picture,
    common_chunks,
    common_segments,
    in_rows,
    joined,
    length_of_row,
    positions_in,
)
from harness.model.features import Features
from harness.model.frame import Frame, frame_of
from harness.model.own_encoder import OwnEncoder, Written
from harness.model.past import Past
from harness.model.shared_prefix import arranged, fits
from harness.model.tower import Tensors
from harness.model.turn import Turn
from tasks.base import Example


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
        whole = language_model.processor is not None
        self._turn = Turn(language_model.processor, self.backbone) if whole else None
        self._frame = Frame((), ()) if whole else frame_of(language_model.tokenizer, self.backbone)
        self._max_positions = language_model.max_positions
        self.cut_targets: set[int] = set()
        self.cut_inputs: set[int] = set()
        self._both_ways = getattr(language_model.model, "both_ways", None)
        # Read here, because ZeRO-3 partitions the table later.
        self._vocabulary = int(language_model.model.get_input_embeddings().num_embeddings)

    def make(self, examples: Sequence[Example], texts: Sequence[str], views: Sequence[int] | None = None) -> Batch:
        """A batch with one row per example, its inputs followed by a target, padded on the right.

        Args:
            examples: for their inputs.
            texts: the target of each row.
            views: for training, the seed of each example's augmentation.
        """
        rows = zip(examples, self._inputs(examples, views), texts, strict=True)
        return self._alone([(example, row, self._target(text)) for example, row, text in rows])

    def make_shared(self, rows: Sequence[Sequence[tuple[Example, str]]]) -> Batch:
        """A batch of rows with several targets, which do not see each other: what their inputs begin with is read once.

        Args:
            rows: the examples and targets of each row, which have the same ``leading_inputs``.
        """
        made = self._inputs([example for row in rows for example, _ in row], None)
        return self._shared([[(example, made.pop(0), self._target(text)) for example, text in row] for row in rows])

    def train(self, examples: Sequence[Example], draws: Sequence[Draw], share: bool) -> Batch:
        """The batch of training items.

        Args:
            examples: of the budget.
            draws: the items.
            share: whether items whose inputs begin alike share a row, where less is read so.
        """
        own = [examples[draw.example] for draw in draws]
        made = self._inputs(own, [draw.view for draw in draws])
        texts = [example.references[draw.reference] for example, draw in zip(own, draws, strict=True)]
        items = [(example, row, self._target(text)) for example, row, text in zip(own, made, texts, strict=True)]
        once = self.budget.references == "grouped"
        if share:
            alike: dict[object, list[Item]] = {}
            for item, draw in zip(items, draws, strict=True):
                beginning = leading_inputs(item[0]) if self._both_ways != "prompts" else item[0].inputs
                key = beginning, draw.view if self.features.augments(item[0]) else None
                alike.setdefault(key, []).append(item)
            rows = [row for group in alike.values() for row in in_rows(group)]
            length = max(length_of_row(row) for row in rows)
            alone = max(sum(chunk.length for chunk in row) + len(target) - 1 for _, row, target in items)
            config = self.language_model.model.config
            if len(rows) * length < len(items) * alone and fits(config, length):
                return self._shared(rows, once)
        return self._alone(items, once)

    def invented(self) -> tuple[Batch, Batch]:
        """Rows of invented content in every context, to try a model on: with one target each, and the same shared."""
        generator = torch.Generator().manual_seed(0)
        ids = [int(n) for n in torch.randint(self._vocabulary, (64,), generator=generator)]
        examples = [Example(str(n), (), ("",)) for n in range(2)]
        rows: list[list[Item]] = []
        for example in examples:
            inputs = [Chunk(self.target_context(example), 1, ids[:1])]
            for context in self.contexts:
                if context in self.features.task.modalities:
                    encoder = self.features.encoders[self.features.task.modalities[context]]
                    if isinstance(encoder, OwnEncoder) and encoder.in_step:
                        inputs += chunks_of_picture(context, encoder.encode([encoder.blank])[0])
                        continue
                    each, tile = (encoder.each, encoder.rows) if isinstance(encoder, OwnEncoder) else (1, 3)
                    features_ND = torch.randn(tile, self.features.width(context), generator=generator)
                    length = tile // each + 2 * self.backbone.projector_boundary_tokens
                    inputs.append(Chunk(context, length, features_ND=features_ND))
                else:
                    inputs.append(Chunk(context, 3, [ids.pop() for _ in range(3)]))
            rows.append([(example, inputs, [ids.pop() for _ in range(length)]) for length in (3, 4)])
        return self._alone([item for row in rows for item in row]), self._shared(rows)

    def _alone(self, items: Sequence[Item], once: bool = False) -> Batch:
        rows = [
            [*row, Chunk(self.target_context(example), len(target), target, is_target=True)]
            for example, row, target in items
        ]
        return self._pad(rows, [self.target_context(example) for example, _, _ in items], left=False, once=once)

    def _shared(self, rows: Sequence[Sequence[Item]], once: bool = False) -> Batch:
        made: list[list[Chunk]] = []
        layouts: list[tuple[int, list[tuple[int, list[int]]]]] = []
        positions: list[np.ndarray] = []
        for row in rows:
            context, common = self.target_context(row[0][0]), common_chunks(row)
            chunks = row[0][1][:common]
            prefix, following = positions_in(chunks)
            branches, places = [], [prefix]
            for _, inputs, target in row:
                rest = inputs[common:]
                branches.append((sum(chunk.length for chunk in rest), target))
                # The last token of a target is only predicted.
                branch = [*rest, Chunk(context, len(target) - 1, target[:-1])]
                places.append(positions_in(branch, following)[0])
                chunks = [*chunks, *branch]
            layouts.append((sum(chunk.length for chunk in row[0][1][:common]), branches))
            made.append(joined(chunks))
            positions.append(np.concatenate(places, axis=1))
        padded = self._pad(made, [self.target_context(row[0][0]) for row in rows], left=False, once=once)
        found = arranged(padded, layouts)
        if self._both_ways == "prompts" and found.parts is not None:
            if any(between for _, branches in layouts for between, _ in branches):
                raise ValueError("a prompt whose tokens all see each other is shared as a whole or not at all")
            found = replace(found, both_ways_BT=found.parts.parts_BT == 0)
        if found.positions_3BT is None or found.parts is None:
            return found
        positions_3BT = torch.zeros_like(found.positions_3BT)
        for number, own in enumerate(positions):
            positions_3BT[:, number, : own.shape[1]] = torch.from_numpy(own)
        return replace(found, parts=replace(found.parts, positions_BT=positions_3BT), positions_3BT=None)

    @property
    def writes_turns(self) -> bool:
        """Whether a vision-language model's processor arranges prompts, whose inputs then are not one stretch each."""
        return self._turn is not None

    def prompt_rows(self, examples: Sequence[Example]) -> list[list[Chunk]]:
        """The stretches of each example's prompt: the frame's beginning, its inputs, and what the frame ends with."""
        return self._inputs(examples, None)

    def of_rows(self, rows: Sequence[Sequence[Chunk]], examples: Sequence[Example], past: Past | None) -> Batch:
        """A batch of stretches, without targets, padded on the right.

        Args:
            rows: the stretches.
            examples: whose rows these are.
            past: what they go on from; None: they begin.
        """
        contexts = [self.target_context(example) for example in examples]
        return self._pad(rows, contexts, left=False, before=past.lengths if past else None)

    def going_on(self, examples: Sequence[Example], texts: Sequence[str], past: Past) -> Batch:
        """A batch with one target per row, after the last position of its prompt, whose embedding the past has.

        Args:
            examples: for the context of the target.
            texts: the targets.
            past: the prompts without their last positions.
        """
        rows = []
        for example, text, last in zip(examples, texts, past.last_context_ids, strict=True):
            ids = self._target(text)
            target = Chunk(self.target_context(example), len(ids), ids, is_target=True)
            rows.append([Chunk(self.contexts[last], 1, [0]), target])
        contexts = [self.target_context(example) for example in examples]
        return self._pad(rows, contexts, left=False, before=past.lengths)

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
        if self._turn is not None:
            return sum(len(piece.ids or ()) for piece in self._turn.pieces(example.inputs, self._texts(example)))
        inputs = [value for _, value in example.inputs if isinstance(value, str)]
        return self._frame.length + sum(
            len(self._encode(value, self.budget.max_input_length, self.cut_inputs)) for value in inputs
        )

    def input_lengths(self, examples: Sequence[Example]) -> list[int]:
        """Positions before the target of each example's row. Texts that are cut are not noted."""
        found = []
        for example, features in zip(examples, self.features.of(examples), strict=True):
            if self._turn is not None:
                pieces = self._turn.pieces(example.inputs, self._texts(example, note=False))
                pictures = (len(Written.of(rows_ND).ids) for rows_ND in features)
                found.append(sum(len(piece.ids or ()) for piece in pieces) + sum(pictures))
                continue
            files = (len(features_ND) + 2 * self.backbone.projector_boundary_tokens for features_ND in features)
            texts = (self._count(v, self.budget.max_input_length) for _, v in example.inputs if isinstance(v, str))
            found.append(self._frame.length + sum(files) + sum(texts))
        return found

    def target_positions(self, text: str) -> int:
        """As ``target_length``, but a text that is cut is not noted."""
        return self._count(self.spaced(text), self.budget.max_target_length) + 1

    def text_positions(self, example: Example, text: str) -> int:
        """Positions that the texts of a row take, with its frame and the target; those of its files come on top."""
        return self.prompt_length(example) + self.target_length(text)

    def decode(self, ids_BT: Tensor) -> list[str]:
        """Decode generated ids (B, T) to texts without special tokens."""
        texts: list[Any] = self.language_model.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return [str(text).strip() for text in texts]

    def _encode(self, text: str, limit: int, cut: set[int]) -> list[int]:
        ids = self._tokens(text)
        if len(ids) > limit:
            cut.add(text_key(text))
        return ids[:limit]

    def _count(self, text: str, limit: int) -> int:
        return min(len(self._tokens(text)), limit)

    def _tokens(self, text: str) -> list[int]:
        tokens = self.language_model.tokens
        if text not in tokens:
            tokens[text] = self.language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens[text]

    def spaced(self, text: str) -> str:
        """The target text as it is tokenized: with a leading space if the backbone has ``add_prefix_space``."""
        return f" {text}" if self.backbone.add_prefix_space and not text[:1].isspace() else text

    def _target(self, text: str) -> list[int]:
        ids = self._encode(self.spaced(text), self.budget.max_target_length, self.cut_targets)
        return [*ids, self.language_model.eos_id]

    def _inputs(self, examples: Sequence[Example], views: Sequence[int] | None) -> list[list[Chunk]]:
        """The chunks before a target: the frame and the inputs, for each example."""
        rows = []
        pictures: dict[int, list[Chunk]] = {}  # by the identity of their features, so that they stay the same tensors
        for example, features in zip(examples, self.features.of(examples, views), strict=True):
            if self._turn is not None:
                rows.append(self._in_turn(self._turn, example, features, pictures))
                continue
            encoded = iter(features)
            row = [Chunk(self.target_context(example), len(self._frame.before), self._frame.before)]
            for context, value in example.inputs:
                if isinstance(value, str):
                    ids = self._encode(value, self.budget.max_input_length, self.cut_inputs)
                    row.append(Chunk(context, len(ids), ids))
                else:
                    features_ND = next(encoded)
                    length = len(features_ND) + 2 * self.backbone.projector_boundary_tokens
                    row.append(Chunk(context, length, features_ND=features_ND))
            if self._frame.after:
                row.append(Chunk(self.target_context(example), len(self._frame.after), self._frame.after))
            rows.append(row)
        return rows

    def _in_turn(
        self, turn: Turn, example: Example, features: Sequence[Tensor], pictures: dict[int, list[Chunk]]
    ) -> list[Chunk]:
        """The chunks of a vision-language model's turn."""
        files = [number for number, part in enumerate(example.inputs) if not isinstance(part.value, str)]
        row = []
        for piece in turn.pieces(example.inputs, self._texts(example)):
            context = self.target_context(example) if piece.input is None else example.inputs[piece.input].context
            if piece.ids is not None:
                row.append(Chunk(context, len(piece.ids), piece.ids))
                continue
            assert piece.input is not None  # noqa: S101 - a picture is an input
            own = features[files.index(piece.input)]
            if id(own) not in pictures:
                pictures[id(own)] = chunks_of_picture(context, own)
            row += pictures[id(own)]
        return row

    def _texts(self, example: Example, note: bool = True) -> list[str]:
        """The input texts of an example, cut where they are too long, which is noted."""
        assert self._turn is not None  # noqa: S101 - only asked then
        found = []
        for _, value in example.inputs:
            if isinstance(value, str):
                text = self._turn.cut(value, self.budget.max_input_length)
                if text != value and note:
                    self.cut_inputs.add(text_key(value))
                found.append(text)
        return found

    def _pad(
        self,
        rows: Sequence[Sequence[Chunk]],
        targets: Sequence[str],
        left: bool,
        once: bool = False,
        before: Sequence[int] | None = None,
    ) -> Batch:
        lengths = [sum(chunk.length for chunk in row) for row in rows]
        shape = (len(rows), max(lengths))
        longest = max(map(sum, zip(lengths, before or [0] * len(rows), strict=True)))
        if self._max_positions is not None and longest > self._max_positions:
            raise UserError(
                f"a row takes {longest} positions, but the language model has {self._max_positions} "
                "(max_position_embeddings); lower budget.max_input_length or budget.max_target_length, or use an "
                "encoder with fewer tokens per item"
            )
        ids, contexts = np.zeros(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
        mask, tokens = np.zeros(shape, dtype=bool), list[list[tuple[int, int, int]]]()
        items: dict[str, list[_Placed]] = {context: [] for context in self.features.task.modalities}
        gridded = any(chunk.grid for row in rows for chunk in row)
        positions_3BT = torch.zeros(3, *shape, dtype=torch.long) if gridded else None
        both_ways_BT = torch.zeros(shape, dtype=torch.bool) if self._both_ways else None
        for number, (row, target) in enumerate(zip(rows, targets, strict=True)):
            contexts[number] = self.contexts.index(target)
            start = shape[1] - lengths[number] if left else 0
            if positions_3BT is not None:
                positions_3BT[:, number, start : start + lengths[number]] = torch.from_numpy(positions_in(row)[0])
            mask[number, start : start + lengths[number]] = True
            tokens.append([])
            for chunk in row:
                stop = start + chunk.length
                contexts[number, start:stop] = self.contexts.index(chunk.context)
                if both_ways_BT is not None and (chunk.features_ND is not None or self._both_ways == "prompts"):
                    both_ways_BT[number, start:stop] = not chunk.is_target
                if chunk.features_ND is None:
                    ids[number, start:stop] = chunk.token_ids
                else:
                    own, places = items[chunk.context], number * shape[1] + np.arange(start, stop)
                    before_P = own.pop().places_P if chunk.goes_on else np.empty(0, dtype=np.int64)
                    own.append(_Placed(chunk.features_ND, np.concatenate([before_P, places]), chunk.tensors))
                if chunk.is_target:
                    tokens[-1] += [(number, start - 1 + n, label) for n, label in enumerate(chunk.token_ids)]
                start = stop
        check_ids(ids, self._vocabulary)
        return Batch(
            token_ids_BT=torch.from_numpy(ids),
            context_ids_BT=torch.from_numpy(contexts),
            mask_BT=torch.from_numpy(mask),
            items={context: self._items(context, found, once) for context, found in items.items()},
            segments=common_segments(rows, shape[1]),
            targets=Targets.of(tokens),
            positions_3BT=positions_3BT,
            both_ways_BT=both_ways_BT,
            host_context_ids_BT=contexts,
            host_tokens=sum(lengths),
        )

    def _items(self, context: str, found: Sequence[_Placed], once: bool) -> Items:
        """The items of a context; ``once``: an item that several rows have is projected once, with one dropout."""
        positions = np.concatenate([np.empty(0, dtype=np.int64), *(item.places_P for item in found)])
        own, projected_P = list(found), None
        # A tower computes what it reads once: it has no dropout of its own.
        once = once or any(item.tensors for item in found)
        if once and len({id(item.features_ND) for item in own}) < len(own):
            starts: dict[int, int] = {}
            own, total = [], 0
            for item in found:
                if id(item.features_ND) not in starts:
                    starts[id(item.features_ND)], total = total, total + len(item.places_P)
                    own.append(item)
            places = [starts[id(item.features_ND)] + np.arange(len(item.places_P)) for item in found]
            projected_P = torch.from_numpy(np.concatenate(places))
        features = [item.features_ND for item in own]
        return Items(
            features_MD=torch.cat(features) if own else torch.zeros(0, self.features.width(context)),
            lengths=tuple(map(len, features)),
            positions_P=torch.from_numpy(positions),
            projected_P=projected_P,
            tensors=tuple(item.tensors for item in own if item.tensors is not None),
        )


class _Placed(NamedTuple):
    """An item of a batch, and its places in the concatenated rows."""

    features_ND: Tensor
    places_P: np.ndarray
    tensors: Tensors | None
