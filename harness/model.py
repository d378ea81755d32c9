"""Encoder features → projector → language model: the one model that every trial trains.

Sequence: ``[BOS] projected encoder tokens … target tokens [EOS]``, loss on the target and EOS (arXiv 2312.08900).
BOS is a token of the language model's own vocabulary, so it belongs to the target's (text) context.

Shapes: B rows, P prefix positions, T target positions, N encoder tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.attach import Adapters
from adapters.generation import layouts_while_generating
from adapters.router import Router
from harness.contexts import Segment

IGNORED = -100  # label of padding, as in torch's cross_entropy


@dataclass(frozen=True)
class Batch:
    """One batch: encoder features (B, N, D) by context; target ids (EOS included), padded right with IGNORED."""

    features: Mapping[str, Tensor]
    target_ids_BT: Tensor

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.target_ids_BT.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch({c: x.to(device) for c, x in self.features.items()}, self.target_ids_BT.to(device))


class ContextModel(nn.Module):
    """A language model that reads projected encoder tokens, with adapters that act by context.

    Args:
        language_model: a Hugging Face causal LM. Its parameters' ``requires_grad`` is set by the caller.
        feature_widths: context → width of its encoder's features, in sequence order.
        adapters: attached to the language model.
        router: the adapters' router.
        target_context: the context of the target text.
        bos_id: token that opens the sequence.
        projector_dropout: before each projector.
    """

    def __init__(
        self,
        language_model: Any,
        feature_widths: Mapping[str, int],
        adapters: Adapters,
        router: Router,
        target_context: str,
        bos_id: int,
        projector_dropout: float,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.adapters = adapters
        self.router = router
        self.target_context = target_context
        self.bos_id = bos_id
        width = language_model.get_input_embeddings().embedding_dim
        self.projectors = nn.ModuleDict(
            {
                context: nn.Sequential(nn.Dropout(projector_dropout), nn.Linear(feature_width, width))
                for context, feature_width in feature_widths.items()
            }
        )
        self._segments: tuple[Segment, ...] = ()  # layout of the latest prefix

    def prefix(self, features: Mapping[str, Tensor]) -> Tensor:
        """Embed ``[BOS]`` and the projected encoder tokens: (B, P, D). Remembers which positions are whose."""
        embedding = self.language_model.get_input_embeddings()
        rows = next(iter(features.values())).shape[0]
        bos_B1 = torch.full((rows, 1), self.bos_id, device=embedding.weight.device)
        pieces, segments = [embedding(bos_B1)], [Segment(0, 1, self.target_context)]
        for context, projector in self.projectors.items():
            features_BND = features[context].to(embedding.weight.dtype)
            pieces.append(projector(features_BND))
            start = segments[-1].stop
            segments.append(Segment(start, start + features_BND.shape[1], context))
        self._segments = tuple(segments)
        return torch.cat(pieces, dim=1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Score the targets.

        Returns:
            Negative log likelihood in nats summed over each row's target tokens (B,), fp32, and their numbers (B,).
        """
        prefix_BPD = self.prefix(batch.features)
        targets_BT = batch.target_ids_BT
        # The last target is predicted but never read.
        read_BS = targets_BT[:, :-1].clamp(min=0)
        embeds = torch.cat([prefix_BPD, self.language_model.get_input_embeddings()(read_BS)], dim=1)
        last = Segment(prefix_BPD.shape[1], embeds.shape[1], self.target_context)
        self.router.set_layout([*self._segments, last], embeds.device)
        # Padding stands on the right of a causal model, so no real token sees it and no attention mask is needed. Only
        # the positions that predict targets reach the vocabulary projection.
        logits_BTV = self.language_model(
            inputs_embeds=embeds, use_cache=False, logits_to_keep=targets_BT.shape[1]
        ).logits
        nll_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), targets_BT, ignore_index=IGNORED, reduction="none")
        return nll_BT.sum(dim=1), (targets_BT != IGNORED).sum(dim=1)

    @torch.no_grad()
    def generate(self, features: Mapping[str, Tensor], max_new_tokens: int, eos_id: int) -> Tensor:
        """Continue the prefix greedily with a KV cache.

        Returns:
            Token ids (B, at most max_new_tokens); after EOS a row holds EOS.
        """
        prefix_BPD = self.prefix(features)
        self.router.set_layout(self._segments, prefix_BPD.device)
        with layouts_while_generating(self.language_model, self.router, self.target_context):
            ids_BT: Tensor = self.language_model.generate(
                inputs_embeds=prefix_BPD,
                attention_mask=torch.ones(prefix_BPD.shape[:2], dtype=torch.long, device=prefix_BPD.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=eos_id,
                pad_token_id=eos_id,
            )
        return ids_BT

    def positions(self, batch: Batch) -> int:
        """Positions that the language model read for a batch that was just scored, padding excluded."""
        prefix = self._segments[-1].stop
        return int((batch.target_ids_BT != IGNORED).sum()) + batch.size * (prefix - 1)  # the last target is not read
