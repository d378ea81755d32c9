"""How far the machine could go: FLOPs and bytes of a training step, and what a matrix product and a copy reach."""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.speed import steps
from benchmarks.speed.measure import Row, Say
from harness.price.flops import FORMULAS

MINUTES = 1.0
MOST_OPERATIONS = 14  # in the profile
METHODS = ("none", "LoRA r=4 agnostic", "LoRA r=4 specific", "full fine-tuning")
_FORMULAS = {**flop_registry, **FORMULAS}


def add_options(parser: argparse.ArgumentParser) -> None:
    """This part has none of its own."""


def measure(options: argparse.Namespace, folder: Path, say: Say) -> dict[str, Any]:
    """Count the operations of a step of each method, time the step, and measure the machine's peaks.

    Args:
        options: ``rounds``.
        folder: for files.
        say: tells progress.
    """
    peaks, found, data = None, {}, None
    for spec in steps.step_specs(folder):
        name = f"{spec.adapter.label} {spec.adapter.grouping_name}".strip()
        if name not in METHODS:
            continue
        trial = steps.built_trial(spec, folder / "trial", data)  # which also sets the number of threads
        data = trial.stages.built.data
        peaks = peaks or machine_peaks()
        step = steps.engine_step(trial)
        counted = count(lambda step=step: step(0))
        (times,) = steps.in_turn({name: step}, 20 * options.rounds).values()
        found[name] = {
            "step_s": statistics.median(times),
            "flops": counted.flops,
            "bytes": counted.bytes,
            "operations": counted.operations,
            "limit_s": counted.limit_s(**peaks),
            "products_s": counted.flops / peaks["flops_per_s"],
            "profile": profiled(step),
        }
        say(f"limits, {name}")
    return {"peaks": peaks, "steps": found}


def machine_peaks() -> dict[str, float]:
    """FLOP/s of a large matrix product in fp32, and bytes/s of a copy that fits the last-level cache.

    A copy in main memory is slower; the limit is one that no implementation can pass.
    """
    size = 768
    a, b = torch.randn(size, size), torch.randn(size, size)
    source = torch.randn(2**18)  # 1 MiB
    target = torch.empty_like(source)
    return {
        "flops_per_s": 2 * size**3 / fastest(lambda: torch.mm(a, b)),
        "bytes_per_s": 2 * source.nbytes / fastest(lambda: target.copy_(source)),
    }


def fastest(function: Callable[[], Any], repeats: int = 50) -> float:
    """The shortest CPU time of a call."""
    function()
    best = math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best


@dataclass
class Counted:
    """Operations of torch, by name: how many, their FLOPs, and bytes that they read and write."""

    calls: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of matrix products and attention; element-wise operations count with their bytes."""
        return sum(flops for _, flops, _ in self.calls)

    @property
    def bytes(self) -> int:
        """Read and written, each operand once by each operation."""
        return sum(size for *_, size in self.calls)

    @property
    def operations(self) -> int:
        """Calls that are no views."""
        return len(self.calls)

    def limit_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Each operation at the machine's peak of what bounds it: products of FLOPs, others of bytes; no overhead."""
        return sum(flops / flops_per_s if flops else size / bytes_per_s for _, flops, size in self.calls)

    def by_name(self) -> dict[str, tuple[int, int, int]]:
        """Operation → calls, FLOPs, bytes."""
        found: dict[str, tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
        for name, flops, size in self.calls:
            found[name] = tuple(map(sum, zip(found[name], (1, flops, size), strict=True)))  # type: ignore[assignment]
        return dict(found)


class _Counter(TorchDispatchMode):
    """Sees every operation below autograd, forward and backward."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet, outputs = func._overloadpacket, _tensors(out)
        inputs = _tensors([args, kwargs or {}])
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        written = [x for x in outputs if x.untyped_storage().data_ptr() not in storages]
        if not written and not func._schema.is_mutable:
            return out  # a view
        flops = _FORMULAS[packet](*args, **(kwargs or {}), out_val=out) if packet in _FORMULAS else 0
        size = sum(x.numel() * x.element_size() for x in (*inputs, *(written or outputs)))
        self.counted.calls.append((str(packet), int(flops), size))
        return out


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [x for one in value.values() for x in _tensors(one)]
    if isinstance(value, list | tuple):
        return [x for one in value for x in _tensors(one)]
    return []


def count(function: Callable[[], Any]) -> Counted:
    """Count what a call computes."""
    counted = Counted()
    with _Counter(counted):
        function()
    return counted


def profiled(step: Callable[[int], None], steps_taken: int = 10) -> dict[str, tuple[float, float]]:
    """Operation → calls and milliseconds of its own, per step, by torch's profiler, which adds about 1 µs a call."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when the profiler starts
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        for number in range(steps_taken):
            step(number)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {
        event.key: (event.count / steps_taken, event.self_cpu_time_total / 1e3 / steps_taken)
        for event in events[:MOST_OPERATIONS]
    }


def rows(_: Mapping[str, Any]) -> Sequence[Row]:
    """No lines of the table: nothing is to be reached."""
    return []


def notes(found: Mapping[str, Any]) -> str:
    """Markdown."""
    peaks = found["peaks"]
    lines = [
        f"One thread reaches {peaks['flops_per_s'] / 1e9:.0f} GFLOP/s in a matrix product (768 × 768, fp32) and "
        f"{peaks['bytes_per_s'] / 1e9:.1f} GB/s in a copy that stays in the cache. The limit takes every product at "
        "the first and every other operation, with each operand read or written once, at the second, and nothing for "
        "calling them.",
        "",
        "| step | ms | GFLOP | MB moved | operations | products at peak, ms | limit, ms | limit ÷ none's limit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    least = found["steps"]["none"]["limit_s"]
    for name, one in found["steps"].items():
        lines.append(
            f"| {name} | {1e3 * one['step_s']:.1f} | {one['flops'] / 1e9:.2f} | {one['bytes'] / 1e6:.0f} | "
            f"{one['operations']:,} | {1e3 * one['products_s']:.1f} | {1e3 * one['limit_s']:.1f} | "
            f"{one['limit_s'] / least:.2f} |"
        )
    name = "LoRA r=4 specific"
    lines += ["", f"Profile of a step, {name} beside the frozen model (torch.profiler, self CPU time):", ""]
    lines += ["| operation | calls | ms | frozen: calls | ms |", "|---|---:|---:|---:|---:|"]
    frozen = found["steps"]["none"]["profile"]
    for operation, (calls, ms) in found["steps"][name]["profile"].items():
        other = [f"{value:,.0f}" if n == 0 else f"{value:.1f}" for n, value in enumerate(frozen.get(operation, ()))]
        lines.append(f"| {operation} | {calls:,.0f} | {ms:.1f} | {' | '.join(other or ['', ''])} |")
    return "\n".join(lines)
