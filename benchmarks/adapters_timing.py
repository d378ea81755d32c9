"""Measurement for benchmarks/adapters.py: rounds over all cases, ratios within a round, memory separate from time.

Shapes: N tokens, D features.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.adapters_cases import FROZEN, Bench, Case, Key, Size
from harness.trial.measure import saved_for_backward


@dataclass
class Measured:
    """Results of one case."""

    saved_bytes: int  # kept for backward; each storage counted once, without weights
    peak_bytes: int  # peak during a step minus what was allocated before, gradients included
    times_s: list[float] = field(default_factory=list)  # one per round

    @property
    def median_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times_s)


Results = dict[Key, Measured]


def ratio(results: Results, key: Key, reference: Key) -> float:
    """Median over rounds of the ratio within a round, so that a slow round affects both sides."""
    pairs = zip(results[key].times_s, results[reference].times_s, strict=True)
    return statistics.median(mine / other for mine, other in pairs)


def measure(bench: Bench, keys: Sequence[Key], rounds: int) -> Results:
    """Memory of every case, which also warms it up, then its time in each round, in shuffled order."""
    cases = {key: bench.case(key) for key in keys}
    results = {key: _memory(bench, case) for key, case in cases.items()}
    order = random.Random(0)
    for _ in range(rounds):
        gc.collect()  # now, so that it does not run while a case is timed
        for key in order.sample(list(keys), len(keys)):
            results[key].times_s.append(_time_s(bench, cases[key]))
    return results


def _time_s(bench: Bench, case: Case) -> float:
    if bench.device.type == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(bench.device)
        start.record()
        bench.step(case)
        stop.record()
        torch.cuda.synchronize(bench.device)
        seconds = start.elapsed_time(stop) / 1000
    else:
        begun = time.perf_counter()
        bench.step(case)
        seconds = time.perf_counter() - begun
    bench.clear(case)
    return seconds


def _memory(bench: Bench, case: Case) -> Measured:
    """Peak memory of a step, and what its forward pass keeps; this also does the one-time work of a first step."""
    with case.attached() as model, saved_for_backward(nn.ModuleList([model, case.trained])) as saved:
        loss = bench.forward(model)
    # Saved-tensor hooks create a cycle if an operation saves its own output; only backward frees it.
    loss.backward()
    del loss
    bench.clear(case)
    peak_bytes = _peak_bytes(bench, case)
    bench.clear(case)
    return Measured(saved[0], peak_bytes)


def _peak_bytes(bench: Bench, case: Case) -> int:
    """Exact bytes allocated by PyTorch; resident memory would include what the allocator caches."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
        bench.step(case)
        return int(torch.cuda.max_memory_allocated(bench.device)) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        bench.step(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    totals = [event["args"] for event in events if event["name"] == "[memory]"]
    before = int(totals[0]["Total Allocated"]) - int(totals[0]["Bytes"])
    return max(int(args["Total Allocated"]) for args in totals) - before


def bandwidth(device: torch.device, size: Size) -> float:
    """Memory bandwidth, bytes per second: read and write of a copy of one layer's output."""
    source_ND = torch.randn(size.rows * size.length, size.feed_forward, device=device)
    target_ND = torch.empty_like(source_ND)
    seconds = []
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        target_ND.copy_(source_ND)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * source_ND.nbytes / statistics.median(seconds)


@dataclass(frozen=True)
class Limit:
    """Lower bound of a method's extra work on top of the frozen model, for any implementation."""

    extra_bytes: int
    extra_operations: int


def limit(form: str, size: Size, bytes_per_number: int = 4) -> Limit:
    """The lower bound of BitFit or IA3 in forward and backward, with each tensor read and written once.

    BitFit, every projection's output: read, write (forward); read its gradient (backward). An addition each.
    IA3, k, v and down's input: read, write; read the gradient and the value, write the value's gradient. A
    multiplication forward; two and an addition backward.
    """
    tokens = size.rows * size.length * size.layers
    if form == "BitFit":
        numbers = tokens * (4 * size.width + 2 * size.feed_forward + size.width)
        return Limit(3 * numbers * bytes_per_number, 2 * numbers)
    numbers = tokens * (2 * size.width + size.feed_forward)
    return Limit(5 * numbers * bytes_per_number, 4 * numbers)


def curve_keys(ranks: Iterable[int], contexts: Iterable[int]) -> list[Key]:
    """The frozen model, both agnostic forms per rank, and the three context-specific forms per rank and contexts."""
    forms = ("ours", "mask", "one-hot")
    keys = [Key(form, rank, number) for rank in ranks for number in contexts for form in forms]
    return [FROZEN, *(Key(form, rank) for rank in ranks for form in ("ours", "peft")), *keys]


def whole_model_keys(ranks: Iterable[int]) -> list[Key]:
    """Two contexts: the frozen model, all forms of LoRA except one-hot, BitFit and IA3."""
    lora = [Key(*k) for rank in ranks for k in (("ours", rank), ("peft", rank), ("ours", rank, 2), ("mask", rank, 2))]
    return [FROZEN, *lora, Key("BitFit", 0, 2), Key("IA3", 0, 2)]
