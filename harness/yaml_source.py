"""Reads a YAML file so that every later message can name its line.

Differs from plain ``yaml.safe_load`` in three ways: a key given twice is an error (YAML keeps the last silently),
``1e-3`` is a number (YAML 1.1 makes it a string), and ``${NAME}`` or ``${NAME:-default}`` in a string is taken from the
environment.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UserError

KeyPath = tuple[str | int, ...]
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Source:
    """A parsed file: its data, and the line of every key path."""

    path: Path
    data: Any
    lines: dict[KeyPath, int]

    def where(self, key_path: KeyPath) -> str:
        """``file.yaml, line 7, adapters[2].rank``; the line is that of the longest part that stands in the file."""
        known = next((key_path[:n] for n in range(len(key_path), -1, -1) if key_path[:n] in self.lines), ())
        line = f", line {self.lines[known]}" if known in self.lines else ""
        name = format_key_path(key_path)
        return f"{self.path}{line}{', ' + name if name else ''}"


def format_key_path(key_path: KeyPath) -> str:
    """``("adapters", 2, "rank")`` → ``adapters[2].rank``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key_path)
    return text.removeprefix(".")


def read_yaml(path: Path) -> Source:
    """Read one YAML file.

    Raises:
        UserError: it is missing, unreadable, not YAML, repeats a key, or names a variable that is not set.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; this folder has: {', '.join(near)}" if near else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except (yaml.YAMLError, ValueError) as error:  # a date like 2020-13-45 is a ValueError
        raise UserError(f"{path}: not valid YAML: {error}") from error
    lines: dict[KeyPath, int] = {}
    if node is None:
        return Source(path, None, lines)
    source = Source(path, None, lines)
    try:
        _walk(node, (), source)
    except RecursionError:
        raise UserError(f"{path}: an alias (*name) stands inside the value it names") from None
    return Source(path, _expand(data, (), source), lines)


def _walk(node: yaml.Node, key_path: KeyPath, source: Source) -> None:
    source.lines.setdefault(key_path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _walk(child, (*key_path, index), source)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            path = (*key_path, str(key.value))
            if path in source.lines:
                line = key.start_mark.line + 1
                raise UserError(f"{source.path}, line {line}, {format_key_path(path)}: key given twice")
            source.lines[path] = key.start_mark.line + 1
            _walk(child, path, source)


def _expand(value: Any, key_path: KeyPath, source: Source) -> Any:
    if isinstance(value, dict):
        return {key: _expand(child, (*key_path, str(key)), source) for key, child in value.items()}
    if isinstance(value, list):
        return [_expand(child, (*key_path, index), source) for index, child in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise UserError(
                f"{source.where(key_path)}: environment variable {name} is not set; "
                f"set it, or write ${{{name}:-default}}"
            )
        return str(found)

    return _VARIABLE.sub(replace, value)
