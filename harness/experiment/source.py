"""Reads YAML files with the line numbers of their keys, for error messages.

Differs from ``yaml.safe_load`` in three ways: a duplicate key is an error (PyYAML silently keeps the last one),
``1e-3`` is a number (a string in YAML 1.1), and ``${NAME}`` or ``${NAME:-default}`` in a string is replaced by an
environment variable.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from harness.core.cursor import Cursor, KeyPath
from harness.core.errors import UserError

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the floats of YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> tuple[Any, Cursor]:
    """Read one YAML file.

    Returns:
        Its content, and the cursor of its top level.

    Raises:
        UserError: it is missing, unreadable or not YAML, has a duplicate key, or uses a variable that is not set.
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
    top = Cursor(str(path), (), lines)
    if node is None:
        return None, top
    try:
        _collect_lines(node, top, lines)
    except RecursionError:
        raise UserError(f"{path}: an alias (*name) refers to a value that contains it") from None
    return _expand(data, top), top


def _collect_lines(node: yaml.Node, here: Cursor, lines: dict[KeyPath, int]) -> None:
    lines.setdefault(here.path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect_lines(child, here / index, lines)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            inner = here / str(key.value)
            line = key.start_mark.line + 1
            if inner.path in lines:
                raise UserError(f"{here.origin}, line {line}, {inner.key}: duplicate key")
            lines[inner.path] = line
            _collect_lines(child, inner, lines)


def _expand(value: Any, here: Cursor) -> Any:
    """Replace environment variables in all strings of a value."""
    if isinstance(value, dict):
        return {key: _expand(child, here / str(key)) for key, child in value.items()}
    if isinstance(value, list):
        return [_expand(child, here / index) for index, child in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise UserError(f"{here}: environment variable {name} is not set; set it, or write ${{{name}:-default}}")
        return str(found)

    return _VARIABLE.sub(replace, value)
