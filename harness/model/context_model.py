"""The model that every trial trains: encoder features → projectors → language model with adapters.

Sequence: ``[BOS] inputs … target tokens [EOS]``, with the loss on the target and EOS (arXiv 2312.08900). Inputs are
projected encoder tokens and text, in the order of the example. BOS is a token of the language model's vocabulary and
belongs to the context of the target.

Shapes: B rows, T positions, M feature vectors of all items of a context, P positions of these items, D width, N target
tokens of all rows, R targets of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.attach import Adapters
from adapters.placement.generation import layouts_while_generating
from adapters.placement.router import Router
from harness.core.errors import UserError
from harness.model.batch import IGNORED, Batch
from harness.model.past import Past, Prefix, prefixes_in
from harness.model.shared_prefix import attention_mask
from harness.model.target_logits import nll_in_chunks, nll_of, target_logits, wants_chunks
from harness.model.tower import Tower


class ContextModel(nn.Module):
    """A language model that reads projected encoder tokens, with adapters that depend on the context.

    Args:
        language_model: a Hugging Face causal LM. Its parameters' ``requires_grad`` is set by the caller.
        projectors: by context, for every context that is not text.
        adapters: the adapters, attached to the language model.
        router: router of the adapters.

    Attributes:
        chunked_loss: whether logits are computed in chunks where they are many.
    """

    chunked_loss = True

    def __init__(
        self, language_model: Any, projectors: Mapping[str, nn.Module], adapters: Adapters, router: Router
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.adapters = adapters
        self.router = router
        self.projectors = nn.ModuleDict(projectors)
        # Whether shared rows, and rows that go on from a cached prompt, are right with this model; None: not yet tried.
        self.shares_prefixes: bool | None = None
        self.goes_on: bool | None = None

    def embed(self, batch: Batch) -> Tensor:
        """Embed tokens and project items; returns (B, T, D), and behind it what the decoder's class needs to know."""
        embeds_BTD: Tensor = self.language_model.get_input_embeddings()(batch.token_ids_BT)
        if more := getattr(self.language_model, "more_width", 0):  # what inner layers add, of images alone
            embeds_BTD = F.pad(embeds_BTD, (0, more))
        shape = embeds_BTD.shape
        rows = embeds_BTD.flatten(0, 1)
        for context, projector in self.projectors.items():
            items = batch.items[context]
            weight = next(projector.parameters(), None)
            features_MD = items.features_MD if weight is None else items.features_MD.to(weight.dtype)
            if isinstance(projector, Tower):  # its adapters ask for a layout
                with self.router.one_pass():
                    self._set_layout(batch, shape[1])
                    projected_PD = projector(features_MD, items.lengths, items.tensors).to(rows.dtype)
            else:
                projected_PD = projector(features_MD, items.lengths).to(rows.dtype)
            if items.projected_P is not None:
                projected_PD = projected_PD.index_select(0, items.projected_P)
            rows = rows.index_copy(0, items.positions_P, projected_PD)
        if batch.both_ways_BT is not None:
            rows = torch.cat([rows, batch.both_ways_BT.flatten()[:, None].to(rows.dtype)], dim=1)
        return rows.view(*shape[:2], -1)

    def _set_layout(self, batch: Batch, length: int, past: Past | None = None) -> None:
        if batch.segments is None or past is not None:
            known_BT, ids_BT = batch.host_context_ids_BT, batch.context_ids_BT[:, :length]
            self.router.set_context_ids(
                ids_BT,
                None if past is None else past.context_ids(ids_BT.device),
                host_XT=None if known_BT is None else known_BT[:, :length],
            )
        else:
            cut = [s._replace(stop=min(s.stop, length)) for s in batch.segments if s.start < length]
            self.router.set_layout(cut, batch.token_ids_BT.device)

    def _going_on(self, past: Past, new_BT: Tensor) -> dict[str, Any]:
        """Options of the language model's ``forward`` for new positions after a past.

        Args:
            past: of the rows.
            new_BT: bool: False for padding.
        """
        from transformers.cache_utils import DynamicCache  # slow to import

        cache = DynamicCache(config=self.language_model.config)
        past.fill(cache)
        return {
            "attention_mask": past.mask(new_BT).long(),
            "position_ids": past.new_positions(new_BT.shape[1], new_BT.device),
            "past_key_values": cache,
        }

    @torch.no_grad()
    def read(self, batch: Batch, past: Past | None = None) -> list[Prefix]:
        """Read the beginnings of rows, for what goes on from them.

        Args:
            batch: rows without targets, padded on the right.
            past: what they go on from; None: they begin.

        Raises:
            ValueError: the model's cache does not have the positions that it has read, such as with soft prompts.
        """
        from transformers.cache_utils import DynamicCache  # slow to import

        embeds_BTD, mask_BT = self.embed(batch), batch.mask_BT
        if past is None:
            positions_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand(mask_BT.shape)
            cache: Any = DynamicCache(config=self.language_model.config)
            options: dict[str, Any] = {"attention_mask": mask_BT.long(), "position_ids": positions_BT}
        else:
            options = self._going_on(past, mask_BT)
            cache = options.pop("past_key_values")
        with self.router.one_pass():
            self._set_layout(batch, embeds_BTD.shape[1], past)
            self.language_model(
                inputs_embeds=embeds_BTD, past_key_values=cache, use_cache=True, logits_to_keep=1, **options
            )
        longest = max(past.lengths) if past else 0
        if cache.get_seq_length() != longest + embeds_BTD.shape[1]:
            raise ValueError("the cache has other positions than were read")
        new_B = mask_BT.sum(dim=1).tolist()
        before = past.lengths if past else [0] * len(new_B)
        known_BT = batch.host_context_ids_BT
        assert known_BT is not None  # noqa: S101 - a BatchMaker's batches have it
        ids = [own[:n].copy() for own, n in zip(known_BT, new_B, strict=True)]
        if past:
            ids = [np.concatenate([p.context_ids, own]) for p, own in zip(past.prefixes, ids, strict=True)]
        last_BD = embeds_BTD[torch.arange(len(new_B)), torch.tensor(new_B) - 1]
        rows = [(longest - n, longest + new) for n, new in zip(before, new_B, strict=True)]
        return prefixes_in(cache, rows, ids, last_BD)

    def forward(self, batch: Batch, past: Past | None = None) -> tuple[Tensor, Tensor]:
        """Score the targets.

        Args:
            batch: with the targets.
            past: the prompts of the rows, which go on with the last position of the prompt; None: rows are whole.

        Returns:
            Negative log likelihood in nats, summed over each target's tokens (R,), in fp32 or better, and their number
            (R,).
        """
        embeds_BTD = self.embed(batch)[:, : batch.length]
        # Without parts no attention mask is needed: the model is causal and padding is on the right.
        options: dict[str, Any] = {}
        if past is not None:
            embeds_BTD = torch.cat([past.last_embeds[:, None], embeds_BTD[:, 1:]], dim=1)
            options = self._going_on(past, batch.mask_BT[:, : batch.length])
        elif batch.parts is not None:
            mask = attention_mask(batch.parts, embeds_BTD.dtype)
            options = {"attention_mask": mask, "position_ids": batch.parts.positions_BT}
        elif batch.positions_3BT is not None:
            options = {"position_ids": batch.positions_3BT[..., : batch.length]}
        nll_N = self._nll_in_chunks(batch, embeds_BTD, options, past)
        if nll_N is None:
            with self.router.one_pass():
                self._set_layout(batch, batch.length, past)
                logits_NV = target_logits(self.language_model, embeds_BTD, batch.targets, **options)
            nll_N = nll_of(logits_NV, batch.targets.label_N)
        return batch.targets.sums(nll_N), batch.targets.sums((batch.targets.label_N != IGNORED).long())

    def _nll_in_chunks(
        self, batch: Batch, embeds_BTD: Tensor, options: Mapping[str, Any], past: Past | None
    ) -> Tensor | None:
        """The NLL of each target token where its logits are computed in chunks; None where they are not."""
        if not self.chunked_loss or not wants_chunks(self.language_model, batch.targets):
            return None
        on_gpu = embeds_BTD.device.type == "cuda"
        states = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None
        with self.router.one_pass():
            self._set_layout(batch, batch.length, past)
            nll_N = nll_in_chunks(self.language_model, embeds_BTD, batch.targets, **options)
        if nll_N is None:  # once: what its family does with its logits is known now
            self.chunked_loss = False
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1])
        return nll_N

    @torch.no_grad()
    def generate_after(self, past: Past, target_context: str, max_new_tokens: int, eos_id: int) -> Tensor:
        """Generate continuations greedily; the language model is one that ``decodes`` (decoding.py).

        Args:
            past: the prompts, without their last positions.
            target_context: context of the generated tokens.
            max_new_tokens: maximum number of generated tokens.
            eos_id: token that ends a text.

        Returns:
            As ``generate``.
        """
        from harness.model.decoding import greedy  # imports transformers' generation: a second

        embeds_B1D = past.last_embeds[:, None]
        mask_BK = past.mask(torch.ones(embeds_B1D.shape[:2], dtype=torch.bool, device=embeds_B1D.device))
        host_B1 = np.array(past.last_context_ids, dtype=np.int64)[:, None]
        new_B1, past_XP = torch.from_numpy(host_B1).to(mask_BK.device), past.context_ids(mask_BK.device)
        with self.router.one_pass():
            self.router.set_context_ids(new_B1, past_XP, host_B1)
            made = self.language_model, self.router, embeds_B1D, mask_BK
            return greedy(*made, target_context, max_new_tokens, eos_id, past=past)

    @torch.no_grad()
    def generate(
        self,
        prompt: Batch,
        target_context: str,
        max_new_tokens: int,
        eos_id: int,
        num_beams: int = 1,
        synced_gpus: bool = False,
    ) -> Tensor:
        """Generate continuations by greedy or beam search, with a KV cache.

        Args:
            prompt: rows without targets, padded on the left.
            target_context: context of the generated tokens.
            max_new_tokens: maximum number of generated tokens.
            eos_id: token that ends a text.
            num_beams: 1 is greedy.
            synced_gpus: all processes go on until the last has ended, as ZeRO-3 needs.

        Returns:
            Token ids (B, at most max_new_tokens), padded with EOS.
        """
        from harness.model.decoding import decodes, greedy  # imports transformers' generation: a second

        embeds_BTD = self.embed(prompt)
        with self.router.one_pass():
            self._set_layout(prompt, embeds_BTD.shape[1])
            if num_beams == 1 and not synced_gpus and decodes(self.language_model):
                model, mask_BT, given = self.language_model, prompt.mask_BT, prompt.positions_3BT
                return greedy(model, self.router, embeds_BTD, mask_BT, target_context, max_new_tokens, eos_id, given)
            if prompt.positions_3BT is not None:
                raise UserError(
                    "the language model's positions tell where a feature is in its picture, which beams and processes "
                    "that share a model (zero_stage: 3) do not know; allowed: eval.num_beams: 1, zero_stage: 0, 1 or 2"
                )
            return self._generate(
                embeds_BTD,
                prompt,
                target_context,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                eos_token_id=eos_id,
                pad_token_id=eos_id,
                synced_gpus=synced_gpus,
            )

    def _generate(self, embeds_BTD: Tensor, prompt: Batch, target_context: str, **options: Any) -> Tensor:
        with layouts_while_generating(self.language_model, self.router, target_context):
            ids_BT: Tensor = self.language_model.generate(
                inputs_embeds=embeds_BTD, attention_mask=prompt.mask_BT.long(), do_sample=False, **options
            )
        return ids_BT
