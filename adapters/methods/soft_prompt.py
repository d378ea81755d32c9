"""Soft prompts per context group: trained vectors before the sequence, attended to only by the group's own tokens.

Lester et al. 2021, arXiv 2104.08691, with one prompt per group. All prompts come first, [P_1 … P_G x_1 … x_T], and
attention is masked as if each token had only its own group's prompt: a prompt attends to itself, causally; a token to
its group's prompt and to earlier tokens; a token without group to no prompt. Every prompt has positions 0 … n - 1, and
the tokens' positions are shifted by n. With one group this is prompt tuning as in Hugging Face PEFT.

The hooks are on the model's decoder, before the output layer: logits, labels and ``logits_to_keep`` refer to the
caller's positions. ``hidden_states`` are cut to these positions, ``attentions`` are not. Adapted layers treat a group's
prompt as tokens of that group (of its first context). Sequences that are packed in a row share its prompts.

Shapes: B rows, T the caller's positions of this pass, S positions including the KV cache, N positions of all prompts, P
those of one prompt, D width, X 1 or B rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from adapters import base
from adapters.placement.offload import tensor_of
from adapters.placement.packed_rows import sequences_of
from adapters.placement.router import Layout, Router, to_device
from harness.core.errors import UserError

_OWN_MASK = ("gemma3", "paligemma")  # models whose mask is that of their own positions


class SoftPromptConfig(base.Config):
    """Options, named as in Hugging Face PEFT where it has them."""

    num_virtual_tokens: PositiveInt = 8
    init: Literal["vocab", "normal"] = "vocab"  # rows of the embedding, or random vectors with its standard deviation


class Prompt(nn.Module):
    """One group's vectors, ``embedding`` (P, D)."""

    def __init__(self, embedding_PD: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding_PD)

    def forward(self, rows: int, dtype: torch.dtype) -> Tensor:
        """The prompt repeated for every row (B, P, D)."""
        return self.embedding.to(dtype).repeat(rows, 1, 1)


class SoftPrompts(base.ModelChange):
    """All groups' prompts, and the hooks that prepend them to the sequence."""

    def __init__(self, prompts: Mapping[str, Tensor], router: Router) -> None:
        super().__init__()
        self.prompts = nn.ModuleDict({f"group_{group}": Prompt(vectors) for group, vectors in prompts.items()})
        self.router = router
        self.length = next(iter(prompts.values())).shape[0]
        self.groups = tuple(prompts)
        contexts = {group: context for context, group in reversed(router.grouping.items())}
        self._context_ids = [router.contexts.index(contexts[group]) for group in prompts]

    def by_group(self) -> Mapping[str, nn.Module]:
        """Group → its prompt."""
        return dict(zip(self.groups, self.prompts.values(), strict=True))

    def attach(self, language_model: Any) -> Callable[[], None]:
        """Register hooks on the decoder. Returns a function that removes them.

        Raises:
            UserError: the decoder already has soft prompts, or it does not take the positions and the mask they need.
        """
        decoder = language_model.get_decoder()
        takes = inspect.signature(decoder.forward).parameters
        lacks = [name for name in ("inputs_embeds", "attention_mask", "position_ids") if name not in takes]
        why = f"{type(decoder).__name__} takes no {', '.join(lacks)}" if lacks else _why_not(language_model, decoder)
        if why is not None:
            raise UserError(f"soft_prompt cannot be used with a {language_model.config.model_type} model: {why}")
        if any(
            isinstance(getattr(hook, "__self__", None), SoftPrompts) for hook in decoder._forward_pre_hooks.values()
        ):
            raise UserError("soft_prompt: all groups of a model must have the same options")
        handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]
        return partial(_remove, handles)

    def _before(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Prepend the prompts in the first pass of a sequence; set mask and positions in every pass."""
        given = {**dict(zip(inspect.signature(decoder.forward).parameters, args, strict=False)), **kwargs}
        ids, embeds_BTD = given.pop("input_ids", None), given.get("inputs_embeds")
        if embeds_BTD is None:
            embeds_BTD = decoder.get_input_embeddings()(ids)
        rows, length = embeds_BTD.shape[:2]
        cache = given.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        prompts = list(self.prompts.values())
        added = 0 if cached else self.length * len(prompts)
        past = cached - self.length * len(prompts) if cached else 0  # cached positions without the prompts
        layout = self._callers_layout(length)
        padding_BS, device = given.get("attention_mask"), embeds_BTD.device
        _check_grows(cache)
        mask_XKK = self._mask(layout, past, padding_BS, device, sequences_of(decoder.config, given))
        positions_XT = self._positions(past, length, padding_BS, given.get("position_ids"), added, device)
        if not cached:
            embeds_BTD = torch.cat([*(prompt(rows, embeds_BTD.dtype) for prompt in prompts), embeds_BTD], dim=1)
            self._set_layout(layout)
        else:
            self.router.use(layout)
        given["inputs_embeds"] = embeds_BTD
        given["attention_mask"] = _for_attention(decoder.config, mask_XKK, embeds_BTD.dtype)
        given["position_ids"] = positions_XT
        return (), given

    def _after(self, _decoder: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Remove the prompts' positions from the output."""
        layout = self.router.layout
        if layout.of_caller is not None:
            added = layout.length - layout.of_caller.length
            output.last_hidden_state = output.last_hidden_state[:, added:]
            if output.get("hidden_states") is not None:
                output.hidden_states = tuple(hidden_BTD[:, added:] for hidden_BTD in output.hidden_states)
        return output

    def _callers_layout(self, length: int) -> Layout:
        """The layout without prompts, even if it was set once for several passes."""
        layout = self.router.layout
        layout = layout.of_caller or layout
        if layout.length != length:
            raise RuntimeError(
                f"the layout covers {layout.length} positions but the batch has {length}; set it before forward"
            )
        return layout

    def _set_layout(self, layout: Layout) -> None:
        """Include the prompts, for adapted layers."""
        self.router.prepend(layout, [i for i in self._context_ids for _ in range(self.length)])

    def _mask(
        self,
        layout: Layout,
        past: int,
        attention_mask: Tensor | None,
        device: torch.device,
        sequence_XT: Tensor | None = None,
    ) -> Tensor:
        """Attention mask, True where attended: (X, N + T, N + S) in the first pass, (X, T, N + S) later."""
        if isinstance(attention_mask, Mapping):
            raise UserError("soft_prompt: this model makes a mask for each kind of layer, which it cannot replace")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise UserError(
                f"soft_prompt: attention_mask: found {attention_mask.dim()} dimensions; allowed: 2, (rows, positions)"
            )
        group_N = to_device([layout.groups.index(g) for g in self.groups for _ in range(self.length)], device)
        place_T = torch.arange(past, past + layout.length, device=device)
        place_S = torch.arange(past + layout.length, device=device)
        earlier_XTS = (place_S <= place_T[:, None])[None]
        if attention_mask is not None:
            # Padding attends to itself: a softmax over no keys would be undefined.
            earlier_XTS = earlier_XTS & attention_mask.to(device, torch.bool)[:, None] | (place_S == place_T[:, None])
        if sequence_XT is not None:
            earlier_XTS = earlier_XTS & (sequence_XT[:, :, None] == sequence_XT[:, None])
        own_XTN = layout.group_ids_XT[..., None] == group_N
        rows = max(len(own_XTN), len(earlier_XTS))
        mask_XTK = torch.cat([own_XTN.expand(rows, -1, -1), earlier_XTS.expand(rows, -1, -1)], dim=-1)
        if past:
            return mask_XTK
        within_NN = (group_N[:, None] == group_N).tril()
        prompts_XNK = F.pad(within_NN, (0, len(place_S))).expand(rows, -1, -1)
        return torch.cat([prompts_XNK, mask_XTK], dim=1)

    def _positions(
        self,
        past: int,
        length: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        added: int,
        device: torch.device,
    ) -> Tensor:
        """Position ids (X, N + T) in the first pass, (X, T) later; without the caller's ids, padding is not counted."""
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + length, device=device)[None]
        positions_XT = position_ids + self.length
        own_N = torch.arange(self.length, device=device).repeat(added // self.length)
        return torch.cat([own_N.expand(len(positions_XT), -1), positions_XT], dim=1)


def _why_not(language_model: Any, decoder: Any) -> str | None:
    """Why positions cannot be put before those of a model; None: they can."""
    if getattr(decoder.config, "alibi", False):
        return "positions are biases (alibi)"
    if "mrope_section" in (getattr(decoder.config, "rope_parameters", None) or {}):
        return "its positions have three axes"
    if language_model.config.model_type in _OWN_MASK or getattr(language_model, "both_ways", None):
        return "it makes a mask of its own, in which the tokens of a picture see each other"
    return None


def _check_grows(cache: Any) -> None:
    """Check that a cache is not of a fixed size: that would be the caller's positions, without the prompts.

    Raises:
        UserError: it is.
    """
    if any(hasattr(layer, "max_cache_len") and not layer.is_sliding for layer in getattr(cache, "layers", ())):
        raise UserError(
            f"soft_prompt: past_key_values: found a {type(cache).__name__}, of a fixed size without room for prompts; "
            "allowed: a DynamicCache (generate without cache_implementation)"
        )


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _for_attention(config: Any, mask_XKK: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (X, 1, …) in the form of the model's attention: additive for eager, else boolean, True where attended.

    Raises:
        UserError: the attention does not accept a mask, or the mask would override a sliding window.
    """
    implementation = str(config._attn_implementation)
    if implementation.startswith(("flash", "flex", "paged")):
        raise UserError(f"soft_prompt: attention {implementation!r} does not accept a mask; allowed: sdpa, eager")
    window, keys = _window(config), mask_XKK.shape[-1]
    if window is not None and keys > window:
        raise UserError(f"soft_prompt: {keys} positions, prompts included, exceed sliding_window={window}")
    mask_X1KK = mask_XKK[:, None]
    if implementation != "eager":
        return mask_X1KK
    return torch.zeros(mask_X1KK.shape, dtype=dtype, device=mask_XKK.device).masked_fill(
        ~mask_X1KK, torch.finfo(dtype).min
    )


def _window(config: Any) -> int | None:
    """The sliding window of some layer; 0 and None are off, as is a window that no layer uses."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None) or None


class SoftPrompt(base.AdapterMethod):
    """Prompt tuning with one prompt per group."""

    summary = "soft prompts: trained vectors before the sequence, attended to by the group's own tokens"
    identity_at_start = False
    not_stacked = "a token attends to one prompt, and two prompts have no sum"
    Config = SoftPromptConfig
    config: SoftPromptConfig

    @property
    def name(self) -> str:
        """Short name in parameter paths."""
        return "soft_prompt"

    def label(self) -> str:
        """``soft prompt n=8``."""
        return f"soft prompt n={self.config.num_virtual_tokens}"

    def model_change(
        self,
        language_model: Any,
        groups: Sequence[str],
        router: Router,
        shared: nn.Module | None,
        generator: torch.Generator,
    ) -> base.ModelChange:
        """One prompt per group, initialised in the order of the groups."""
        weight_VD = tensor_of(language_model.get_input_embeddings(), "weight").detach().float()
        return SoftPrompts({group: self._draw(weight_VD, generator) for group in groups}, router)

    def _draw(self, weight_VD: Tensor, generator: torch.Generator) -> Tensor:
        count, (vocabulary, width) = self.config.num_virtual_tokens, weight_VD.shape
        if self.config.init == "vocab":
            drawn_P = torch.randint(vocabulary, (count,), generator=generator, device="cpu")
            return weight_VD[drawn_P.to(weight_VD.device)].clone()
        random_PD = torch.randn(count, width, generator=generator, device="cpu").to(weight_VD.device)
        return random_PD * weight_VD.std()
