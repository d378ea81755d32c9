"""The built-in task on time series: describe curves drawn by code, as many as one likes, without a download.

They are written below ``$HARNESS_CACHE``, by default ``~/.cache/harness``, one number a line, with a line of JSON each:

    trends/<key>/train/10000000.csv
    trends/<key>/train.jsonl: {"id": "10000000", "file": "train/10000000.csv", "descriptions":
        ["it goes up a lot, then it stays level.", "a large rise is followed by a level part, with noise.", ...]}

Series ``i`` of a split depends on (data_seed, split, i) alone, so a larger set begins with the smaller one. What a
curve does decides its split (``tasks/trend_drawing.py``): no combination of movements is in two, whatever the seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from harness.errors import UserError
from tasks import trend_drawing
from tasks.base import Config, Example, Part, Split, Task
from tasks.cache_folder import cache_folder, write_once

DESCRIPTIONS_PER_SERIES = 5
# Ids start here, so that they are unique over the task however many series a split has.
_FIRST_ID: dict[Split, int] = {"train": 10_000_000, "validation": 20_000_000, "test": 30_000_000}
_MAX_EXAMPLES = 10_000_000


class TrendsConfig(Config):
    """How many series; the seed decides which."""

    train_examples: int = Field(default=2048, ge=1, le=_MAX_EXAMPLES)
    validation_examples: int = Field(default=512, ge=1, le=_MAX_EXAMPLES)
    test_examples: int = Field(default=512, ge=1, le=_MAX_EXAMPLES)
    data_seed: int = 0


class Trends(Task):
    """Describe a drawn time series: what it does, how strongly, and in which order."""

    contexts = ("series", "text")
    modalities: Mapping[str, str] = {"series": "series"}
    metrics = ("captions",)
    Config = TrendsConfig
    config: TrendsConfig

    @classmethod
    def sample(cls, folder: Path) -> dict[str, Any]:
        """Sixteen series; they are drawn into the cache by ``prepare``, so the folder stays empty."""
        return {"train_examples": 8, "validation_examples": 4, "test_examples": 4}

    @cached_property
    def folder(self) -> Path:
        """Where this configuration's series lie; another one as soon as the drawing or the words change."""
        key = hashlib.sha256(self.config.model_dump_json().encode())
        key.update(Path(str(trend_drawing.__file__)).read_bytes())
        return cache_folder("trends", key.hexdigest()[:16])

    def prepare(self) -> None:
        """Draw the series, once for all processes of this machine.

        Raises:
            UserError: the cache folder cannot be written to.
        """
        try:
            write_once(self.folder, self._write)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write the series of the task trends: {error}") from error

    def examples(self, split: Split) -> Sequence[Example]:
        """The series of a split in the order of their numbers.

        Raises:
            UserError: they were not prepared, or someone changed their list.
        """
        path = self.folder / f"{split}.jsonl"
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return tuple(
                Example(row["id"], (Part("series", self.folder / row["file"]),), tuple(row["descriptions"]))
                for row in rows
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be read: {type(error).__name__}: {error}; delete the folder, and `harness prepare` "
                "draws it again"
            ) from error

    def _write(self, folder: Path) -> None:
        for split in _FIRST_ID:
            self._write_split(folder, split)

    def _write_split(self, folder: Path, split: Split) -> None:
        count: int = getattr(self.config, f"{split}_examples")
        (folder / split).mkdir()
        lines = []
        for index in range(count):
            rng = trend_drawing.generator(self.config.data_seed, split, index)
            trend = trend_drawing.draw_trend(rng, split)
            values = trend_drawing.curve(trend, rng)
            name = str(_FIRST_ID[split] + index)
            text = "".join(f"{value:.4g}\n" for value in values)
            (folder / split / f"{name}.csv").write_text(text, encoding="utf-8")
            descriptions = trend_drawing.descriptions(trend, rng, DESCRIPTIONS_PER_SERIES)
            lines.append(json.dumps({"id": name, "file": f"{split}/{name}.csv", "descriptions": descriptions}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
