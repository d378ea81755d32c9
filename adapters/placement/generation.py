"""Layouts during generation: first that of the prompt, then that of the new tokens only; the KV cache holds the rest.

Shapes: B rows (beams included), T positions of the prompt or of the new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters.placement.router import Ids, Router, on_host


@contextmanager
def layouts_while_generating(
    language_model: nn.Module, router: Router, new_token_context: str, prompt_host_XT: Ids | None = None
) -> Iterator[None]:
    """Keep the router's layout correct inside ``language_model.generate``. Set the prompt's layout before entering.

    All beams of a row have the row's layout; reordering beams never mixes rows.

    Args:
        language_model: the model whose ``generate`` is called.
        router: the router of its adapters, with the prompt's layout.
        new_token_context: context of the generated tokens.
        prompt_host_XT: the prompt's context ids on the host, if known; otherwise they are read.
    """
    prompt_XT = router.layout.context_ids_XK
    host_prompt_XT = on_host(prompt_XT) if prompt_host_XT is None else prompt_host_XT
    new_id = router.contexts.index(new_token_context)
    seen = 0  # positions of the sequence up to the end of the latest pass
    before_XN: Tensor | None = None  # contexts of positions in the cache that are not the caller's: soft prompts

    def set_layout(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        new = given if given is not None else kwargs.get("input_ids", args[0] if args else None)
        assert new is not None  # noqa: S101 - generate passes one of the two
        nonlocal seen, before_XN
        cache = kwargs.get("past_key_values")
        latest = router.layout
        if latest.of_caller is not None:
            before_XN = latest.context_ids_XK[:, : latest.length - latest.of_caller.length]
        in_front = 0 if cache is None or before_XN is None else before_XN.shape[1]
        rows, length = new.shape[0], new.shape[1]
        # Without a cache every pass covers the whole sequence, which grows. A pass that is no longer than what was seen
        # continues a state that the model keeps in another form (Mamba's cache_params, RWKV's state).
        without = 0 if length > seen else seen
        cached = without if cache is None else max(int(cache.get_seq_length()) - in_front, 0)
        seen = cached + length
        repeats = 1 if prompt_XT.shape[0] == 1 else rows // prompt_XT.shape[0]
        first_XT = prompt_XT if repeats == 1 else prompt_XT.repeat_interleave(repeats, 0)
        # The same on the host, so that no pass reads from the device.
        host_XT = np.full((first_XT.shape[0], length), new_id, dtype=np.int64)
        of_prompt_XT = host_prompt_XT[:, cached : cached + length].repeat(repeats, axis=0)
        host_XT[:, : of_prompt_XT.shape[1]] = of_prompt_XT
        # The prompt, possibly in chunks, then new tokens.
        new_tokens = max(cached + length - first_XT.shape[1], 0)
        tail_XT = torch.full((first_XT.shape[0], new_tokens), new_id, device=new.device)
        all_XT = torch.cat([first_XT, tail_XT], dim=1)
        past_XK = all_XT[:, :cached] if cached else None
        if in_front and past_XK is not None and before_XN is not None:
            rows = max(len(before_XN), len(past_XK))
            past_XK = torch.cat([before_XN.expand(rows, -1), past_XK.expand(rows, -1)], dim=1)
        router.set_context_ids(all_XT[:, cached : cached + length], past_XK, host_XT)

    # Before the hooks of methods that add to the layout (moka's padding mask).
    handle = language_model.register_forward_pre_hook(set_layout, with_kwargs=True, prepend=True)
    try:
        with router.one_generation():
            yield
    finally:
        handle.remove()
