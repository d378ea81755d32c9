"""Sections of a YAML file → typed sections: axes expanded, every error with file, line, key path and nearest name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from harness.errors import UserError, did_you_mean
from harness.yaml_source import KeyPath, Source

M = TypeVar("M", bound=BaseModel)


def check(model: type[M], data: Mapping[str, Any], key_path: KeyPath, source: Source) -> M:
    """Validate one section; turn the first error into a UserError with file, line, key path and nearest name."""
    try:
        # By way of JSON, whose strict mode takes a string for a path and a list for a tuple, but not "4" for 4.
        return model.model_validate_json(json.dumps(dict(data), default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        # Alternatives of a union are named in pydantic's location ("int", "literal['all']"): keep what is in the file.
        location = [part for part in first["loc"] if isinstance(part, int) or _stands_in(data, part)]
        missing = first["type"] == "missing"
        where = source.where((*key_path, *location, *(first["loc"][-1:] if missing else ())))
        if first["type"] == "extra_forbidden":
            key = str(first["loc"][-1])
            raise UserError(f"{where}: unknown key {key!r}; {did_you_mean(key, model.model_fields)}") from None
        if missing:
            raise UserError(f"{where}: this key is required") from None
        hint = (
            "; only task, backbone, adapters, budget and optimizer have axes"
            if isinstance(first["input"], list)
            else ""
        )
        raise UserError(f"{where}: {_messages(error, first['loc'])}; found {first['input']!r}{hint}") from None


def _stands_in(data: Any, key: str) -> bool:
    if isinstance(data, list):
        return any(_stands_in(child, key) for child in data)
    return isinstance(data, Mapping) and (key in data or any(_stands_in(child, key) for child in data.values()))


def _messages(error: ValidationError, location: tuple[int | str, ...]) -> str:
    same = [e["msg"] for e in error.errors() if e["loc"][:1] == location[:1]]
    text = " or ".join(dict.fromkeys(message[:1].lower() + message[1:] for message in same))
    return text.removeprefix("value error, ")


def axes(section: Mapping[str, Any], key_path: KeyPath, source: Source) -> Iterator[dict[str, Any]]:
    """Every combination of the section's list values, the first key varying slowest.

    Raises:
        UserError: an axis is empty, or has a value twice.
    """
    choices: list[list[Any]] = []
    for key, value in section.items():
        here = (*key_path, key)
        if isinstance(value, list):
            if not value:
                raise UserError(f"{source.where(here)}: empty axis; give at least one value")
            if any(value[i] == other for i in range(len(value)) for other in value[:i]):
                raise UserError(f"{source.where(here)}: a value is given twice: {value}")
            choices.append(value)
        elif isinstance(value, dict):
            choices.append(list(axes(value, here, source)))
        else:
            choices.append([value])
    for combination in itertools.product(*choices):
        yield dict(zip(section, combination, strict=True))
