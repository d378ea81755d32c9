"""The axes and options of trials as columns: ``budget.examples``, ``adapter.rank``, ``task.train_examples``.

A column has the name of its key in the experiment file. The type of a column follows from its values: an option that
takes a number or a word, such as ``budget.examples: all``, is text as soon as one trial has the word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from harness.core.columns import options_of


def option_columns(specs: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """A column for each axis and option that a spec has; null where it does not apply to a trial.

    Args:
        specs: of the trials, as records store them.
    """
    flat = [options_of(spec) for spec in specs]
    names = dict.fromkeys(name for values in flat for name in values)
    ordered = sorted(names, key=lambda name: _ORDER.get(name.partition(".")[0], len(_ORDER)))
    return {name: _typed([values.get(name) for values in flat]) for name in ordered}


_ORDER = {section: n for n, section in enumerate(("task", "backbone", "adapter", "budget", "optimizer", "eval"))}


def _typed(values: Sequence[Any]) -> pa.Array:
    """Booleans, integers or floats where all values are; else text, with lists and numbers as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds == {int} and all(abs(value) < 2**63 for value in values if value is not None):
        return pa.array(values, pa.int64())
    if kinds in ({float}, {int, float}):
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    return pa.array([_text(value) for value in values], pa.string())


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)
