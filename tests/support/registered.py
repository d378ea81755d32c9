"""Every registered adapter method on a tiny model."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.attach import Adapters
from adapters.base import AdapterMethod
from adapters.placement.router import Router
from adapters.registry import ADAPTERS
from harness.core.contexts import Segment, resolve_grouping
from harness.core.registry import Entry
from tests.support.models import tiny_llama

CONTEXTS = ("image", "text")
LAYOUT = (Segment(0, 1, "text"), Segment(1, 5, "image"), Segment(5, 9, "text"))
every_method = pytest.mark.parametrize("entry", ADAPTERS.entries().values(), ids=ADAPTERS.entries())


def built_in(entry: Entry) -> bool:
    return entry.origin.startswith("context-peft-harness ")


def every_plugin_and(*fast: str) -> pytest.MarkDecorator:
    """Every method; the built-in ones that are not among ``fast`` are slow tests."""
    return pytest.mark.parametrize(
        "entry",
        [
            pytest.param(entry, id=name, marks=[pytest.mark.slow] if built_in(entry) and name not in fast else [])
            for name, entry in ADAPTERS.entries().items()
        ],
    )


def drawn_llama() -> Any:
    """With weights as small as Llama's own initialisation draws them."""
    return tiny_llama(initializer_range=0.02)


def method_of(entry: Entry) -> AdapterMethod:
    method_class = ADAPTERS.load(entry.target)
    method: AdapterMethod = method_class(method_class.Config())
    return method


def adapters_of(entry: Entry, model: Any, grouping: Any, seed: int = 0) -> Adapters:
    router = Router(resolve_grouping(grouping, CONTEXTS)[0])
    router.set_layout(LAYOUT)
    method = method_of(entry)
    return Adapters(model, dict.fromkeys(router.groups, method), router, seed, None if method.grouped else method)
