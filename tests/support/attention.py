"""Recorded attention made up for a run folder of tests/support/runs.py: written as ``harness attention`` writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from harness.core.record import TrialRecord, read_run
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard, build_leaderboard
from results.page.attention import FILE_NAME, HEADER, RecordedAttention, RecordedExample
from tests.support.runs import METHODS, draw_pictures, fake_plan, write_run

TOKENS = ("a", " red", " circle", " .")
LAYERS, HEADS, SIDE = 2, 3, 4


def weights_of(
    seed: int, tokens: int = len(TOKENS), patches: int = SIDE * SIDE, layers: int = LAYERS, heads: int = HEADS
) -> np.ndarray:
    """(layers, heads, tokens, patches) in float16: what is left of the whole goes elsewhere."""
    rng = np.random.default_rng(seed)
    drawn = rng.dirichlet(np.full(patches + 3, 0.4), size=(layers, heads, tokens))
    return drawn[..., :patches].astype(np.float16)


def example_of(example_id: str, path: Path, tokens: Sequence[str] = TOKENS, **fields: object) -> RecordedExample:
    content: dict[str, object] = {
        "example_id": example_id, "context": "image", "path": str(path), "tokens": tuple(tokens), "leading": 0,
        "rows": SIDE, "columns": SIDE, "box": (0.0, 0.0, 1.0, 1.0),
    }  # fmt: skip
    return RecordedExample.model_validate(content | fields)


def write_attention(
    folder: Path, record: TrialRecord, examples: Sequence[RecordedExample], weights: Sequence[np.ndarray]
) -> Path:
    header = RecordedAttention(trial_id=record.trial_id, started_at=record.started_at, examples=tuple(examples))
    path = folder / "trials" / record.trial_id / FILE_NAME
    tensors = {example.example_id: own for example, own in zip(examples, weights, strict=True)}
    save_file(tensors, path, {HEADER: json.dumps(header.model_dump(mode="json"))})
    return path


def best_first(board: Leaderboard) -> list[Row]:
    """The rows of the last setting."""
    return board.of(board.settings[-1])


def attended_run(folder: Path, methods: int = 2, count: int = 3) -> Leaderboard:
    """A run whose best rows have recorded attention for ``count`` drawn pictures."""
    write_run(folder, fake_plan(seeds=(0,), methods=METHODS[-4:]))
    pictures = draw_pictures(folder / "pictures", count)
    board = build_leaderboard(read_run(folder))
    for number, row in enumerate(best_first(board)[:methods]):
        examples = [example_of(f"test-{index}", pictures / f"{index}.png") for index in range(count)]
        weights = [weights_of(10 * number + index) for index in range(count)]
        write_attention(folder, row.finished[0], examples, weights)
    return board
