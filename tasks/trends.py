"""The built-in task on time series: describe curves drawn by code, in any number, without a download.

They are written below ``$HARNESS_CACHE``, by default ``~/.cache/harness``, one number per line, with one line of JSON
for each series:

    trends/<key>/train/10000000.csv
    trends/<key>/train.jsonl: {"id": "10000000", "file": "train/10000000.csv", "descriptions":
        ["it goes up a lot, then it stays level.", "a large rise is followed by a level part, with noise.", ...]}

Series ``i`` of a split depends on (data_seed, split, i) alone, so a larger set begins with the smaller one. A hash
of its movements determines its split (``tasks/drawing/trend.py``): no combination is in two splits, whatever the seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.core.errors import UserError
from tasks.base import Example, Part, Split
from tasks.drawing import trend as trend_drawing
from tasks.drawing.task import FIRST_ID, DrawnTask

DESCRIPTIONS_PER_SERIES = 5


class Trends(DrawnTask):
    """Describe a drawn time series: what it does, how strongly, and in which order."""

    contexts = ("series", "text")
    modalities: Mapping[str, str] = {"series": "series"}
    metrics = ("captions",)
    folder_name = "trends"

    def examples(self, split: Split) -> Sequence[Example]:
        """The series of a split in the order of their numbers.

        Raises:
            UserError: they were not prepared, or their list was changed.
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

    def write_split(self, folder: Path, split: Split, count: int) -> None:
        """Draw a split and list it."""
        lines = []
        for index in range(count):
            rng = trend_drawing.generator(self.config.data_seed, split, index)
            trend = trend_drawing.draw_trend(rng, split)
            values = trend_drawing.curve(trend, rng)
            name = str(FIRST_ID[split] + index)
            text = "".join(f"{value:.4g}\n" for value in values)
            (folder / split / f"{name}.csv").write_text(text, encoding="utf-8")
            descriptions = trend_drawing.descriptions(trend, rng, DESCRIPTIONS_PER_SERIES)
            lines.append(json.dumps({"id": name, "file": f"{split}/{name}.csv", "descriptions": descriptions}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
