"""Attention heat maps for the page, packed from the files that ``harness attention`` writes next to the records.

The paper's Figure 6 (Context-PEFT, arXiv 2312.08900): the attention of a span of caption tokens over the image tokens,
summed over heads and layers or for single ones, drawn over the picture.

Shapes: L layers, H heads, C caption tokens, N tokens of the input, P patches among them.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from harness.core.record import TrialRecord
from results.leaderboard.table import Leaderboard
from results.page.gallery import Input, show_file

FILE_NAME = "attention.safetensors"
HEADER = "attention"  # key of the JSON in the metadata of the file
MOST_METHODS, MOST_EXAMPLES = 4, 8
MOST_BYTES = 2_000_000  # of weights in the page
_STRIP = "8 / 1"  # width / height of a row of tokens
Detail = Literal["heads", "layers", "sum"]  # each head of each layer; each layer, heads summed; all summed
Floats = NDArray[np.float32]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecordedExample(_Schema):
    """One example; its weights are the tensor of its id, (L, H, C, N) in float16."""

    example_id: str
    context: str  # the attended input
    path: str  # its file
    tokens: tuple[str, ...]  # the C pieces of the caption; joined they give the caption
    leading: int  # tokens of the input before the patches (a class token)
    rows: int  # of the grid of patches; 1 if there is no grid
    columns: int
    box: tuple[float, float, float, float]  # left, top, right, bottom of the grid, as fractions of the picture
    softmaxes: int = 1  # softmaxes per token; its weights are divided by this, so that they sum to 1 over all keys


class RecordedAttention(_Schema):
    """The JSON in the header of ``attention.safetensors``."""

    schema_version: Literal[1] = 1
    trial_id: str
    started_at: str  # of the trial's record: attention from another run of the trial is not shown
    row: Literal["own position"] = "own position"  # the query is the token's own position
    examples: tuple[RecordedExample, ...]


@dataclass(frozen=True)
class HeatMap:
    """The initial map: the whole caption, all heads and layers summed."""

    caption: str
    uri: str  # PNG with one pixel per patch
    sentence: str
    style: str  # CSS: position of the grid on the picture


@dataclass(frozen=True)
class Sample:
    """One example: the attended input, and the first method's map (None if it has none for this example)."""

    example_id: str
    file: Input
    first: HeatMap | None
    on_picture: bool  # the map is drawn over the picture; otherwise by itself
    aspect: str  # CSS: width / height of a map drawn by itself


@dataclass(frozen=True)
class Attention:
    """The section of the page; its script reads ``data``, and ``gradient`` is the colour scale in CSS."""

    methods: tuple[str, ...]
    samples: tuple[Sample, ...]
    detail: Detail
    data: dict[str, Any]
    unreadable: tuple[str, ...]
    left_out: tuple[str, ...]
    several_softmaxes: tuple[str, ...]  # methods whose weights were divided
    gradient: str


@dataclass(frozen=True)
class _Recorded:
    """The attention file of one trial."""

    name: str
    by_id: dict[str, tuple[RecordedExample, Floats]]


def read_attention(path: Path) -> tuple[RecordedAttention, dict[str, Floats]]:
    """Read a file of ``harness attention``: the header, and (L, H, C, N) by example id.

    Raises:
        OSError: the file could not be read.
        SafetensorError: it is not a safetensors file.
        ValueError: its header or a shape does not fit this schema.
    """
    with safe_open(path, framework="np") as file:
        header = RecordedAttention.model_validate_json((file.metadata() or {}).get(HEADER, ""))
        weights = {e.example_id: file.get_tensor(e.example_id).astype(np.float32) for e in header.examples}
    for example in header.examples:
        expected = (len(example.tokens), example.leading + example.rows * example.columns)
        if weights[example.example_id].shape[2:] != expected:
            found = weights[example.example_id].shape
            raise ValueError(f"{example.example_id}: weights of shape {found}; needed: (layers, heads, *{expected})")
    return header, weights


def build_attention(board: Leaderboard) -> Attention:
    """Pack the recorded attention of the first trials that have it, beginning with the last setting.

    Weights are kept in as much detail as ``MOST_BYTES`` allows: by head and layer, by layer, or summed.
    """
    recorded, unreadable = _recorded(board)
    chosen, spare = recorded[:MOST_METHODS], recorded[MOST_METHODS:]
    left_out = [f"{one.name}: {MOST_METHODS} methods are shown" for one in spare]
    ids = list(dict.fromkeys(example_id for one in chosen for example_id in one.by_id))
    if len(ids) > MOST_EXAMPLES:
        left_out.append(f"{len(ids) - MOST_EXAMPLES} examples: {MOST_EXAMPLES} are shown")
    ids = ids[:MOST_EXAMPLES]
    details: tuple[Detail, ...] = ("heads", "layers", "sum")
    detail = next((d for d in details if _bytes(chosen, ids, d) <= MOST_BYTES), details[-1])
    fits = next((n for n in range(len(ids), 0, -1) if _bytes(chosen, ids[:n], detail) <= MOST_BYTES), 0)
    if fits < len(ids):
        left_out.append(f"{len(ids) - fits} examples: their maps would exceed the size limit of this page")
    ids = ids[:fits]
    methods = [
        {"name": one.name, "maps": {i: _packed(*one.by_id[i], detail) for i in ids if i in one.by_id}} for one in chosen
    ]
    divided = [one.name for one in chosen if any(one.by_id[i][0].softmaxes > 1 for i in ids if i in one.by_id)]
    return Attention(
        methods=tuple(one.name for one in chosen) if ids else (),
        samples=tuple(_sample(example_id, chosen) for example_id in ids),
        detail=detail,
        data={"methods": methods, "colours": _base64(_COLOURS)},
        unreadable=tuple(unreadable),
        left_out=tuple(left_out),
        several_softmaxes=tuple(divided),
        gradient=_GRADIENT,
    )


def _recorded(board: Leaderboard) -> tuple[list[_Recorded], list[str]]:
    found: list[_Recorded] = []
    unreadable: list[str] = []
    for name, record in _trials(board):
        path = board.run.trial_folder(record.trial_id) / FILE_NAME
        if not path.exists():
            continue
        try:
            header, weights = read_attention(path)
        except (OSError, SafetensorError, ValueError) as error:
            unreadable.append(f"{path}: {str(error).splitlines()[0]}")
            continue
        if (header.trial_id, header.started_at) != (record.trial_id, record.started_at):
            unreadable.append(f"{path}: from another run of the trial; record it again with harness attention")
            continue
        found.append(_Recorded(name, {e.example_id: (e, weights[e.example_id]) for e in header.examples}))
    return found, unreadable


def _trials(board: Leaderboard) -> Iterator[tuple[str, TrialRecord]]:
    """The finished trials with their names; within a row by learning rate, the chosen one first."""
    several = len(board.settings) > 1
    for setting in reversed(board.settings):
        for row in (*board.of(setting), *board.apart(setting)):
            for candidate in sorted(row.candidates, key=lambda one: one is not row.chosen):
                searched = len(row.candidates) > 1 and candidate.learning_rate is not None
                rate = f", learning rate {candidate.learning_rate:g}" if searched else ""
                for record in candidate.finished:
                    yield f"{row.name}{f' ({setting})' if several else ''}{rate}, seed {record.seed}", record


def _reduced(weights_LHCN: Floats, detail: Detail) -> Floats:
    """Means over the dimensions that ``detail`` does not keep; L or H is then 1."""
    axes: tuple[int, ...] = {"heads": (), "layers": (1,), "sum": (0, 1)}[detail]
    reduced: Floats = weights_LHCN.mean(axis=axes, keepdims=True) if axes else weights_LHCN
    return reduced


def _bytes(chosen: Sequence[_Recorded], ids: Sequence[str], detail: Detail) -> int:
    """Size in base64: a byte for each patch, and two floats of four bytes for each map."""
    total = 0
    for one in chosen:
        for example, weights_LHCN in (one.by_id[i] for i in ids if i in one.by_id):
            layers, heads, tokens = weights_LHCN.shape[:3]
            maps = {"heads": layers * heads, "layers": layers, "sum": 1}[detail] * tokens
            total += sum(4 * math.ceil(maps * size / 3) for size in (example.rows * example.columns, 4, 4))
    return total


def _packed(example: RecordedExample, weights_LHCN: Floats, detail: Detail) -> dict[str, Any]:
    """One example's maps for the script: patches as bytes, 255 is the ``scale`` of the map."""
    maps_LHCN = _reduced(weights_LHCN, detail)
    patches_LHCP = maps_LHCN[..., example.leading :]
    scales_LHC = patches_LHCP.max(axis=-1)
    steps_LHCP = 255 * patches_LHCP / np.where(scales_LHC > 0, scales_LHC, 1)[..., None]
    return {
        "tokens": example.tokens,
        "layers": maps_LHCN.shape[0],
        "heads": maps_LHCN.shape[1],
        "rows": example.rows,
        "columns": example.columns,
        "style": _style(example),
        "patches": _base64(np.round(steps_LHCP).astype(np.uint8)),
        "scales": _base64(scales_LHC.astype("<f4")),
        "shares": _base64(maps_LHCN.sum(axis=-1).astype("<f4")),
    }


def _sample(example_id: str, chosen: Sequence[_Recorded]) -> Sample:
    having = [one for one in chosen if example_id in one.by_id]
    example = having[0].by_id[example_id][0]
    first = _heat_map(*having[0].by_id[example_id]) if having[0] is chosen[0] else None
    file = show_file(example.context, Path(example.path))
    in_grid = all(one.by_id[example_id][0].rows > 1 for one in having)
    aspect = f"{example.columns} / {example.rows}" if in_grid else _STRIP
    return Sample(example_id, file, first, in_grid and file.kind == "picture", aspect)


def _heat_map(example: RecordedExample, weights_LHCN: Floats) -> HeatMap:
    caption = "".join(example.tokens)
    if not example.tokens:
        return HeatMap("", "", "The caption is empty.", _style(example))
    mean_N = weights_LHCN.mean(axis=(0, 1, 2))
    patches = mean_N[example.leading :].reshape(example.rows, example.columns)
    steps = np.round(255 * patches / (patches.max() or 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(_COLOURS[steps]).save(buffer, "png")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return HeatMap(caption, uri, _sentence(example, float(mean_N.sum()), patches), _style(example))


def _sentence(example: RecordedExample, share: float, patches: Floats) -> str:
    """A sentence on what the map shows; attention.js writes the same one."""
    row, column = np.unravel_index(int(patches.argmax()), patches.shape)
    where = f"row {row + 1}, column {column + 1}" if example.rows > 1 else f"position {column + 1}"
    return (
        f"{100 * share:.3g} % of the attention goes to the {example.context}; "
        f"the brightest patch ({where} of {example.rows} × {example.columns}) has {100 * patches.max():.3g} %."
    )


def _style(example: RecordedExample) -> str:
    left, top, right, bottom = (100 * edge for edge in example.box)
    return f"left:{left:g}%;top:{top:g}%;width:{right - left:g}%;height:{bottom - top:g}%"


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _colours() -> NDArray[np.uint8]:
    """256 colours, RGBA: matplotlib's inferno, monotonic in lightness also for the colour-blind, and in opacity."""
    rgba = matplotlib.colormaps["inferno"](np.linspace(0, 1, 256))
    rgba[:, 3] = np.linspace(0.3, 0.85, 256)
    return np.round(255 * rgba).astype(np.uint8)


_COLOURS = _colours()
_GRADIENT = f"linear-gradient(to right, {', '.join('rgb({} {} {})'.format(*rgb) for rgb in _COLOURS[::51, :3])})"
