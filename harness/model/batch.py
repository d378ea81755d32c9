"""What the model reads: rows of token ids and encoded inputs, padded to one length.

Shapes: B rows, T positions, M feature vectors of all items of a context, P positions of these items, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.placement.router import Ids
from harness.core.contexts import Segment

IGNORED = -100  # label of positions without a target, as in torch's cross_entropy


@dataclass(frozen=True)
class Items:
    """The encoded inputs of one context in a batch, concatenated."""

    features_MD: Tensor
    lengths: tuple[int, ...]  # of the items; they sum to M
    positions_P: Tensor  # int64: index of each token into the concatenated rows (B·T), with boundary tokens

    def to(self, device: torch.device) -> Items:
        """The items on another device."""
        return replace(self, features_MD=self.features_MD.to(device), positions_P=self.positions_P.to(device))


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length: on the right for training and scoring, on the left for generation."""

    token_ids_BT: Tensor  # 0 for encoded inputs and padding
    context_ids_BT: Tensor  # index into the contexts; for padding, that of the target
    labels_BT: Tensor  # token ids of the target, IGNORED elsewhere
    mask_BT: Tensor  # bool: False for padding
    items: Mapping[str, Items]  # by context, for every context that is not text, also if the batch has no item of it
    segments: tuple[Segment, ...] | None  # the layout that all rows share; None: rows differ
    first_label: int  # the first position with a label in any row; T if there is none
    host_context_ids_BT: Ids | None = None  # context_ids_BT on the host, where it is known; else it is read from there
    stand_in: bool = False  # of a worker without a row of its own

    @property
    def size(self) -> int:
        """Number of rows; of a stand-in 0."""
        return 0 if self.stand_in else self.token_ids_BT.shape[0]

    @property
    def positions(self) -> int:
        """Positions that the language model reads in ``forward``, without padding and the last token of each row."""
        return 0 if self.stand_in else int(self.mask_BT.sum()) - self.size

    def as_stand_in(self) -> Batch:
        """The batch without targets: its loss and its gradients are zero, but every parameter takes part in them."""
        return replace(self, labels_BT=torch.full_like(self.labels_BT, IGNORED), stand_in=True)

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, items={c: items.to(device) for c, items in self.items.items()}, **moved)


_TENSORS = ("token_ids_BT", "context_ids_BT", "labels_BT", "mask_BT")
