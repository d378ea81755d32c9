"""Plugins by name: one registry per kind, filled from entry points. The built-ins come in by the same door.

An experiment may also name a Python file (``plugins:``), whose classes are registered for the process. A spec that
travels to another machine carries ``package.module:Class`` or ``/folder/file.py:Class`` (``Entry.target``), because
entry points are invisible to a worker that was sent bare folders. Imports nothing of ours but the error type.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """One registered plugin, not imported yet."""

    name: str
    target: str  # "package.module:Class", or "/folder/file.py:Class"
    origin: str  # "distribution version" it comes from, or the file


class Registry:
    """The plugins of one kind.

    Args:
        kind: what they are, for messages ("adapter").
        group: entry point group ("harness.adapters").
        contract: the class that every entry subclasses, as "package.module:Class" so that listing imports nothing.
        combine: function that makes one class of several, whose names are then joined by "+"; None: there is none.
    """

    def __init__(self, kind: str, group: str, contract: str, combine: str | None = None) -> None:
        self.kind, self.group, self.contract, self.combine = kind, group, contract, combine
        self.added: list[Entry] = []  # from files

    def entries(self) -> dict[str, Entry]:
        """All entries by name.

        Raises:
            UserError: two distributions register different classes under one name.
        """
        found: dict[str, Entry] = {}
        installed = [Entry(point.name, point.value, _origin(point)) for point in entry_points(group=self.group)]
        for entry in (*installed, *self.added):
            other = found.get(entry.name)
            if other and other.target != entry.target:
                raise UserError(
                    f"{self.kind} {entry.name!r} is registered twice: {other.target} by {other.origin} and "
                    f"{entry.target} by {entry.origin}; uninstall one or rename it"
                )
            found[entry.name] = entry
        return dict(sorted(found.items()))

    def find(self, name: str, where: str = "") -> Entry:
        """The entry called ``name``.

        Raises:
            UserError: there is none; the message starts with ``where`` and offers the nearest name.
        """
        entries = self.entries()
        if self.combine and "+" in name:
            parts = [self.find(part, where) for part in name.split("+")]
            origin = ", ".join(dict.fromkeys(part.origin for part in parts))
            return Entry(name, "+".join(part.target for part in parts), origin)
        if name not in entries:
            prefix = f"{where}: " if where else ""
            raise UserError(f"{prefix}unknown {self.kind} {name!r}; {did_you_mean(name, entries)}")
        return entries[name]

    def load(self, target: str) -> Any:
        """Import the class behind ``package.module:Class``.

        Raises:
            UserError: it cannot be imported, or does not follow the contract.
        """
        contract = _import(self.contract, "contract")
        if "+" in target:
            return self._combine(target)
        plugin = _import(target, self.kind)
        if not (isinstance(plugin, type) and issubclass(plugin, contract)):
            raise UserError(f"{self.kind} {target}: must be a subclass of {self.contract.replace(':', '.')}")
        return plugin

    def _combine(self, target: str) -> Any:
        if self.combine is None:
            raise UserError(f"{self.kind} {target}: cannot be combined")
        return _import(self.combine, "combination")(tuple(self.load(part) for part in target.split("+")))


def _origin(point: Any) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"


def _import(target: str, kind: str) -> Any:
    module_name, _, attribute = target.rpartition(":")
    try:
        if module_name.endswith(".py"):
            return getattr(_load_file(Path(module_name)), attribute)
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the plugin's module does when it is imported
        raise UserError(f"{kind} {target}: cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    """Run a file once per process and content."""
    name = f"harness_plugin_{_digest(path)}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # noqa: S101 - true of every file called *.py
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # before it runs: dataclasses and pydantic look their module up
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def canonical(target: str) -> str:
    """The target as it enters a trial's id: a file by its name and content, wherever it lies."""
    path, _, attribute = target.rpartition(":")
    return f"{Path(path).name}@{_digest(Path(path))}:{attribute}" if path.endswith(".py") else target


def add_file(path: Path, where: str) -> None:
    """Register the plugins that a Python file defines, each under its attribute ``name`` or its name in snake_case.

    Args:
        path: of the file, which is run.
        where: it is named, for messages.

    Raises:
        UserError: there is no such file, it fails, or defines no plugin.
    """
    path = path.resolve()
    if path.suffix != ".py" or not path.is_file() or "+" in str(path):
        raise UserError(f"{where}: found {str(path)!r}; allowed: a Python file, its path without '+'")
    try:
        module = _load_file(path)
    except Exception as error:
        raise UserError(f"{where}: {path}: cannot be imported: {type(error).__name__}: {error}") from error
    found = False
    for registry in (TASKS, MODALITIES, METRICS, ADAPTERS):
        contract = _import(registry.contract, "contract")
        for plugin in vars(module).values():
            if not (isinstance(plugin, type) and issubclass(plugin, contract)) or inspect.isabstract(plugin):
                continue
            if plugin.__module__ != module.__name__:
                continue  # imported there, not defined
            found = True
            name = getattr(plugin, "name", None) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plugin.__name__).lower()
            entry = Entry(name, f"{path}:{plugin.__name__}", str(path))
            registry.added = [other for other in registry.added if other.target != entry.target] + [entry]
    if not found:
        kinds = ", ".join(registry.contract.rpartition(":")[2] for registry in (TASKS, MODALITIES, METRICS, ADAPTERS))
        raise UserError(f"{where}: {path}: defines no plugin; allowed: subclasses of {kinds}")


TASKS = Registry("task", "harness.tasks", "tasks.base:Task")
MODALITIES = Registry("modality", "harness.modalities", "tasks.base:Modality")
METRICS = Registry("metric", "harness.metrics", "tasks.base:Metric")
ADAPTERS = Registry("adapter", "harness.adapters", "adapters.base:AdapterMethod", "adapters.combination:combine")
