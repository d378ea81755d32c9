"""What rows begin with, computed once: keys and values of a prompt, from which generation and scoring go on.

A prompt may begin with another one (questions about one picture, the turns of a conversation): then it goes on from
there itself. The last position of a prompt is computed again by whatever goes on, because it predicts the first token.

Shapes: B rows, P positions before, T new positions, K all of them, D width, H heads, E width of a head; X is B, or 1
where all rows are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adapters.placement.router import Ids


@dataclass(frozen=True)
class Prefix:
    """A prompt, or the beginning of one, as a language model with its adapters has read it."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # keys and values (H, P, E)
    context_ids: Ids  # (P,)
    last_D: Tensor  # embedding of the last position

    @property
    def length(self) -> int:
        """Positions."""
        return len(self.context_ids)

    @property
    def size_bytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(x.nbytes for layer in self.layers for x in layer)


@dataclass(frozen=True)
class Past:
    """The prefixes of a batch's rows, padded on the left to one length.

    Args:
        prefixes: of each row.
        again: the last position of each is computed again, and so left out here.
        padding: context id of the padding.
    """

    prefixes: Sequence[Prefix]
    again: bool
    padding: int

    @property
    def lengths(self) -> list[int]:
        """Positions of each row."""
        return [prefix.length - self.again for prefix in self.prefixes]

    @property
    def last_embeds(self) -> Tensor:
        """The embedding of each row's last position (B, D)."""
        return torch.stack([prefix.last_D for prefix in self.prefixes])

    @property
    def last_context_ids(self) -> list[int]:
        """The context of each row's last position."""
        return [int(prefix.context_ids[-1]) for prefix in self.prefixes]

    def context_ids(self, device: torch.device) -> Tensor:
        """Index into the contexts of each position (X, P); one row if all are alike."""
        longest = max(self.lengths)
        ids_BP = np.full((len(self.prefixes), longest), self.padding, dtype=np.int64)
        for row, (prefix, length) in enumerate(zip(self.prefixes, self.lengths, strict=True)):
            ids_BP[row, longest - length :] = prefix.context_ids[:length]
        return torch.from_numpy(ids_BP[:1] if (ids_BP == ids_BP[:1]).all() else ids_BP).to(device)

    def fill(self, cache: Any) -> None:
        """Put the keys and values into an empty cache of the language model."""
        distinct = {id(prefix): prefix for prefix in self.prefixes}
        places = {key: place for place, key in enumerate(distinct)}
        longest = max(self.lengths)
        rows_B = torch.tensor([places[id(prefix)] for prefix in self.prefixes], device=self.prefixes[0].last_D.device)

        def padded(x: Tensor) -> Tensor:
            length = x.shape[1] - self.again
            return x[:, :length] if length == longest else F.pad(x[:, :length], (0, 0, longest - length, 0))

        for layer in range(len(self.prefixes[0].layers)):
            keys_BHPE, values_BHPE = (
                torch.stack([padded(prefix.layers[layer][part]) for prefix in distinct.values()])[rows_B]
                for part in (0, 1)
            )
            cache.update(keys_BHPE, values_BHPE, layer)

    def mask(self, new_BT: Tensor) -> Tensor:
        """Which positions are there, before and new (B, K), bool.

        Args:
            new_BT: of the new ones.
        """
        longest = max(self.lengths)
        starts_B1 = longest - torch.tensor(self.lengths, device=new_BT.device)[:, None]
        return torch.cat([torch.arange(longest, device=new_BT.device) >= starts_B1, new_BT], dim=1)

    def new_positions(self, count: int, device: torch.device) -> Tensor:
        """The positions of ``count`` new tokens in their rows (B, T)."""
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(count, device=device)


def prefixes_in(cache: Any, rows: Sequence[tuple[int, int]], ids: Sequence[Ids], last_BD: Tensor) -> list[Prefix]:
    """The prefixes that a pass has left in its cache.

    Args:
        cache: of the pass.
        rows: of each row, the first position and the one after the last.
        ids: of each row, the context ids.
        last_BD: of each row, the embedding of the last position.
    """
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return [
        Prefix(
            tuple((keys[row, :, start:stop].clone(), values[row, :, start:stop].clone()) for keys, values in layers),
            own,
            last_BD[row],
        )
        for row, ((start, stop), own) in enumerate(zip(rows, ids, strict=True))
    ]
