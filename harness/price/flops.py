"""FLOPs of operations that torch's table lacks: ``FlopCounterMode`` counts them as none."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


def _as(known: Any) -> Callable[..., int]:
    """The formula of an operation whose arguments begin alike."""
    formula = flop_registry[known]

    @wraps(formula)
    def count(*args: Any, **kwargs: Any) -> int:
        return int(formula(*args, **kwargs))

    count._get_raw = True  # type: ignore[attr-defined]  # it takes tensors, as those of torch's table do
    return count


_ATEN = torch.ops.aten
FORMULAS = {  # for ``custom_mapping``
    # Products that are added in place: of LoRA's backward.
    _ATEN.addmm_: _as(_ATEN.addmm),
    _ATEN.baddbmm_: _as(_ATEN.baddbmm),
    # Attention on a CPU.
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _as(_ATEN._scaled_dot_product_flash_attention),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _as(_ATEN._scaled_dot_product_flash_attention_backward),
}
