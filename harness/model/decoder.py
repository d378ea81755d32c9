"""The language model of a vision-language model as a causal LM: embeddings of images are among its inputs.

Where a class needs to know more of a position than its embedding, it follows there: features that inner layers add
(``Decoder``), or whether it also sees positions that follow (``BothWays``). So it goes wherever embeddings go.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F


class Decoder:
    """A vision-language model's decoder and output layer.

    It is joined with the pretrained base class of the decoder (``harness/model/vision_language.py``).

    Args:
        text: the decoder.
        head: the output layer.
        levels: how many vectors of an embedding's width follow it, each of which a layer adds to its output.
    """

    model: Any
    lm_head: Any
    both_ways: Literal["images", "prompts"] | None = None  # what sees itself as a whole; see ``BothWays``

    def __init__(self, text: Any, head: Any, levels: int) -> None:
        super().__init__(text.config)  # type: ignore[call-arg]  # of the pretrained base class
        self.model, self.lm_head = text, head
        self.width = int(text.get_input_embeddings().embedding_dim)
        self.more_width = levels * self.width

    def get_input_embeddings(self) -> Any:
        """The table of the tokens."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The output layer."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> Any:
        """As ``forward`` of the causal LMs of transformers."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if inputs_embeds is not None and inputs_embeds.shape[-1] > self.width:
            inputs_embeds, *more = torch.split(inputs_embeds, self.width, dim=-1)
            given = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
            options |= self.options_of(more, inputs_embeds, given)
            attention_mask = options.pop("attention_mask", attention_mask)
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.logits_of(self.lm_head(found.last_hidden_state[:, kept, :])),
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

    def logits_of(self, made_BTV: Tensor) -> Tensor:
        """The logits, of what the output layer has made."""
        return made_BTV

    def options_of(self, more: list[Tensor], embeds_BTD: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the decoder is called with for what follows the embeddings.

        Args:
            more: what follows them, in pieces of at most their width.
            embeds_BTD: the embeddings.
            given: attention mask, positions and cache of the pass.
        """
        # The class adds them where a mask says. An index of all rows takes the same way, and nothing waits for the
        # device to count; to what is no image nothing is added.
        rows = torch.arange(len(embeds_BTD), device=embeds_BTD.device)
        return {"visual_pos_masks": rows, "deepstack_visual_embeds": more}


class BothWays(Decoder):
    """A decoder in which the features of an image see each other (Gemma 3), or all tokens of a prompt do (PaliGemma).

    A number follows each embedding: 1 at such a position, else 0. Consecutive ones see each other.

    Attributes:
        masks_of_class: makes the masks of a pass, as the class's own ``forward`` does.
        cap: beyond which no logit of the output layer is; None: they are as they are made.
    """

    masks_of_class: Callable[..., Any]
    cap: float | None = None

    def set_attn_implementation(self, attn_implementation: Any) -> None:
        """As of the pretrained base class.

        Raises:
            ValueError: it reads no mask, so images would be causal.
        """
        name = str(attn_implementation)
        if any(kind in name for kind in ("flash", "flex", "paged")):
            raise ValueError(f"{self.both_ways} see themselves as a whole, which needs a mask; allowed: sdpa, eager")
        super().set_attn_implementation(attn_implementation)  # type: ignore[misc]  # of the pretrained base class

    @staticmethod
    def create_masks_for_generate(attention_mask: Any, **_: Any) -> Any:
        """Nothing is made before ``forward``, which alone knows where images are."""
        return attention_mask

    def logits_of(self, made_BTV: Tensor) -> Tensor:
        """As of ``Decoder``."""
        return made_BTV if self.cap is None else torch.tanh(made_BTV / self.cap) * self.cap

    def options_of(self, more: list[Tensor], embeds_BTD: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """As of ``Decoder``: the mask of the pass."""
        marked_BT = more[0][..., 0] > 0
        mask, cache = given["attention_mask"], given["past_key_values"]
        if cache is not None and cache.get_seq_length():
            return {}  # what sees itself as a whole is behind
        if isinstance(mask, Tensor) and mask.dim() == 4:  # of rows of several targets
            return {"attention_mask": mask.masked_fill(_together(marked_BT)[:, None], 0)}
        types_BT = marked_BT if self.both_ways == "images" else ~marked_BT
        own = {"config": self.config, "inputs_embeds": embeds_BTD, "token_type_ids": types_BT.long()}  # type: ignore[attr-defined]
        return {"attention_mask": self.masks_of_class(**own, **given)}


def _together(marked_BT: Tensor) -> Tensor:
    """Which positions see each other (B, T, T), bool: consecutive ones that are marked."""
    begins_BT = marked_BT & ~F.pad(marked_BT, (1, 0))[:, :-1]
    run_BT = begins_BT.cumsum(dim=1)
    both_BTT = marked_BT[:, :, None] & marked_BT[:, None, :]
    return both_BTT & (run_BT[:, :, None] == run_BT[:, None, :])
