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

import torch
from torch import Tensor, nn

from adapters.attach import Adapters
from adapters.placement.generation import layouts_while_generating
from adapters.placement.router import Router
from harness.core.errors import UserError
from harness.model.batch import IGNORED, Batch
from harness.model.shared_prefix import attention_mask
from harness.model.target_logits import nll_in_chunks, nll_of, target_logits, wants_chunks


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
        self.shares_prefixes: bool | None = None  # whether shared rows are right with this model; None: not yet tried

    def embed(self, batch: Batch) -> Tensor:
        """Embed tokens and project items; returns (B, T, D)."""
        embeds_BTD: Tensor = self.language_model.get_input_embeddings()(batch.token_ids_BT)
        shape = embeds_BTD.shape
        rows = embeds_BTD.flatten(0, 1)
        for context, projector in self.projectors.items():
            items = batch.items[context]
            weight = next(projector.parameters(), None)
            features_MD = items.features_MD if weight is None else items.features_MD.to(weight.dtype)
            projected_PD = projector(features_MD, items.lengths).to(rows.dtype)
            if items.projected_P is not None:
                projected_PD = projected_PD.index_select(0, items.projected_P)
            rows = rows.index_copy(0, items.positions_P, projected_PD)
        return rows.view(shape)

    def _set_layout(self, batch: Batch, length: int) -> None:
        if batch.segments is None:
            known_BT = batch.host_context_ids_BT
            self.router.set_context_ids(
                batch.context_ids_BT[:, :length], host_XT=None if known_BT is None else known_BT[:, :length]
            )
        else:
            cut = [s._replace(stop=min(s.stop, length)) for s in batch.segments if s.start < length]
            self.router.set_layout(cut, batch.token_ids_BT.device)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Score the targets.

        Returns:
            Negative log likelihood in nats, summed over each target's tokens (R,), in fp32 or better, and their number
            (R,).
        """
        embeds_BTD = self.embed(batch)[:, : batch.length]
        # Without parts no attention mask is needed: the model is causal and padding is on the right.
        options: dict[str, Any] = {}
        if batch.parts is not None:
            mask = attention_mask(batch.parts, embeds_BTD.dtype)
            options = {"attention_mask": mask, "position_ids": batch.parts.positions_BT}
        elif batch.positions_3BT is not None:
            options = {"position_ids": batch.positions_3BT[..., : batch.length]}
        nll_N = self._nll_in_chunks(batch, embeds_BTD, options)
        if nll_N is None:
            with self.router.one_pass():
                self._set_layout(batch, batch.length)
                logits_NV = target_logits(self.language_model, embeds_BTD, batch.targets, **options)
            nll_N = nll_of(logits_NV, batch.targets.label_N)
        return batch.targets.sums(nll_N), batch.targets.sums((batch.targets.label_N != IGNORED).long())

    def _nll_in_chunks(self, batch: Batch, embeds_BTD: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        """The NLL of each target token where its logits are computed in chunks; None where they are not."""
        if not self.chunked_loss or not wants_chunks(self.language_model, batch.targets):
            return None
        on_gpu = embeds_BTD.device.type == "cuda"
        states = torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None
        with self.router.one_pass():
            self._set_layout(batch, batch.length)
            nll_N = nll_in_chunks(self.language_model, embeds_BTD, batch.targets, **options)
        if nll_N is None:  # once: what its family does with its logits is known now
            self.chunked_loss = False
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1])
        return nll_N

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
