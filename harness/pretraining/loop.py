"""The training loop of all built-in backbones, and its record."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

LOG_EVERY_STEPS = 100


@dataclass(frozen=True)
class Recipe:
    """Steps, batch, learning rate and amount of data of one backbone."""

    steps: int
    batch_size: int
    learning_rate: float
    training_items: int  # documents, pictures or utterances
    held_out_items: int
    warmup_steps: int = 100
    weight_decay: float = 0.05


def train(
    model: nn.Module, loss: Callable[[], Tensor], recipe: Recipe, label: str, console: Console | None
) -> list[dict[str, float]]:
    """Minimise ``loss`` with AdamW, linear warm-up and cosine decay; return the mean loss of every hundred steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / recipe.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)),
    )
    model.train()
    log: list[dict[str, float]] = []
    recent: list[float] = []
    for step in _progress(recipe.steps, label, console):
        value = loss()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(value.item())
        if step % LOG_EVERY_STEPS == 0 or step == recipe.steps:
            log.append({"step": step, "loss": round(sum(recent) / len(recent), 4)})
            recent.clear()
    model.eval()
    return log


def _progress(steps: int, label: str, console: Console | None) -> Iterator[int]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        yield from progress.track(range(1, steps + 1), description=f"pre-training the {label}")


def write_training(
    folder: Path,
    model: nn.Module,
    *,
    seed: int,
    recipe: Recipe,
    quality: dict[str, float],
    log: list[dict[str, float]],
    seconds: float,
) -> None:
    """Write ``training.json``: recipe, seed, time, threads, quality, loss, library versions."""
    training: dict[str, Any] = {
        "recipe": asdict(recipe),
        "seed": seed,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "quality": {name: round(value, 4) for name, value in quality.items()},
        "log": log,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")
