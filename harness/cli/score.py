"""``harness score``: score a file of predictions against a file of references.

Both are in COCO's formats, whatever the metric. References, as in its annotation files (other keys are ignored):

    {"images": [{"id": 139}], "annotations": [{"image_id": 139, "caption": "A living room with a table."}]}

Predictions, as in its results files:

    [{"image_id": 139, "caption": "a room with a table"}]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from harness.core.errors import ProblemList, UserError
from harness.core.files import write_atomically
from harness.core.terminal import Terminal
from tasks.base import Metric, Scores
from tasks.formats.json_file import parse_json
from tasks.registry import METRICS


def score(metric: str, references: Path, predictions: Path, output: Path | None, console: Console) -> None:
    """Print the corpus scores as a table and notes to stderr, and optionally write all scores as JSON.

    Args:
        metric: registry name.
        references: one or more reference texts for every id.
        predictions: exactly one text for every id of the references.
        output: ``{"corpus": {name: score}, "per_example": {id: {name: score}}}``, with ``notes`` if there are any.
        console: prints the table.

    Raises:
        UserError: a file is missing or broken, the ids do not match, the metric is unknown, or the output cannot be
            written. All of this is checked before scoring.
    """
    scorer: Metric = METRICS.load(METRICS.find(metric).target)()
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"{output}: is a folder" if output.is_dir() else f"{output.parent}: no such folder")
    texts = read_references(references)
    answers = read_predictions(predictions)
    _check_ids(texts, references, answers, predictions)
    try:
        scores = scorer.score(answers, texts)
    except ValueError as error:
        raise UserError(f"{references}, {predictions}: {error}") from error
    console.print(_table(metric, scorer, scores, len(texts)))
    for note in scores.notes:
        Terminal(stderr=True).print(note, markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        _write(output, scores)


def read_references(path: Path) -> dict[str, list[str]]:
    """Read reference texts by id, in the order of the file.

    Raises:
        UserError: the file is missing, broken or has another format; each kind of problem once, with its first place.
    """
    content: Any = parse_json(path, object)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(
            f'{path}: must be an object with the lists "images" and "annotations", as COCO\'s annotations are'
        )
    problems = _Kinds()
    found: dict[str, list[str]] = {}
    images = content.get("images", [])
    if not isinstance(images, list):
        raise UserError(f"{path}: images: must be a list")
    for i, image in enumerate(images):
        if (key := _id(image, "id")) is None:
            problems.add("must have an id, an integer or a string", f"{path}: images[{i}]")
        else:
            found[key] = []
    for i, annotation in enumerate(content["annotations"]):
        where = f"{path}: annotations[{i}]"
        entry = _entry(annotation, where, problems)
        if entry is not None:
            key, text = entry
            if images and key not in found:
                problems.add("belongs to an image that is not among the images", f"{where}: image_id {key}")
            found.setdefault(key, []).append(text)
    for key, texts in found.items():
        if not texts:
            problems.add("has no caption in the annotations", f"{path}: image {key}")
    problems.raise_any()
    if not found:
        raise UserError(f"{path}: annotations: is empty")
    return found


def read_predictions(path: Path) -> dict[str, str]:
    """Read one prediction for every id.

    Raises:
        UserError: the file is missing, broken or has another format, or has two predictions for one id.
    """
    content: Any = parse_json(path, object)
    if not isinstance(content, list):
        raise UserError(f'{path}: must be a list of {{"image_id": …, "caption": …}}, as COCO\'s results are')
    problems = _Kinds()
    found: dict[str, str] = {}
    for i, item in enumerate(content):
        where = f"{path}: [{i}]"
        entry = _entry(item, where, problems)
        if entry is not None and entry[0] in found:
            problems.add("already has a prediction", f"{where}: image_id {entry[0]}")
        elif entry is not None:
            found[entry[0]] = entry[1]
    problems.raise_any()
    return found


class _Kinds:
    """Problems of a long file, summarised: each kind once, with its first place and the number of others."""

    def __init__(self) -> None:
        self.first: dict[str, str] = {}
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, where: str) -> None:
        self.first.setdefault(kind, where)
        self.counts[kind] += 1

    def raise_any(self) -> None:
        problems = ProblemList()
        for kind, where in self.first.items():
            more = f" ({self.counts[kind] - 1} more like this)" if self.counts[kind] > 1 else ""
            problems.add(f"{where}: {kind}{more}")
        problems.raise_any()


def _id(item: Any, name: str) -> str | None:
    value = item.get(name) if isinstance(item, dict) else None
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _entry(item: Any, where: str, problems: _Kinds) -> tuple[str, str] | None:
    key = _id(item, "image_id")
    if key is None:
        problems.add("must have an image_id, an integer or a string", where)
    elif not isinstance(item.get("caption"), str):
        problems.add("must have a caption, a string", where)
    else:
        return key, item["caption"]
    return None


def _check_ids(texts: Mapping[str, Any], references: Path, answers: Mapping[str, Any], predictions: Path) -> None:
    problems = ProblemList()
    if missing := [key for key in texts if key not in answers]:
        problems.add(f"{predictions}: no prediction for {_count(missing)} of {references}")
    if unknown := [key for key in answers if key not in texts]:
        problems.add(f"{predictions}: predictions for {_count(unknown)} that {references} does not have")
    problems.raise_any()


def _count(ids: Sequence[str]) -> str:
    return f"image_id {ids[0]}" if len(ids) == 1 else f"{len(ids)} image_ids, the first {ids[0]},"


def _table(metric: str, scorer: Metric, scores: Scores, examples: int) -> Table:
    table = Table(title=f"{metric}, {examples} examples")
    table.add_column("Metric")
    table.add_column("Name in records")
    table.add_column("Score", justify="right")
    for name, value in scores.corpus.items():
        lower = " (lower is better)" if name in scorer.lower_is_better else ""
        table.add_row(scorer.labels.get(name, name) + lower, name, f"{value:.4f}")
    return table


def _write(output: Path, scores: Scores) -> None:
    content: dict[str, Any] = {"corpus": scores.corpus, "per_example": scores.per_example}
    if scores.notes:
        content["notes"] = list(scores.notes)
    try:
        write_atomically(output, json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
