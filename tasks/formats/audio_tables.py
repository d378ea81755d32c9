"""Audio files as data sets list them: tables (CSV, JSON Lines) with the location of every row, and the files they name.

Nothing is decoded here; the modality ``audio`` does that.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.core.errors import ProblemList, UserError, did_you_mean
from tasks.containers.text_files import looks_like, read_text, unicode_problem
from tasks.formats.data_files import DataFiles
from tasks.formats.json_file import unique_keys


class Row(NamedTuple):
    """One row of a table, with its location as messages give it ("/data/metadata.csv: line 3")."""

    where: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """The text of a column, with white space collapsed and otherwise unchanged.

        Raises:
            UserError: it is not a text, or has no letter or digit (nothing that could be scored).
        """
        found = self.values[column]
        if not isinstance(found, str):
            raise UserError(f"{self.where}: {column}: found {found!r}; a text is needed")
        return spoken_text(found, f"{self.where}: {column}")

    def name(self, column: str) -> str:
        """A name or number, as text.

        Raises:
            UserError: it is empty.
        """
        found = self.values[column]
        if found is None or not str(found).strip():
            raise UserError(f"{self.where}: {column}: found {found!r}; a name is needed")
        return str(found).strip()


def spoken_text(text: str, where: str) -> str:
    """Collapse white space.

    Raises:
        UserError: it has no letter or digit, or is not Unicode.
    """
    if problem := unicode_problem(text):
        raise UserError(f"{where}: {problem}")
    if not any(character.isalnum() for character in text):
        raise UserError(f"{where}: found {text[:80]!r}; a text with a letter or digit is needed")
    return " ".join(text.split())


def read_table(path: Path, columns: Sequence[str], problems: ProblemList) -> list[Row]:
    """Read the rows of a ``.csv`` or ``.jsonl`` file (``.gz`` too) that have these columns.

    What is wrong goes to ``problems``.
    """
    try:
        text = read_text(path)
    except UserError as error:
        problems.add(error)
        return []
    return (_jsonl if path.name.removesuffix(".gz").endswith(".jsonl") else _csv)(path, text, columns, problems)


def _csv(path: Path, text: str, columns: Sequence[str], problems: ProblemList) -> list[Row]:
    # strict: otherwise an unclosed quotation mark silently swallows the rows after it.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        header = list(reader.fieldnames or ())
        if missing := [column for column in columns if column not in header]:
            for column in missing:
                hint = did_you_mean(column, header) + looks_like(text)
                problems.add(f"{path}: line 1: no column {column!r}; {hint}")
            return []
        for values in reader:
            row = Row(f"{path}: line {reader.line_num}", values)
            if None in values:  # where DictReader keeps surplus fields
                problems.add(f"{row.where}: more fields than the {len(header)} of the header; quote commas")
            elif absent := [column for column in columns if values[column] is None]:
                problems.add(f"{row.where}: the row ends before {', '.join(absent)}")
            else:
                rows.append(row)
    except csv.Error as error:
        problems.add(f"{path}: the row that begins in line {reader.line_num + 1}: broken CSV: {error}")
    return rows


def _jsonl(path: Path, text: str, columns: Sequence[str], problems: ProblemList) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            values = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            problems.add(f"{where}: broken JSON: {error}; found {line[:80]!r}")
            continue
        if not isinstance(values, dict):
            problems.add(f"{where}: found {line[:80]!r}; an object is needed: {{{columns[0]!r}: …}}")
        elif missing := [column for column in columns if column not in values]:
            problems.add(f"{where}: no key {missing[0]!r}; {did_you_mean(missing[0], values)}")
        else:
            rows.append(Row(where, values))
    return rows


class AudioFiles(DataFiles):
    """The recordings of a data set; each may be listed once, in one split."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: dict[Path, str] = {}  # with links resolved → where it was listed

    def find(self, folder: Path, name: str, where: str) -> Path:
        """The path of an existing file; see ``DataFiles.find``.

        Raises:
            MissingFileError: it does not exist.
            UserError: it is outside the folder, cannot be reached, or was listed before.
        """
        path = super().find(folder, name, where)
        real = self.real(path)
        if real in self._taken:
            raise UserError(f"{where}: {name!r} is already listed: {self._taken[real]}; a file may be listed once")
        self._taken[real] = where
        return path


def write_tone(path: Path, frequency_hz: float, seconds: float = 0.2, sampling_rate_hz: int = 8000) -> None:
    """Write a sine as 16-bit mono audio, in the format that the suffix of the path names."""
    import numpy as np
    import soundfile

    time_s = np.arange(round(seconds * sampling_rate_hz)) / sampling_rate_hz
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * frequency_hz * time_s), sampling_rate_hz, subtype="PCM_16")
