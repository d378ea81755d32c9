"""Sample outputs next to their inputs: the same few test examples for every method, drawn blind to the scores.

Pictures, recordings and texts are shown; of other files only the name.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from pyarrow import ArrowException

from harness.core.parquet import bounded
from harness.core.record import MetricInfo
from harness.core.samples import PREVIEWS, draw_ids, of_member
from results.leaderboard.format import size_text
from results.leaderboard.table import Leaderboard, Row

_MOST_ROWS = 40  # of the leaderboard, best first: more outputs per example are not readable
_MOST_READ = 100  # rows of other settings whose outputs are read: about a second
_THUMBNAIL_PIXELS = 240  # longer side; smaller pictures are embedded unchanged and enlarged by the page
_SHOWN_CHARACTERS = 280  # of a text; the rest unfolds on a click
_MOST_SOUND_BYTES = 1 << 20  # of one recording, which the page embeds whole
_PREDICTED = frozenset({"split", "example_id", "prediction"})
# Formats that browsers play: https://developer.mozilla.org/en-US/docs/Web/Media/Guides/Formats/Containers.
_MP3 = tuple(bytes([0xFF, layer]) for layer in (0xE2, 0xE3, 0xF2, 0xF3, 0xFA, 0xFB))  # without a tag in front
_STARTS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", *_MP3)
_SOUNDS = {".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg"}


@dataclass(frozen=True)
class Output:
    """The output of one method for one example, and its score."""

    row: Row
    seed: int
    text: str
    score: float | None


@dataclass(frozen=True)
class Input:
    """One input of an example: a picture or a sound with its data URI, a text, or a note on why a file is not shown."""

    context: str
    kind: Literal["picture", "sound", "text", "note"]
    text: str  # the text or note itself; for pictures and sounds the file name
    uri: str = ""
    pixelated: bool = False

    @property
    def start(self) -> str:
        """The part of a text that is shown initially; all of it if it is short."""
        return self.text if len(self.text) <= _SHOWN_CHARACTERS else f"{self.text[: _SHOWN_CHARACTERS - 20].rstrip()} …"


@dataclass(frozen=True)
class Sample:
    """One test example with the outputs of all methods."""

    example_id: str
    inputs: tuple[Input, ...]  # in the order of the sequence
    references: tuple[str, ...]
    score: MetricInfo | None  # the metric of the outputs' scores; None: no metric has a value for this example
    outputs: tuple[Output, ...]

    @property
    def texts(self) -> list[Input]:
        """The inputs that are text."""
        return [part for part in self.inputs if part.kind == "text"]

    @property
    def files(self) -> list[Input]:
        """The inputs that are files, shown or not."""
        return [part for part in self.inputs if part.kind != "text"]


@dataclass(frozen=True)
class Gallery:
    """Samples of one setting; ``unreadable`` names the score files that could not be read."""

    setting: str
    samples: tuple[Sample, ...]
    unreadable: tuple[str, ...]
    rows: int = 0  # finished rows of the setting
    members: tuple[str, ...] = ()  # tasks of a mixture, each with its own draw

    @property
    def scores(self) -> list[MetricInfo]:
        """The metrics shown: one, or one per task of a mixture."""
        return list({sample.score.name: sample.score for sample in self.samples if sample.score}.values())

    @property
    def shown_rows(self) -> int:
        """Number of rows whose outputs are shown."""
        return len({output.row.name for sample in self.samples for output in sample.outputs})


Predictions = dict[str, dict[str, Any]]  # by example id


def build_gallery(board: Leaderboard) -> Gallery:
    """Sample outputs of each row's first finished seed, in the last setting of the plan that has outputs.

    The examples are drawn from those of the first row; outputs are in the order of the leaderboard.
    """
    unreadable: list[str] = []
    metrics, members = _by_preference(board), members_of(board.run.plan.metrics)
    for setting in reversed(board.settings):
        rows = _finished(board, setting)
        drawn, tables = _read(board, rows[:_MOST_ROWS], metrics, unreadable)
        if tables:
            previews = board.run.trial_folder(tables[0][0].finished[0].trial_id).parent.parent / PREVIEWS
            samples = tuple(_sample(example_id, tables, metrics, previews) for example_id in drawn)
            shown = tuple(member for member in members if any(of_member(member, example_id) for example_id in drawn))
            return Gallery(setting, samples, tuple(unreadable), len(rows), shown)
    return Gallery("", (), tuple(unreadable))


def outputs_elsewhere(board: Leaderboard, gallery: Gallery) -> list[Sample]:
    """The outputs in the settings that the gallery does not show, without inputs; of the first rows of a large grid."""
    found, left = [], _MOST_READ
    for setting in board.settings:
        rows = _finished(board, setting)[:left] if setting != gallery.setting else []
        left -= len(rows)
        drawn, tables = _read(board, rows, (), [])
        found += [_sample(example_id, tables, (), None) for example_id in drawn if tables]
    return found


def _finished(board: Leaderboard, setting: str) -> list[Row]:
    return [row for row in (*board.of(setting), *board.apart(setting)) if row.finished]


def _read(
    board: Leaderboard, rows: Sequence[Row], metrics: Sequence[MetricInfo], unreadable: list[str]
) -> tuple[list[str], list[tuple[Row, int, Predictions]]]:
    """The ids drawn from the first row's examples, and each row's outputs for them; rows without any are left out."""
    drawn: list[str] = []
    tables: list[tuple[Row, int, Predictions]] = []
    members = members_of(board.run.plan.metrics)
    for row in rows:
        path = board.run.trial_folder(row.finished[0].trial_id) / "examples.parquet"
        try:
            with bounded(path):
                drawn = drawn or draw_ids(predicted_ids(path), members)
                tables.append((row, row.finished[0].seed, predictions_of(path, drawn, metrics)))
        except (OSError, ArrowException) as error:
            unreadable.append(f"{row.finished[0].trial_id}: {str(error).splitlines()[0]}")
    return drawn, [table for table in tables if table[2]]


def members_of(metrics: Sequence[MetricInfo]) -> list[str]:
    """The tasks of a mixture, which prefix its metrics and example ids: ``scenes/cider``, ``scenes/17``."""
    return list(dict.fromkeys(member for info in metrics if (member := info.name.rpartition("/")[0])))


def predicted_ids(path: Path) -> list[str]:
    """Ids of the test examples with a generated text; empty if no text was generated."""
    if not set(pq.read_schema(path).names) >= _PREDICTED:
        return []
    test = (pc.field("split") == "test") & pc.field("prediction").is_valid()
    ids: list[str] = pq.read_table(path, columns=["example_id"], filters=test).column("example_id").to_pylist()
    return ids


def predictions_of(path: Path, drawn: Sequence[str], metrics: Sequence[MetricInfo]) -> Predictions:
    """The test rows of the drawn examples that have a generated text."""
    known = pq.read_schema(path).names
    if not drawn or not set(known) >= _PREDICTED:
        return {}
    wanted = {"example_id", "prediction", "references", "inputs", "previews", *(info.name for info in metrics)}
    chosen = (pc.field("split") == "test") & pc.field("prediction").is_valid() & pc.field("example_id").isin(drawn)
    table = pq.read_table(path, columns=[name for name in known if name in wanted], filters=chosen)
    return {row["example_id"]: row for row in table.to_pylist()}


def _by_preference(board: Leaderboard) -> list[MetricInfo]:
    """The metrics in order of preference for an example: CIDEr, the primary one, the others.

    In a mixture, ``coco_captions/cider`` has values only for the examples of that task.
    """

    def key(info: MetricInfo) -> tuple[bool, bool]:
        return (info.name.rpartition("/")[2] != "cider", info is not board.primary)

    return sorted(board.run.plan.metrics, key=key)


def _sample(
    example_id: str,
    tables: Sequence[tuple[Row, int, Predictions]],
    metrics: Sequence[MetricInfo],
    previews: Path | None,
) -> Sample:
    """One sample; without a folder of previews, its inputs are left out."""
    rows = [(row, seed, examples[example_id]) for row, seed, examples in tables if example_id in examples]
    first = rows[0][2]
    score = next((info for info in metrics if any(example.get(info.name) is not None for *_, example in rows)), None)
    return Sample(
        example_id=example_id,
        inputs=_inputs(first.get("inputs") or "[]", first.get("previews") or "[]", previews) if previews else (),
        references=tuple(first.get("references") or ()),
        score=score,
        outputs=tuple(
            Output(row, seed, example["prediction"], example.get(score.name) if score else None)
            for row, seed, example in rows
        ),
    )


def _inputs(column: str, names: str, previews: Path) -> tuple[Input, ...]:
    """The inputs of an example.

    Args:
        column: of the inputs, JSON.
        names: of their previews, JSON; empty if the example has none.
        previews: the folder of the previews.
    """
    try:
        parts = json.loads(column)
        return tuple(
            Input(context, "text", value) if kind == "text" else _file(context, Path(value), _preview(previews, name))
            for (context, kind, value), name in zip(parts, json.loads(names) or [None] * len(parts), strict=True)
        )
    except (ValueError, TypeError, RecursionError):  # not what a trial writes
        return (Input("", "note", "the inputs could not be read"),)


def _preview(folder: Path, name: str | None) -> Path | None:
    """The file of a preview; None: there is none, or the name leads out of the folder."""
    path = folder / (name or "")
    return path if path.parent == folder and not folder.is_symlink() and not path.is_symlink() else None


def _file(context: str, path: Path, preview: Path | None) -> Input:
    """The file itself, or if the page cannot show it the preview that its modality made."""
    shown = show_file(context, path)
    if shown.kind != "note" or preview is None or not preview.is_file():
        return shown
    if preview.suffix == ".txt":
        return Input(context, "text", preview.read_text(encoding="utf-8"))
    return replace(show_file(context, preview), text=path.name)


def show_file(context: str, path: Path) -> Input:
    """A file as the page shows it; a note if it is neither picture nor sound, or could not be read."""
    suffix = path.suffix.lower()
    if suffix in _SOUNDS:
        return _sound(context, path, _SOUNDS[suffix])
    try:
        return _picture(context, path)
    except Exception:  # every decoder of Pillow raises its own exceptions
        known = suffix in Image.registered_extensions()
        reason = "the picture could not be read" if known else "neither a picture nor a sound, not shown"
        return Input(context, "note", f"{path.name}: {reason}")


def _sound(context: str, path: Path, media_type: str) -> Input:
    try:
        size = path.stat().st_size
        if size > _MOST_SOUND_BYTES:
            reason = f"{size_text(size)}, more than {size_text(_MOST_SOUND_BYTES)}: not embedded in this page"
            return Input(context, "note", f"{path.name}: {reason}")
        content = path.read_bytes()
    except OSError as error:
        return Input(context, "note", f"{path.name}: could not be read: {error.strerror}")
    if not content.startswith(_STARTS):  # a report is passed on: not with another file of this machine in it
        return Input(context, "note", f"{path.name}: not the sound that its name says")
    return Input(context, "sound", path.name, _data_uri(media_type, content))


def _picture(context: str, path: Path) -> Input:
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I;16"):  # Pillow's conversion would clip nearly everything to white
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    picture = upright.convert("RGB")
    pixelated = max(picture.size) < _THUMBNAIL_PIXELS / 2
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    kind = "png" if pixelated else "jpeg"  # a photograph as PNG would be ten times as large
    picture.save(buffer, kind, quality=85)
    return Input(context, "picture", path.name, _data_uri(f"image/{kind}", buffer.getvalue()), pixelated)


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
