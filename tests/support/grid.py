"""A run folder of 72 trials: six methods at four budgets with three seeds, with known effects (synthetic records)."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.sweeps import METHODS, write_sweep

BUDGETS = (64, 256, 1024, 4096)
SEEDS = (0, 1, 2)
RANKS = tuple(
    (f"LoRA r={rank}", "lora", grouping, {"rank": rank, "dropout": 0.0}, 10_000 * rank * (1 + number))
    for rank in (2, 8)
    for number, grouping in enumerate(("agnostic", "specific"))
)
GRID = (METHODS[0], *RANKS, METHODS[-1])
RANK_EFFECT, GROUPING_EFFECT, BUDGET_EFFECT = 0.06, 0.03, 0.02  # CIDEr; the last is for four times the data


def _score(budget: int, epochs: int, method: str, grouping: str, seed: int) -> float:
    """CIDEr without the effect of the rank: effects add up, and full fine-tuning gains more from data."""
    steps = BUDGETS.index(budget)
    base = {"none": 0.1, "lora": 0.5, "full": 0.45 + 0.05 * steps}[method]
    noise = random.Random(f"{budget} {method} {grouping} {seed}").gauss(0, 0.004)
    return base + BUDGET_EFFECT * steps + GROUPING_EFFECT * (grouping == "specific") + noise


def write_grid(folder: Path) -> Path:
    """Write the run folder; returns it."""
    by_rank = lambda options: RANK_EFFECT * (options.get("rank") == 8)  # noqa: E731
    return write_sweep(folder, _score, BUDGETS, seeds=SEEDS, methods=GRID, by_options=by_rank)
