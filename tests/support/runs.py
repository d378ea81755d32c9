"""Run folders made of synthetic records, for the tests of results: made-up numbers in the shapes of the real files."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

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

METRICS = (
    MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False),
    MetricInfo(name="perplexity_wrong_input", label="Perplexity, wrong input", higher_is_better=False),
    MetricInfo(name="cider", label="CIDEr", higher_is_better=True),
    MetricInfo(name="bleu_4", label="BLEU-4", higher_is_better=True),
)
# label, method, grouping, trainable parameters, made-up quality (higher = better)
METHODS: tuple[tuple[str, str, str, int, float], ...] = (
    ("none", "none", "", 9_312, 0.0),
    ("IA3", "ia3", "agnostic", 10_848, 0.25),
    ("IA3", "ia3", "specific", 12_384, 0.3),
    ("BitFit", "bitfit", "agnostic", 13_152, 0.45),
    ("BitFit", "bitfit", "specific", 16_992, 0.55),
    ("LoRA r=4", "lora", "agnostic", 45_000, 0.8),
    ("LoRA r=4", "lora", "specific", 80_688, 0.95),
    ("Full fine-tuning", "full", "", 561_312, 1.0),
)
Change = Callable[[PlannedTrial, TrialRecord], TrialRecord | None]


def fake_plan(
    seeds: Sequence[int] = (0, 1),
    settings: Sequence[str] = ("examples=1024 epochs=8",),
    methods: Iterable[tuple[str, str, str, int, float]] = METHODS,
    **changes: Any,
) -> Plan:
    """A plan over made-up methods."""
    trials = tuple(
        PlannedTrial(
            trial_id=f"{method}-{grouping or 'all'}-{number}{label.count('r')}-s{seed}-{settings.index(setting)}",
            label=label,
            method=method,
            grouping=grouping,
            setting=setting,
            seed=seed,
        )
        for setting in settings
        for number, (label, method, grouping, _, _) in enumerate(methods)
        for seed in seeds
    )
    fields: dict[str, Any] = {
        "experiment": "synthetic",
        "experiment_file": "synthetic.yaml",
        "primary_metric": "cider",
        "metrics": METRICS,
        "trials": trials,
    }
    return Plan(**fields | changes)


def fake_data(seed: int) -> Data:
    """What every made-up trial of a seed was trained and scored on."""
    return Data(
        examples=1024,
        examples_fingerprint=f"e{seed}" * 20,
        order_fingerprint=f"o{seed}" * 20,
        evaluation_fingerprint="ab" * 20,
        steps=256,
    )


def fake_record(trial: PlannedTrial, trainable: int, quality: float) -> TrialRecord:
    """A finished trial with made-up numbers, the same on every call."""
    rng = random.Random(trial.trial_id)
    noise = rng.gauss(0, 0.04)
    speed = 400 - 100 * quality
    perplexity = 9 - 4 * quality + noise
    history = tuple(
        Epoch(
            epoch=epoch,
            step=32 * epoch,
            train_loss=math.log(perplexity + 12 / epoch),
            validation_perplexity=perplexity + 14 * math.exp(-epoch / 2) + rng.gauss(0, 0.05),
            learning_rate=1e-3,
        )
        for epoch in range(1, 9)
    )
    test = {
        "perplexity": perplexity,
        "perplexity_wrong_input": perplexity * (1 + quality + noise / 8),
        "bleu_4": 0.1 + 0.2 * quality + noise / 5,
        "cider": 0.2 + 0.9 * quality - noise,
    }
    return TrialRecord(
        trial_id=trial.trial_id,
        experiment="synthetic",
        status="finished",
        spec={"adapter": {"method": trial.method, "label": trial.label, "grouping_name": trial.grouping, "config": {}}},
        seed=trial.seed,
        metrics={"validation": {"perplexity": perplexity}, "test": test},
        history=history,
        best_epoch=8,
        parameters=Parameters(
            trainable=trainable,
            adapter=0 if trial.method in {"none", "full"} else trainable - 9_312,
            projector=9_312,
            language_model=552_000,
            encoder=310_000,
            total=871_312 + trainable,
        ),
        memory=Memory(
            weights_bytes=3_485_248,
            gradients_bytes=4 * trainable,
            optimizer_bytes=8 * trainable,
            activations_bytes=41_000_000,
            process_peak_bytes=812_000_000 + 12 * trainable,
            process_before_bytes=500_000_000,
        ),
        throughput=Throughput(examples_per_s=speed, tokens_per_s=32 * speed, measured_steps=240),
        data=fake_data(trial.seed),
        wall_time_s=21.5 + 5 * quality,
        started_at=f"2026-01-01T00:0{trial.seed % 10}:00Z",
        versions={"python": "3.11.7", "torch": "2.13.0"},
        git_revision="0123456789abcdef",
        device="CPU, 2 cores (synthetic)",
    )


def write_run(folder: Path, plan: Plan, change: Change = lambda _, record: record) -> Path:
    """Write the plan and a record for every trial; ``change`` alters a record, or drops it by returning None."""
    write_atomically(folder / "plan.json", plan.model_dump_json())
    known = {(label, grouping): (trainable, quality) for label, _, grouping, trainable, quality in METHODS}
    for trial in plan.trials:
        trainable, quality = known.get((trial.label, trial.grouping), (50_000, 0.5))
        record = change(trial, fake_record(trial, trainable, quality))
        if record is not None:
            write_record(folder, record)
    return folder


def write_examples(folder: Path, trial_id: str, captions: Sequence[str], pictures: Path, **columns: Any) -> None:
    """Per-example scores of one trial: one validation and ``len(captions)`` test examples with drawn pictures."""
    count = len(captions)
    inputs = [json.dumps([["image", "file", str(pictures / f"{index}.png")]]) for index in range(count)]
    table: dict[str, Any] = {
        "split": ["validation", *["test"] * count],
        "example_id": ["validation-0", *(f"test-{index}" for index in range(count))],
        "nll": [9.5] * (count + 1),
        "tokens": [12] * (count + 1),
        "nll_wrong_input": [12.5] * (count + 1),
        "prediction": [None, *captions],
        "references": [None, *[["a red circle left of a blue square", "a circle in red"]] * count],
        "inputs": [None, *inputs],
        "cider": [None, *[0.1 * index for index in range(count)]],
    }
    path = folder / "trials" / trial_id / "examples.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table | columns), path)


def draw_pictures(folder: Path, count: int) -> Path:
    """Tiny pictures, 48 × 48."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture = Image.new("RGB", (48, 48), (200, 210, 225))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((4 + index, 10, 20 + index, 26), fill=(200, 40, 40))
        draw.rectangle((26, 20 + index, 40, 34 + index), fill=(40, 60, 190))
        picture.save(folder / f"{index}.png")
    return folder
