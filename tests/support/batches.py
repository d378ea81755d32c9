"""Batches built explicitly: ``[BOS] image tokens … targets``, rows equal except for padding.

Shapes: B rows, P prefix positions, T target positions, N encoder tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adapters.attach import Adapters
from adapters.placement.router import Router
from harness.core.contexts import Segment
from harness.experiment.sections import Backbone
from harness.model.batch import IGNORED, Batch, Items, Targets
from harness.model.context_model import ContextModel
from harness.model.projector import Projector

BOS = 1


def model_of(
    language_model: Any, widths: Mapping[str, int], adapters: Adapters, router: Router, dropout: float = 0.0
) -> ContextModel:
    """A model whose projectors are the paper's."""
    width = language_model.get_input_embeddings().embedding_dim
    options = Backbone(projector_dropout=dropout)
    return ContextModel(language_model, {c: Projector(w, width, options) for c, w in widths.items()}, adapters, router)


def batch_of(
    features: Mapping[str, Tensor], targets_BT: Tensor, contexts: tuple[str, ...] = ("image", "text")
) -> Batch:
    """Targets padded right with IGNORED behind BOS and the features (B, N, D) of each context."""
    rows, target = targets_BT.shape
    segments = [Segment(0, 1, contexts[-1])]
    for context, features_BND in features.items():
        start = segments[-1].stop
        segments.append(Segment(start, start + features_BND.shape[1], context))
    prefix = segments[-1].stop
    length = prefix + target
    ids_BT = torch.zeros(rows, length, dtype=torch.long)
    ids_BT[:, 0] = BOS
    ids_BT[:, prefix:] = targets_BT.clamp(min=0)
    tokens = [[token for token in row if token != IGNORED] for row in targets_BT.tolist()]
    segments.append(Segment(prefix, length, contexts[-1]))
    context_ids_T = torch.cat([torch.full((s.stop - s.start,), contexts.index(s.context)) for s in segments])
    places_BT = torch.arange(rows * length).view(rows, length)
    items = {
        segment.context: Items(
            features[segment.context].flatten(0, 1),
            (segment.stop - segment.start,) * rows,
            places_BT[:, segment.start : segment.stop].flatten(),
        )
        for segment in segments[1:-1]
    }
    mask_BT = torch.ones(rows, length, dtype=torch.bool)
    mask_BT[:, prefix:] = targets_BT != IGNORED
    targets = Targets.of([[(row, prefix - 1 + n, ids[n]) for n in range(len(ids))] for row, ids in enumerate(tokens)])
    return Batch(ids_BT, context_ids_T.expand(rows, -1).clone(), mask_BT, items, tuple(segments), targets)


def prompt_of(features: Mapping[str, Tensor], contexts: tuple[str, ...] = ("image", "text")) -> Batch:
    """BOS and the features, to be continued."""
    rows = next(iter(features.values())).shape[0]
    return batch_of(features, torch.empty(rows, 0, dtype=torch.long), contexts)


def ungroup(batch: Batch) -> Batch:
    """The same batch, declared as one whose rows differ."""
    return Batch(**{**vars(batch), "segments": None})
