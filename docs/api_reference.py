"""Griffe extensions for the API reference: what static analysis alone does not see in this project."""

from __future__ import annotations

import ast
import io
import tokenize
from functools import lru_cache
from typing import Any

import griffe


class PublicNames(griffe.Extension):
    """Resolves the public names of ``harness``, which the package imports on first use.

    ``harness/__init__.py`` maps each name to its module, for its ``__getattr__``; this reads the same mapping. So a
    reference page says ``::: harness.adapt``, wherever the code is.
    """

    def on_module_members(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Give ``harness`` an alias for every public name."""
        if mod.path != "harness":
            return
        for name, target in ast.literal_eval(str(mod["_PUBLIC"].value)).items():
            mod.set_member(name, griffe.Alias(name, target.replace(":", ".")))


class FieldComments(griffe.Extension):
    """Shows the comment behind a class's field, or on the lines above it, as the field's description."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Describe one field."""
        if attr.docstring or attr.parent is None or not attr.parent.is_class or not attr.lineno or not attr.endlineno:
            return
        behind, above = _comments("\n".join(attr.lines_collection[attr.filepath]))
        text = behind.get(attr.endlineno) or behind.get(attr.lineno)
        if text is None:
            lines: list[str] = []
            while (line := attr.lineno - len(lines) - 1) in above:
                lines.insert(0, above[line])
            text = " ".join(lines)
        if text:
            attr.docstring = griffe.Docstring(text[0].upper() + text[1:], parent=attr)


@lru_cache
def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments of a source by line number: behind code, and alone on their line. Those for linters are left out."""
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# noqa", "# type:", "# fmt:")):
            found = alone if token.line.lstrip().startswith("#") else behind
            found[token.start[0]] = token.string.lstrip("# ")
    return behind, alone
