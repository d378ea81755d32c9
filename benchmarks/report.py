"""Time and memory of a large report: ``python benchmarks/report.py [--trials 10000] [--examples 200] [--rounds 1]``.

A synthetic grid (50 methods × 5 seeds in each of its settings, every trial with its own record, per-example scores
and history) is written to a temporary folder, and ``harness report`` renders it in a separate process. Printed: wall
time, CPU time and peak memory of that process, and the sizes of the files it wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from harness.core.files import write_atomically
from harness.core.record import (
    Data,
    Epoch,
    Memory,
    MetricInfo,
    Parameters,
    Plan,
    PlannedTrial,
    Throughput,
    TrialRecord,
    write_record,
)

SEEDS, METHODS = 5, 50
METRICS = (
    MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False),
    MetricInfo(name="perplexity_wrong_input", label="Perplexity, wrong input", higher_is_better=False),
    *(
        MetricInfo(name=name, label=name, higher_is_better=True)
        for name in ("cider", "rouge_l", "bleu_4", "meteor", "spice")
    ),
)


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=200, help="Test examples of each trial.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="Write the grid to this folder and keep it.")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        run = options.keep or Path(scratch) / "synthetic"
        if not (run / "plan.json").exists():
            write_grid(run, options.trials, options.examples)
        rounds = [render(run) for _ in range(options.rounds)]
        sizes = {path.name: path.stat().st_size / 1e6 for path in sorted((run / "report").iterdir())}
    console.print(
        f"{options.trials} trials × {options.examples} test examples: wall {median(r[0] for r in rounds):.1f} s, "
        f"CPU {median(r[1] for r in rounds):.1f} s, peak {max(r[2] for r in rounds) / 2**30:.2f} GiB"
    )
    console.print(", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))


def render(run: Path) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak resident bytes of ``harness report`` (the peak of all children so far)."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [Path(sys.executable).with_name("harness"), "report", str(run)], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, cpu_s, after.ru_maxrss * 1024


def write_grid(run: Path, trials: int, examples: int) -> None:
    """Write a plan, and a record and per-example scores for every trial; the content is deterministic."""
    planned = [_planned(number) for number in range(trials)]
    plan = Plan(
        experiment="synthetic",
        experiment_file="synthetic.yaml",
        primary_metric="cider",
        metrics=METRICS,
        trials=tuple(trial for trial, *_ in planned),
    )
    write_atomically(run / "plan.json", plan.model_dump_json())
    os.environ["OMP_NUM_THREADS"] = "1"
    difficulty_E = np.random.default_rng(0).normal(0, 0.4, examples)
    for trial, budget, method in track(planned, description="writing records", transient=True):
        _write_trial(run, trial, budget, method, difficulty_E)


def _planned(number: int) -> tuple[PlannedTrial, int, int]:
    """A trial, the budget of its setting, and the number of its method: 0 none, 1 full, then LoRA of many ranks."""
    seed, method, setting = number % SEEDS, number // SEEDS % METHODS, number // SEEDS // METHODS
    budget = 2 ** (7 + setting % 8)
    name = {0: "none", 1: "full"}.get(method, "lora")
    trial = PlannedTrial(
        trial_id=hashlib.sha256(str(number).encode()).hexdigest()[:12],
        label=name if method < 2 else f"LoRA r={method // 2}",
        method=name,
        grouping="" if method < 2 else ("agnostic", "specific")[method % 2],
        setting=f"name=task-{setting // 8} examples={budget}",
        seed=seed,
        learning_rate=1e-3,
    )
    return trial, budget, method


def _write_trial(run: Path, trial: PlannedTrial, budget: int, method: int, difficulty_E: np.ndarray) -> None:
    rng = np.random.default_rng(int(trial.trial_id, 16))
    count = len(difficulty_E)
    quality = 0.4 + 0.1 * math.log2(budget / 64) + 0.02 * math.log2(method + 1) + rng.normal(0, 0.02)
    tokens_E = rng.integers(5, 25, count)
    nll_E = tokens_E * np.maximum(2.5 - quality + 0.3 * difficulty_E + rng.normal(0, 0.1, count), 0.1)
    texts = {
        name: quality + difficulty_E + rng.normal(0, 0.2, count) for name in ("cider", "rouge_l", "meteor", "spice")
    }
    table = {
        "split": ["test"] * count,
        "example_id": [f"image-{number}" for number in range(count)],
        "nll": nll_E,
        "tokens": tokens_E,
        "nll_wrong_input": nll_E * 1.2,
        "prediction": ["a red circle left of a blue square"] * count,
        "references": [["a red circle beside a blue square", "a circle in red"]] * count,
        "inputs": ['[["text", "text", "what is drawn?"]]'] * count,
        **texts,
        "bleu_4": texts["rouge_l"],
    }
    folder = run / "trials" / trial.trial_id
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / "examples.parquet")
    scores = {name: float(np.mean(values)) for name, values in texts.items()}
    scores |= {"bleu_4": scores["rouge_l"], "perplexity": math.exp(nll_E.sum() / tokens_E.sum())}
    scores["perplexity_wrong_input"] = math.exp(1.2 * nll_E.sum() / tokens_E.sum())
    write_record(run, _record(trial, budget, method, scores))


def _record(trial: PlannedTrial, budget: int, method: int, scores: dict[str, float]) -> TrialRecord:
    trainable = 10_000 + 1_500 * method
    digest = hashlib.sha256(f"{trial.setting} {trial.seed}".encode()).hexdigest()
    loss = math.log(scores["perplexity"])
    return TrialRecord(
        trial_id=trial.trial_id,
        experiment="synthetic",
        status="finished",
        spec={
            "task": {"name": trial.setting.split()[0].removeprefix("name="), "config": {}},
            "backbone": {"language_model": "builtin/tiny-llama"},
            "adapter": {
                "method": trial.method,
                "label": trial.label,
                "grouping_name": trial.grouping,
                "config": {"rank": method // 2} if trial.method == "lora" else {},
            },
            "budget": {"examples": budget, "epochs": 8},
            "optimizer": {"learning_rate": trial.learning_rate},
            "eval": {"num_beams": 1},
            "seed": trial.seed,
        },
        seed=trial.seed,
        metrics={"validation": {"perplexity": scores["perplexity"]}, "test": scores},
        history=tuple(
            Epoch(epoch=e, step=e * budget // 16, train_loss=loss + 1 / e, validation_perplexity=math.exp(loss + 1 / e),
                  learning_rate=1e-3)
            for e in range(1, 9)
        ),
        best_epoch=8,
        parameters=Parameters(trainable=trainable, adapter=trainable - 9_000, projector=9_000, language_model=552_000,
                              encoder=310_000, total=871_000 + trainable),
        memory=Memory(weights_bytes=3_400_000, gradients_bytes=4 * trainable, optimizer_bytes=8 * trainable,
                      activations_bytes=40_000_000, process_peak_bytes=800_000_000 + 12 * trainable,
                      process_before_bytes=500_000_000),
        throughput=Throughput(examples_per_s=400 - method, tokens_per_s=12_000 - 30 * method, measured_steps=100),
        data=Data(examples=budget, examples_fingerprint=digest, order_fingerprint=digest[::-1],
                  evaluation_fingerprint="ab" * 32, steps=budget // 2),
        wall_time_s=20.0 + method,
        phases_s={"build": 5.0, "train": 10.0 + method, "test": 5.0},
        started_at="2026-01-01T00:00:00Z",
        versions={"python": "3.11.7", "torch": "2.13.0"},
        git_revision="0123456789abcdef",
        device="CPU (synthetic)",
    )  # fmt: skip


if __name__ == "__main__":
    main()
