"""The modules that a plugin file imports from its own folder: they are part of what it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

_Import = tuple[int, str]  # how many folders up from the file (0: a name that is no relative one), dotted name


def modules_beside(path: Path) -> tuple[Path, ...]:
    """The Python files in the folder of a plugin file, or below it, that it imports, itself or through another of them.

    Found by reading, so also what is imported within a function; a name that is computed is not seen.

    Args:
        path: the plugin file.

    Returns:
        In order of their paths; without the file itself.

    Raises:
        OSError: the file cannot be read.
    """
    top, found, waiting = path.parent, {path}, [path]
    while waiting:
        file = waiting.pop()
        for up, name in _imports(file.read_bytes()):
            folder = top if up == 0 else file.parents[min(up, len(file.parents)) - 1]
            for module in _files(folder, name):
                if module not in found and module.is_relative_to(top):
                    found.add(module)
                    waiting.append(module)
    return tuple(sorted(found - {path}))


def _files(folder: Path, name: str) -> Iterator[Path]:
    """Of ``a.b`` the files of ``a`` and ``a.b``, as far as they are in the folder."""
    place = folder
    for part in name.split("."):
        place = place / part
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                yield file


@lru_cache(256)
def _imports(content: bytes) -> tuple[_Import, ...]:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # which is told where the file is imported
        return ()
    found: list[_Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            found += [(node.level, base + alias.name) for alias in node.names]
    return tuple(dict.fromkeys(found))
