"""Reads YAML files with the line numbers of their keys, for error messages.

Scalars follow the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), not YAML 1.1: ``010`` is
ten, ``1:30``, ``yes``, ``off`` and ``2020-01-01`` are text, ``1e-3`` is a number, and only ``true`` and ``false`` are
booleans. Lines end with a line feed or a carriage return, and not with the other breaks of Unicode. A key given twice
is an error, also as ``1`` and ``0x1`` (YAML keeps the last silently). ``${NAME}`` or ``${NAME:-default}`` is taken from
the environment, and a value made of it is read by the same schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from harness.core.cursor import Cursor, KeyPath
from harness.core.errors import UserError

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_MOST_VALUES = 100_000
_NO_BREAKS = "\x85\u2028\u2029"  # of lines, in YAML 1.2 (section 5.4)
_PRIVATE_USE = range(0xE000, 0xF900)
_TAG = "tag:yaml.org,2002:"
_SCHEMA = (  # tag, form, the characters that it may begin with
    ("null", r"(?:null|Null|NULL|~|)", ["n", "N", "~", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))", list("-+.")),
    ("merge", r"<<", ["<"]),  # not in the core schema, but widely used
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema and the line breaks of YAML 1.2.

    Args:
        text: the file. Characters that break lines in YAML 1.1 alone are read as others, which are not in it.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - replaces those of YAML 1.1

    def __init__(self, text: str) -> None:
        unused = (code for code in _PRIVATE_USE if chr(code) not in text)
        stand_ins = dict(zip(map(ord, _NO_BREAKS), unused, strict=False))
        self._originals = {code: original for original, code in stand_ins.items()}
        super().__init__(text.translate(stand_ins))

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        compose: Callable[[Any], yaml.ScalarNode] = super().compose_scalar_node
        node = compose(anchor)
        node.value = node.value.translate(self._originals)
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what ``_Loader`` would not read as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", str(loader.construct_scalar(node)).lower()))


for _name, _form, _first in _SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^{_form}$"), _first)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    quoted = any(character in text for character in _NO_BREAKS)  # PyYAML would break the line there
    return dumper.represent_scalar(f"{_TAG}str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _text)
# Only the types of the schema: YAML 1.1's dates, sets, binaries and ordered maps are none of an experiment's.
_Loader.yaml_constructors = {
    tag: build
    for tag, build in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in {"null", "bool", "str", "seq", "map"}
}
_Loader.add_constructor(_TAG + "int", _int)
_Loader.add_constructor(_TAG + "float", _float)


def write_yaml(content: Any) -> str:
    """The text from which ``read_yaml`` reads the same content."""
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def read_value(text: str) -> Any:
    """One value of the command line, read as in a file.

    Raises:
        UserError: it is not YAML, or has a duplicate key.
    """
    return _read(text, Cursor("the value"), {}, None)


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
    lines: dict[KeyPath, int] = {}
    texts: dict[KeyPath, str] = {}
    top = Cursor(str(path), (), lines, texts)
    return _read(text, top, lines, texts), top


def _read(text: str, top: Cursor, lines: dict[KeyPath, int], texts: dict[KeyPath, str] | None) -> Any:
    """The content of a text.

    Args:
        text: in YAML.
        top: for messages.
        lines: receives the lines of keys.
        texts: receives the texts of values from the environment; None: no variables are put in.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _collect_lines(loader, node, top, lines)
        if texts is not None:
            _substitute(loader, node, top, texts, set())
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(
            f"{top.origin}: nested too deeply, or an alias (*name) refers to a value that contains it"
        ) from None
    except (yaml.YAMLError, ValueError, KeyError) as error:  # an explicit tag that does not fit: !!int x, !!bool x
        raise UserError(f"{top.origin}: not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _collect_lines(loader: _Loader, node: yaml.Node, here: Cursor, lines: dict[KeyPath, int]) -> None:
    lines.setdefault(here.path, node.start_mark.line + 1)
    if len(lines) > _MOST_VALUES:
        raise UserError(
            f"{here.origin}: more than {_MOST_VALUES:,} values, each alias (*name) counted with all that it stands for"
        )
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect_lines(loader, child, here / index, lines)
    elif isinstance(node, yaml.MappingNode):
        first: dict[Any, str] = {}  # by key as Python reads it
        for key, child in node.value:
            inner = here / str(key.value)
            line = key.start_mark.line + 1
            if inner.path in lines:
                raise UserError(f"{here.origin}, line {line}, {inner.key}: duplicate key")
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                same = first.setdefault(loader.construct_object(key), key.value)
                if same != key.value:
                    raise UserError(f"{here.origin}, line {line}, {inner.key}: duplicate key: it is that of {same!r}")
            lines[inner.path] = line
            _collect_lines(loader, child, inner, lines)


def _substitute(
    loader: _Loader, node: yaml.Node, here: Cursor, texts: dict[KeyPath, str], seen: set[yaml.Node]
) -> None:
    """Put environment variables in, and read a value that they are part of by the schema.

    A quoted value is read so only if it is one variable and nothing else: within ``{…}`` YAML has no other way to write
    it. A block (``|``, ``>``) stays text. ``texts`` receives the text of what is no text afterwards, for options that
    take one (a folder called 2017).
    """
    if isinstance(node, yaml.ScalarNode):
        whole = _VARIABLE.fullmatch(node.value)
        if node in seen or node.tag != f"{_TAG}str" or not _VARIABLE.search(node.value):
            return
        node.value = _VARIABLE.sub(lambda match: _variable(match, here), node.value)
        if node.value and (node.style is None or (whole and node.style in ("'", '"'))):
            resolve: Callable[..., str] = loader.resolve
            node.tag = resolve(yaml.ScalarNode, node.value, (True, False))
            texts[here.path] = node.value
    elif node in seen:
        return
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _substitute(loader, child, here / index, texts, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            _substitute(loader, child, here / str(key.value), texts, seen)
    seen.add(node)


def _variable(match: re.Match[str], here: Cursor) -> str:
    name, default = match.groups()
    found = os.environ.get(name) or default
    if found is None:
        raise UserError(f"{here}: environment variable {name} is not set; set it, or write ${{{name}:-default}}")
    return str(found)
