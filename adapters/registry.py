"""The registry of adapter methods. Importing it imports no torch: an experiment is listed and checked without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.registry import Registry

if TYPE_CHECKING:
    from adapters.base import AdapterMethod


def _contract() -> type[AdapterMethod]:
    from adapters.base import AdapterMethod

    return AdapterMethod


def _combine(classes: tuple[type[AdapterMethod], ...]) -> type[AdapterMethod]:
    from adapters.combination import combine

    return combine(classes)


ADAPTERS: Registry[AdapterMethod] = Registry("adapter", "harness.adapters", _contract, _combine)
