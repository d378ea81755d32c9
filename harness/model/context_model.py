"""Encoder features → projectors → language model: the one model that every trial trains.

Sequence: ``[BOS] inputs … target tokens [EOS]``, loss on the target and EOS (arXiv 2312.08900). Inputs are projected
encoder tokens and text, in the example's order. BOS is a token of the language model's own vocabulary; it belongs to
the target's context.

Shapes: B rows, T positions, M feature rows of all items of a context, P positions these take, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.attach import Adapters
from adapters.placement.generation import layouts_while_generating
from adapters.placement.router import Router
from harness.core.contexts import Segment

IGNORED = -100  # label of what is not a target, as in torch's cross_entropy


@dataclass(frozen=True)
class Items:
    """The encoded inputs of one context in a batch, laid end to end."""

    features_MD: Tensor
    lengths: tuple[int, ...]  # of the items; they add up to M
    places_P: Tensor  # int64: which position of the rows laid end to end each token takes, boundary tokens included

    def to(self, device: torch.device) -> Items:
        """The items on another device."""
        return replace(self, features_MD=self.features_MD.to(device), places_P=self.places_P.to(device))


@dataclass(frozen=True)
class Batch:
    """Rows of one length: padding on the right for training and scoring, on the left for generation."""

    token_ids_BT: Tensor  # 0 where there is no token: encoded inputs, padding
    context_ids_BT: Tensor  # index into the contexts; of padding: the target's
    labels_BT: Tensor  # the target's tokens in their places, else IGNORED
    mask_BT: Tensor  # bool: no padding
    items: Mapping[str, Items]  # of every context that is not text, also those of which there is none
    segments: tuple[Segment, ...] | None  # the layout, where all rows have one; None: rows differ
    first_label: int  # the first position with a label in any row; T where there is none

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.token_ids_BT.shape[0]

    @property
    def positions(self) -> int:
        """Positions the language model reads when scoring, padding excluded; the last target is not read."""
        return int(self.mask_BT.sum()) - self.size

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, items={c: items.to(device) for c, items in self.items.items()}, **moved)


_TENSORS = ("token_ids_BT", "context_ids_BT", "labels_BT", "mask_BT")


class ContextModel(nn.Module):
    """A language model that reads projected encoder tokens, with adapters that act by context.

    Args:
        language_model: a Hugging Face causal LM. Its parameters' ``requires_grad`` is set by the caller.
        projectors: by context, for every context that is not text.
        adapters: attached to the language model.
        router: the adapters' router.
    """

    def __init__(
        self, language_model: Any, projectors: Mapping[str, nn.Module], adapters: Adapters, router: Router
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.adapters = adapters
        self.router = router
        self.projectors = nn.ModuleDict(projectors)

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings of a batch (B, T, D)."""
        embeds_BTD: Tensor = self.language_model.get_input_embeddings()(batch.token_ids_BT)
        shape = embeds_BTD.shape
        rows = embeds_BTD.flatten(0, 1)
        for context, projector in self.projectors.items():
            items = batch.items[context]
            projected_PD = projector(items.features_MD.to(rows.dtype), items.lengths)
            rows = rows.index_copy(0, items.places_P, projected_PD)
        return rows.view(shape)

    def _set_layout(self, batch: Batch, length: int) -> None:
        if batch.segments is None:
            self.router.set_context_ids(batch.context_ids_BT[:, :length])
        else:
            cut = [s._replace(stop=min(s.stop, length)) for s in batch.segments if s.start < length]
            self.router.set_layout(cut, batch.token_ids_BT.device)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Score the targets.

        Returns:
            Negative log likelihood in nats summed over each row's target tokens (B,), fp32, and their numbers (B,).
        """
        length = batch.token_ids_BT.shape[1]
        embeds_BTD = self.embed(batch)[:, :-1]  # the last position is predicted but never read
        labels_BT = batch.labels_BT[:, batch.first_label :]
        # Padding stands on the right of a causal model, so no real token sees it and no attention mask is needed. Only
        # the positions that predict targets reach the vocabulary projection.
        with self.router.one_pass():
            self._set_layout(batch, length - 1)
            logits_BTV = self.language_model(
                inputs_embeds=embeds_BTD, use_cache=False, logits_to_keep=labels_BT.shape[1]
            ).logits
        nll_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none")
        return nll_BT.sum(dim=1), (labels_BT != IGNORED).sum(dim=1)

    @torch.no_grad()
    def generate(
        self, prompt: Batch, target_context: str, max_new_tokens: int, eos_id: int, num_beams: int = 1
    ) -> Tensor:
        """Continue prompts, padded on the left, greedily or with beams, with a KV cache.

        Args:
            prompt: rows without targets.
            target_context: of all that is written.
            max_new_tokens: at most.
            eos_id: ends a text.
            num_beams: 1 is greedy.

        Returns:
            Token ids (B, at most max_new_tokens); after EOS a row holds EOS.
        """
        embeds_BTD = self.embed(prompt)
        with self.router.one_pass():
            self._set_layout(prompt, embeds_BTD.shape[1])
            return self._generate(embeds_BTD, prompt, target_context, max_new_tokens, eos_id, num_beams)

    def _generate(
        self, embeds_BTD: Tensor, prompt: Batch, target_context: str, max_new_tokens: int, eos_id: int, num_beams: int
    ) -> Tensor:
        with layouts_while_generating(self.language_model, self.router, target_context):
            ids_BT: Tensor = self.language_model.generate(
                inputs_embeds=embeds_BTD,
                attention_mask=prompt.mask_BT.long(),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                eos_token_id=eos_id,
                pad_token_id=eos_id,
            )
        return ids_BT
