"""What the model reads: rows of token ids and encoded inputs, padded to one length, and what it is to predict.

A row holds its inputs and one target, or several targets of the same inputs (see shared_prefix.py). Shapes: B rows,
T positions, M feature vectors of all items of a context, P positions of these items, D width, N target tokens of all
rows, R targets of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from adapters.placement.router import Ids
from harness.core.contexts import Segment
from harness.model.tower import Tensors

IGNORED = -100  # label of a target token that does not count, as in torch's cross_entropy


@dataclass(frozen=True)
class Items:
    """The encoded inputs of one context in a batch, concatenated."""

    features_MD: Tensor
    lengths: tuple[int, ...]  # of the items; they sum to M
    positions_P: Tensor  # int64: index of each token into the concatenated rows (B·T), with boundary tokens
    # int64: index of each of them into the projected tokens, where several rows have the same item; None: in order
    projected_P: Tensor | None = None
    tensors: tuple[Tensors, ...] = ()  # of the items, where a tower in the step reads them

    def to(self, device: torch.device) -> Items:
        """The items on another device."""
        projected_P = None if self.projected_P is None else self.projected_P.to(device)
        features_MD, positions_P = self.features_MD.to(device), self.positions_P.to(device)
        return replace(self, features_MD=features_MD, positions_P=positions_P, projected_P=projected_P)


@dataclass(frozen=True)
class Targets:
    """The tokens that are predicted, target by target."""

    row_N: Tensor  # int64: of each token, the row
    source_N: Tensor  # int64: the position that predicts it
    label_N: Tensor  # int64: its id; IGNORED: it does not count
    place_N: Tensor  # int64: its index into all targets, each padded to ``longest`` tokens
    first_source: int  # the first position that predicts a token in any row
    longest: int  # tokens of the longest target
    count: int  # R

    @classmethod
    def of(cls, tokens: Sequence[Sequence[tuple[int, int, int]]]) -> Targets:
        """The targets, in order.

        Args:
            tokens: row, source and label of each token of each target.
        """
        longest = max(map(len, tokens), default=0)
        flat = np.array([token for own in tokens for token in own], dtype=np.int64).reshape(-1, 3)
        places = [number * longest + n for number, own in enumerate(tokens) for n in range(len(own))]
        row_N, source_N, label_N = (torch.from_numpy(column.copy()) for column in flat.T)
        return cls(
            row_N=row_N,
            source_N=source_N,
            label_N=label_N,
            place_N=torch.tensor(places, dtype=torch.int64),
            first_source=int(flat[:, 1].min(initial=np.iinfo(np.int64).max)) if len(flat) else 0,
            longest=longest,
            count=len(tokens),
        )

    def sums(self, values_N: Tensor) -> Tensor:
        """The sum over each target's tokens (R,)."""
        padded = values_N.new_zeros(self.count * self.longest).index_copy(0, self.place_N, values_N)
        return padded.view(self.count, self.longest).sum(dim=1)

    def repeated(self, times: int, rows: int) -> Targets:
        """The targets several times, each time of other rows.

        Args:
            times: how often.
            rows: B of one time.
        """
        block_M1 = torch.arange(times, device=self.row_N.device)[:, None]
        return replace(
            self,
            row_N=(self.row_N + rows * block_M1).flatten(),
            source_N=self.source_N.repeat(times),
            label_N=self.label_N.repeat(times),
            place_N=(self.place_N + self.count * self.longest * block_M1).flatten(),
            count=self.count * times,
        )

    def ignored(self) -> Targets:
        """The targets, none of whose tokens counts."""
        return replace(self, label_N=torch.full_like(self.label_N, IGNORED))

    def to(self, device: torch.device) -> Targets:
        """The targets on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("row_N", "source_N", "label_N", "place_N")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Parts:
    """What sees what in rows of several targets."""

    parts_BT: Tensor  # int64: 0 for the inputs, the number of the target in its row from 1, -1 for padding
    positions_BT: Tensor  # int64: for the language model's position embedding; (3, B, T) where they tell a grid

    def repeated(self, times: int) -> Parts:
        """The parts of all rows, one block after the other."""
        return Parts(self.parts_BT.repeat(times, 1), _rows_repeated(self.positions_BT, times))

    def to(self, device: torch.device) -> Parts:
        """The parts on another device."""
        return Parts(self.parts_BT.to(device), self.positions_BT.to(device))


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length: on the right for training and scoring, on the left for generation."""

    token_ids_BT: Tensor  # 0 for encoded inputs and padding
    context_ids_BT: Tensor  # index into the contexts; for padding, that of the target
    mask_BT: Tensor  # bool: False for padding
    items: Mapping[str, Items]  # by context, for every context that is not text, also if the batch has no item of it
    segments: tuple[Segment, ...] | None  # the layout that all rows share; None: rows differ
    targets: Targets  # for generation without tokens
    parts: Parts | None = None  # of rows of several targets; None: each row has one, and ends with its last token
    host_context_ids_BT: Ids | None = None  # context_ids_BT on the host, where it is known; else it is read from there
    positions_3BT: Tensor | None = None  # int64: where positions tell a grid, and rows have no parts; None: in order
    both_ways_BT: Tensor | None = None  # bool: which positions also see those that follow; None: none
    stand_in: bool = False  # of a worker without a row of its own
    host_tokens: int | None = None  # positions without padding, where they are known; else the mask is read

    @property
    def size(self) -> int:
        """Number of targets; of a stand-in 0."""
        return 0 if self.stand_in else self.targets.count

    @property
    def length(self) -> int:
        """Positions of a row that the language model reads: the last token of a row of one target is only predicted."""
        return self.token_ids_BT.shape[1] - (self.parts is None)

    @property
    def positions(self) -> int:
        """Positions that the language model reads in ``forward``, without padding."""
        if self.stand_in:
            return 0
        tokens = int(self.mask_BT.sum()) if self.host_tokens is None else self.host_tokens
        return tokens - (len(self.mask_BT) if self.parts is None else 0)

    def as_stand_in(self) -> Batch:
        """The batch without targets: its loss and its gradients are zero, but every parameter takes part in them."""
        return replace(self, targets=self.targets.ignored(), stand_in=True)

    def repeated(self, times: int) -> Batch:
        """All rows several times, one block after the other; the items, which models project, are left as they are."""
        host_ids_BT = None if self.host_context_ids_BT is None else np.tile(self.host_context_ids_BT, (times, 1))
        return replace(
            self,
            token_ids_BT=self.token_ids_BT.repeat(times, 1),
            context_ids_BT=self.context_ids_BT.repeat(times, 1),
            mask_BT=self.mask_BT.repeat(times, 1),
            targets=self.targets.repeated(times, self.token_ids_BT.shape[0]),
            parts=None if self.parts is None else self.parts.repeated(times),
            positions_3BT=None if self.positions_3BT is None else _rows_repeated(self.positions_3BT, times),
            both_ways_BT=None if self.both_ways_BT is None else self.both_ways_BT.repeat(times, 1),
            host_context_ids_BT=host_ids_BT,
            host_tokens=None if self.host_tokens is None else times * self.host_tokens,
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("token_ids_BT", "context_ids_BT", "mask_BT")}
        parts = None if self.parts is None else self.parts.to(device)
        items = {context: items.to(device) for context, items in self.items.items()}
        for name in ("positions_3BT", "both_ways_BT"):
            if (x := getattr(self, name)) is not None:
                moved[name] = x.to(device)
        return replace(self, items=items, targets=self.targets.to(device), parts=parts, **moved)


def _rows_repeated(positions: Tensor, times: int) -> Tensor:
    return positions.repeat(*(1,) * (positions.dim() - 2), times, 1)
