"""JSON files of annotations, validated against a pydantic type while they are parsed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from harness.core.errors import ProblemList
from tasks.containers.text_files import looks_like, read_text

T = TypeVar("T")
_PLACE = re.compile(r"^Invalid JSON: (.*) at line (\d+) column (\d+)$", re.DOTALL)
_SHOWN = 60  # characters before and after a syntax error: annotation files are often one line of megabytes


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads(…, object_pairs_hook=…)``, which alone keeps the last of two equal keys silently.

    Raises:
        ValueError: a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!a} is there twice")
    return found


def parse_json(path: Path, content: type[T]) -> T:
    """Read a JSON file; keys that the type does not have are skipped.

    Args:
        path: an existing file.
        content: the type of the whole file.

    Raises:
        UserError: the file could not be read, is not JSON, or has another format; all problems at once.
    """
    data = read_text(path).encode()
    problems = ProblemList()
    try:
        return TypeAdapter(content).validate_json(data)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_context=False):
            problems.add(f"{path}: {_describe(problem, data)}")
    problems.raise_any()
    raise AssertionError("a ValidationError has errors")


def _describe(problem: ErrorDetails, data: bytes) -> str:
    message = problem["msg"]
    if problem["type"] != "json_invalid":
        key = ".".join(map(str, problem["loc"])) or "the whole file"
        return f"{key}: {message}; found {str(problem['input'])[:80]!r}"
    place = _PLACE.match(message)
    if place is None:
        return f"broken JSON, {message}"
    reason, line, column = place[1], int(place[2]), max(1, int(place[3]))  # 0 in an empty file
    text = data.split(b"\n")[line - 1][max(0, column - _SHOWN) : column + _SHOWN]
    shown = text.decode("utf-8", errors="replace")
    head = data[:400].decode("utf-8", errors="replace")
    if "hex escape" in reason:  # \\ud83d without its other half: valid JSON, but no text
        return f"line {line}, column {column}: half of a surrogate pair, which is not Unicode text: {shown!r}"
    return f"line {line}, column {column}: broken JSON, {reason}: {shown!r}{looks_like(head)}"
