"""The processes that train one trial together, its workers: which of them this one is, and what they exchange.

Each worker takes its share of every batch; what a trial is (seeds, data, their order, the batch) does not depend on how
many there are. With one worker nothing is exchanged, and torch.distributed is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This worker and how many there are.

    Every method that exchanges something must be called by all workers, in the same order.

    Attributes:
        rank: of this process, from 0; rank 0 writes what the trial leaves.
        count: of the trial.
        group: process group for tensors and objects in main memory.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the worker that writes."""
        return self.rank == 0

    @overload
    def share(self, items: range) -> range: ...
    @overload
    def share(self, items: Sequence[T]) -> Sequence[T]: ...
    def share(self, items: Any) -> Any:
        """This worker's items: every ``count``-th one. It may be empty if there are fewer items than workers."""
        return items[self.rank :: self.count] if self.count > 1 else items

    def block(self, items: Sequence[T]) -> Sequence[T]:
        """This worker's items: consecutive ones, about as many as every other has."""
        return items[len(items) * self.rank // self.count : len(items) * (self.rank + 1) // self.count]

    def total(self, *values: float) -> tuple[float, ...]:
        """The sum over workers of each value, in double precision."""
        return tuple(self.sum(np.array(values, dtype=np.float64)).tolist()) if self.count > 1 else values

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The elementwise sum over workers."""
        if self.count == 1:
            return values
        summed = torch.from_numpy(values.copy())
        distributed.all_reduce(summed, group=self.group)
        return summed.numpy()

    def gather(self, value: T) -> list[T]:
        """The values of all workers, by rank; anything that can be pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def agreed(self, value: T) -> T:
        """The value of rank 0: for decisions that would differ, such as those by a clock."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def wait(self) -> None:
        """Wait for all workers, such as for a file that rank 0 writes."""
        if self.count > 1:
            distributed.barrier(group=self.group)


ALONE = Workers()


@cache
def joined() -> Workers:
    """The workers of the process group that this process has joined, for its whole life.

    Main memory is exchanged by gloo, also where the group of the gradients is NCCL's.
    """
    count = distributed.get_world_size()
    if count == 1:
        return ALONE
    return Workers(distributed.get_rank(), count, distributed.new_group(backend="gloo"))
