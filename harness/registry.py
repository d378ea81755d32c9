"""Plugins by name: one registry per kind, filled from entry points. The built-ins come in by the same door.

A spec that travels to another machine carries ``package.module:Class`` (``Entry.target``), because entry points are
invisible to a worker that was sent bare folders. Imports nothing of ours but the error type.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from harness.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """One registered plugin, not imported yet."""

    name: str
    target: str  # "package.module:Class"
    origin: str  # "distribution version" it comes from


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

    def entries(self) -> dict[str, Entry]:
        """All entries by name.

        Raises:
            UserError: two distributions register different classes under one name.
        """
        found: dict[str, Entry] = {}
        for point in entry_points(group=self.group):
            origin = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
            entry = Entry(point.name, point.value, origin)
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


def _import(target: str, kind: str) -> Any:
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever the plugin's module does when it is imported
        raise UserError(f"{kind} {target}: cannot be imported: {type(error).__name__}: {error}") from error


TASKS = Registry("task", "harness.tasks", "tasks.base:Task")
MODALITIES = Registry("modality", "harness.modalities", "tasks.base:Modality")
METRICS = Registry("metric", "harness.metrics", "tasks.base:Metric")
ADAPTERS = Registry("adapter", "harness.adapters", "adapters.base:AdapterMethod", "adapters.combination:combine")
