"""The language model of a vision-language model as a causal LM: embeddings of images are among its inputs.

Where a class needs to know more of a position than its embedding, it follows there: features that inner layers add
(``Decoder``), or whether an image is there (``BothWays``). So it goes wherever embeddings go.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    marks_images = False  # whether a number follows each embedding: 1 at an image's features, else 0

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
            logits=self.lm_head(found.last_hidden_state[:, kept, :]),
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )

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
    """A decoder in which the features of an image see each other, also those that follow (Gemma 3).

    Attributes:
        masks_of_class: makes the masks of a pass, as the class's own ``forward`` does.
    """

    marks_images = True
    masks_of_class: Callable[..., Any]

    def set_attn_implementation(self, attn_implementation: Any) -> None:
        """As of the pretrained base class.

        Raises:
            ValueError: it reads no mask, so images would be causal.
        """
        name = str(attn_implementation)
        if any(kind in name for kind in ("flash", "flex", "paged")):
            raise ValueError("the features of an image see each other, which needs a mask; allowed: sdpa, eager")
        super().set_attn_implementation(attn_implementation)  # type: ignore[misc]  # of the pretrained base class

    @staticmethod
    def create_masks_for_generate(attention_mask: Any, **_: Any) -> Any:
        """Nothing is made before ``forward``, which alone knows where images are."""
        return attention_mask

    def options_of(self, more: list[Tensor], embeds_BTD: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """As of ``Decoder``: the mask of the pass."""
        marked_BT = more[0][..., 0] > 0
        mask, cache = given["attention_mask"], given["past_key_values"]
        if cache is not None and cache.get_seq_length():
            return {}  # images are behind
        if isinstance(mask, Tensor) and mask.dim() == 4:  # of rows of several targets
            return {"attention_mask": mask.masked_fill(_same_image(marked_BT)[:, None], 0)}
        own = {"config": self.config, "inputs_embeds": embeds_BTD, "token_type_ids": marked_BT.long()}  # type: ignore[attr-defined]
        return {"attention_mask": self.masks_of_class(**own, **given)}


def _same_image(marked_BT: Tensor) -> Tensor:
    """Which positions are of one image (B, T, T), bool: consecutive ones that are marked."""
    begins_BT = marked_BT & ~F.pad(marked_BT, (1, 0))[:, :-1]
    image_BT = begins_BT.cumsum(dim=1)
    both_BTT = marked_BT[:, :, None] & marked_BT[:, None, :]
    return both_BTT & (image_BT[:, :, None] == image_BT[:, None, :])
