"""Several sequences packed in one row, told apart by positions that start again, as transformers does.

The base then lets no token see another sequence's, so what adapters let tokens see must end there too.
Shapes: X 1 or B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def sequences_of(config: Any, given: Mapping[str, Any]) -> Tensor | None:
    """The number of the sequence that each position belongs to (X, T); None: each row is one.

    Args:
        config: of the decoder.
        given: the arguments of its pass. Only without a mask and without a cache are positions looked at
            (``transformers.masking_utils``).
    """
    positions_XT, use_cache = given.get("position_ids"), given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(config, "use_cache", False)
    others = (given.get("attention_mask"), given.get("past_key_values"))
    if use_cache or not isinstance(positions_XT, Tensor) or any(other is not None for other in others):
        return None
    if positions_XT.dim() != 2:
        return None  # several axes: rows and columns of pictures
    starts_XT = torch.diff(positions_XT, dim=-1, prepend=positions_XT[:, :1] - 1) != 1
    return starts_XT.cumsum(-1)
