"""Sample outputs beside their inputs: the same few test examples for every method, drawn blind to the scores."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from pyarrow import ArrowException

from harness.record import MetricInfo
from results.table import Leaderboard, Row

_SHOWN = 8
_THUMBNAIL_PIXELS = 240  # longer side; smaller pictures are embedded as they are and enlarged by the page


@dataclass(frozen=True)
class Output:
    """What one method wrote for one example, and its score on it."""

    row: Row
    seed: int
    text: str
    score: float | None


@dataclass(frozen=True)
class Picture:
    """An input: a data URI, or None and the reason why it is not shown."""

    context: str
    uri: str | None
    pixelated: bool
    note: str


@dataclass(frozen=True)
class Sample:
    """One test example with the outputs of all methods."""

    example_id: str
    pictures: tuple[Picture, ...]
    references: tuple[str, ...]
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Gallery:
    """Samples of one setting; ``unreadable`` names the score files that could not be read."""

    setting: str
    score: MetricInfo | None
    samples: tuple[Sample, ...]
    unreadable: tuple[str, ...]


def build_gallery(board: Leaderboard) -> Gallery:
    """Sample outputs of each row's first finished seed, in the last setting of the plan that has any."""
    unreadable: list[str] = []
    for setting in reversed(board.settings):
        tables: list[tuple[Row, int, dict[str, dict[str, Any]]]] = []
        for row in board.of(setting):
            if not row.finished:
                continue
            path = board.run.folder / "trials" / row.finished[0].trial_id / "examples.parquet"
            try:
                tables.append((row, row.finished[0].seed, _predictions(path)))
            except (OSError, ArrowException) as error:
                unreadable.append(f"{row.finished[0].trial_id}: {str(error).splitlines()[0]}")
        tables = [table for table in tables if table[2]]
        if tables:
            score = _score(board, [examples for *_, examples in tables])
            samples = tuple(_sample(example_id, tables, score) for example_id in _drawn(tables))
            return Gallery(setting, score, samples, tuple(unreadable))
    return Gallery("", None, (), tuple(unreadable))


def _predictions(path: Path) -> dict[str, dict[str, Any]]:
    """Test rows by example id; empty where no text was generated."""
    columns = pq.read_schema(path).names
    if not {"split", "example_id", "prediction"} <= set(columns):
        return {}
    test = pq.read_table(path, filters=[("split", "==", "test")]).to_pylist()
    return {row["example_id"]: row for row in test if row["prediction"] is not None}


def _drawn(tables: Sequence[tuple[Row, int, dict[str, dict[str, Any]]]]) -> list[str]:
    """The ids with the smallest hash: as good as random, the same every time, blind to scores."""
    ids = {example_id for *_, examples in tables for example_id in examples}
    return sorted(ids, key=lambda example_id: hashlib.sha256(example_id.encode()).digest())[:_SHOWN]


def _score(board: Leaderboard, tables: Sequence[dict[str, dict[str, Any]]]) -> MetricInfo | None:
    """The metric shown per example: CIDEr, else the primary one, else the first that has values by example."""
    columns = {column for examples in tables for column in next(iter(examples.values()))}
    preferred = sorted(board.run.plan.metrics, key=lambda info: (info.name != "cider", info is not board.primary))
    return next((info for info in preferred if info.name in columns), None)


def _sample(
    example_id: str, tables: Sequence[tuple[Row, int, dict[str, dict[str, Any]]]], score: MetricInfo | None
) -> Sample:
    rows = [(row, seed, examples[example_id]) for row, seed, examples in tables if example_id in examples]
    first = rows[0][2]
    inputs: dict[str, str] = json.loads(first.get("inputs") or "{}")
    return Sample(
        example_id=example_id,
        pictures=tuple(_picture(context, Path(path)) for context, path in inputs.items()),
        references=tuple(first.get("references") or ()),
        outputs=tuple(
            Output(row, seed, example["prediction"], example.get(score.name) if score else None)
            for row, seed, example in rows
        ),
    )


def _picture(context: str, path: Path) -> Picture:
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return Picture(context, None, False, f"{path.name}: no picture that can be read")
    pixelated = max(picture.size) < _THUMBNAIL_PIXELS / 2
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    kind = "png" if pixelated else "jpeg"  # a photograph as PNG is ten times as large
    picture.save(buffer, kind, quality=85)
    return Picture(
        context, f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", pixelated, path.name
    )
