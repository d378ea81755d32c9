"""Speed and memory of the adapters: ``python benchmarks/adapters.py [--quick] [--json out.json]``.

Forward and backward of a whole frozen llama (width 768, 12 layers, feed-forward 2048, a vocabulary of 512 so that the
head does not dominate), batch size 16, 128 positions divided evenly among the contexts (two: 64 image and 64 text). The
curve over the number of contexts, and the one-hot form, are measured on two layers of the same width, because all
layers are identical. Times are taken in rounds over all cases in one process; ratios are medians of ratios within a
round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Python puts this folder first on the path, where this file shadows the package `adapters`.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # silence the profiler, which counts memory

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import adapters_timing as timing
from benchmarks.adapters_cases import FROZEN, Bench, Key, Size

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 2**20


def main() -> None:
    """Run the benchmark and print the tables."""
    options = _options()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    size = Size(layers=1, rows=2) if options.quick else Size()
    rounds = options.rounds or (2 if options.quick else 3)
    ranks = (8, 64)
    console = Console(width=130)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {options.threads} threads"
    console.print(f"torch {torch.__version__} on {device_name}; {platform.platform()}")
    report: dict[str, Any] = {"device": device_name, "torch": torch.__version__, "quick": options.quick}

    whole = timing.measure(Bench(size, device), timing.whole_model_keys(ranks), rounds)
    report["whole_model"] = {"size": asdict(size), "rows": rows(whole)}
    console.print(_table(f"{size.layers} layers, {size.rows} rows, {rounds} rounds", whole))
    report["limits"] = limits(whole, size, timing.bandwidth(device, size))
    console.print(_limits_table(report["limits"]))

    short = replace(size, layers=min(size.layers, 2))
    contexts = (2, 8) if options.quick else (2, 4, 8)
    curve = timing.measure(Bench(short, device), timing.curve_keys(ranks, contexts), rounds)
    report["curve"] = {"size": asdict(short), "rows": rows(curve)}
    console.print(_table(f"Number of contexts: {short.layers} layers, {short.rows} rows, {rounds} rounds", curve))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer and two rows, under a minute")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch CPU threads (default 2)")
    parser.add_argument("--rounds", type=int, help="number of timings per case")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if available"
    )
    return parser.parse_args()


def rows(results: timing.Results) -> list[dict[str, Any]]:
    """One row per case: time, memory, and their ratios to the frozen model, our agnostic LoRA and PEFT's LoRA."""
    found = []
    for key, measured in results.items():
        row: dict[str, Any] = {
            **key._asdict(), "median_s": measured.median_s, "times_s": measured.times_s,
            "saved_bytes": measured.saved_bytes, "peak_bytes": measured.peak_bytes,
        }  # fmt: skip
        for name, reference in (("frozen", FROZEN), ("ours", Key("ours", key.rank)), ("peft", Key("peft", key.rank))):
            if reference in results:
                other = results[reference]
                row[f"time_by_{name}"] = timing.ratio(results, key, reference)
                row[f"saved_by_{name}"] = measured.saved_bytes / other.saved_bytes
                row[f"peak_by_{name}"] = measured.peak_bytes / other.peak_bytes
        found.append(row)
    return found


def limits(results: timing.Results, size: Size, bytes_per_s: float) -> list[dict[str, Any]]:
    """BitFit and IA3 relative to the frozen model, and their lower bound if only moving the extra bytes took time."""
    found = []
    for key in (Key("BitFit", 0, 2), Key("IA3", 0, 2)):
        least = timing.limit(key.form, size)
        seconds = least.extra_bytes / bytes_per_s
        found.append({
            "form": key.form, "time_by_frozen": timing.ratio(results, key, FROZEN),
            "limit_by_frozen": 1 + seconds / results[FROZEN].median_s, "extra_bytes": least.extra_bytes,
            "extra_operations": least.extra_operations, "bytes_per_s": bytes_per_s,
        })  # fmt: skip
    return found


def _table(title: str, results: timing.Results) -> Table:
    table = Table(title=title)
    for name in ("Form", "Rank", "Contexts", "ms", "× frozen", "× ours agnostic", "× peft", "Kept MiB", "Peak MiB",
                 "Kept × agnostic", "Peak × agnostic"):  # fmt: skip
        table.add_column(name, justify="left" if name == "Form" else "right")
    for row in rows(results):
        ratios = [row.get(f"time_by_{name}") for name in ("frozen", "ours", "peft")]
        table.add_row(
            row["form"], str(row["rank"] or "-"), "agnostic" if row["contexts"] == 1 else str(row["contexts"]),
            f"{1e3 * row['median_s']:.0f}", *_shown(ratios), f"{row['saved_bytes'] / MIB:.1f}",
            f"{row['peak_bytes'] / MIB:.1f}",
            *_shown([row.get("saved_by_ours"), row.get("peak_by_ours")]),
        )  # fmt: skip
    return table


def _limits_table(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Context-specific BitFit and IA3, and their lower bound")
    for name in ("Form", "× frozen", "Limit × frozen", "Extra GB", "Extra GFLOP", "Measured GB/s"):
        table.add_column(name, justify="left" if name == "Form" else "right")
    for row in found:
        table.add_row(
            row["form"], *_shown([row["time_by_frozen"], row["limit_by_frozen"]]), f"{row['extra_bytes'] / 1e9:.2f}",
            f"{row['extra_operations'] / 1e9:.2f}", f"{row['bytes_per_s'] / 1e9:.1f}",
        )  # fmt: skip
    return table


def _shown(ratios: Sequence[float | None]) -> list[str]:
    return ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]


if __name__ == "__main__":
    main()
