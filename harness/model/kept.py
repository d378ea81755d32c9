"""What a worker keeps from one trial for the next: examples, encoders and their features, the language model's weights.

A value is kept under a key that names everything it depends on, and no trial changes it: encoders are frozen, and each
trial gets its own copy of the language model. So a trial computes the same after others as in a process of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

LIMIT_BYTES = 1 << 30  # of all values; a larger language model or encoder is loaded for each trial
Key = tuple[Hashable, ...]
T = TypeVar("T")


@dataclass
class _Entry:
    value: Any
    size_bytes: int
    device: str  # kind of the device whose memory it takes
    trial: int  # number of the latest trial that used it


class Kept:
    """Values by key, of at most ``limit_bytes`` in all; the least recently used ones go first.

    Args:
        limit_bytes: 0: nothing is kept.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._trial = 0
        self._shift_bytes: dict[str, int] = {}

    def begin(self) -> None:
        """Another trial begins."""
        self._trial += 1
        self._shift_bytes = {}

    def shift_bytes(self, device: torch.device) -> int:
        """What to add to a device's memory as it was before this trial, so that its growth is that of a trial alone.

        What the trial uses of earlier ones was there before; what it loaded only for later ones is not its own.
        """
        return self._shift_bytes.get(device.type, 0)

    def of(
        self,
        key: Key,
        make: Callable[[], T],
        size: Callable[[T], int],
        device: str = "cpu",
        spare: Callable[[T], bool] = lambda _: False,
    ) -> T:
        """The value of a key: the kept one, or what ``make`` returns.

        Args:
            key: begins with the kind of the value, and names everything that the value depends on.
            make: makes it.
            size: its bytes; a value that is larger than the limit is not kept.
            device: kind of the device whose memory it takes.
            spare: whether the trial uses a copy, so that the value itself is for later ones alone.
        """
        entry = self._entries.get(key)
        if entry is None:
            made = make()
            self._keep(key, _Entry(made, size(made), device, self._trial), spare(made))
            return made
        self._entries.move_to_end(key)
        found: T = entry.value
        if entry.trial != self._trial and not spare(found):
            self._shift(entry.device, -entry.size_bytes)
        entry.trial = self._trial
        return found

    def _keep(self, key: Key, entry: _Entry, spare: bool) -> None:
        if entry.size_bytes > self.limit_bytes or not self.limit_bytes:
            return
        self._entries[key] = entry
        if spare:
            self._shift(entry.device, entry.size_bytes)
        taken = sum(entry.size_bytes for entry in self._entries.values())
        while taken > self.limit_bytes:
            _, oldest = self._entries.popitem(last=False)
            taken -= oldest.size_bytes

    def _shift(self, device: str, size_bytes: int) -> None:
        self._shift_bytes[device] = self._shift_bytes.get(device, 0) + size_bytes

    def __contains__(self, key: Key) -> bool:
        """Whether a value of this key is kept."""
        return key in self._entries

    def forget(self, kind: str, but: Key) -> None:
        """Free the values of a kind, such as the language models of other backbones, except that of one key."""
        for key in [key for key in self._entries if key[0] == kind and key != but]:
            del self._entries[key]

    @contextmanager
    def dropped_on_error(self) -> Iterator[None]:
        """Keep nothing if the block ends with an error or an interrupt: nobody knows what it left behind."""
        try:
            yield
        except BaseException:
            self._entries.clear()
            raise


OF_WORKER = Kept()  # of this process, if it is a worker, which runs several trials


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
