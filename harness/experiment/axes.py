"""Expands the lists in a section of an experiment: each list is an axis of the grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from harness.core.cursor import Cursor
from harness.core.errors import UserError

WITH_AXES = ("task", "backbone", "adapters", "budget", "optimizer")
NO_AXIS = f"only {', '.join(WITH_AXES[:-1])} and {WITH_AXES[-1]} have axes"  # hint for a list in another section


def axes(section: Mapping[str, Any], where: Cursor) -> Iterator[dict[str, Any]]:
    """All combinations of the section's list values; the first key varies slowest.

    Raises:
        UserError: an axis is empty or contains a value twice.
    """
    options: list[list[Any]] = []
    for key, value in section.items():
        here = where / key
        if isinstance(value, list):
            if not value:
                raise UserError(f"{here}: empty axis; give at least one value")
            if any(value[i] == other for i in range(len(value)) for other in value[:i]):
                raise UserError(f"{here}: a value is given twice: {value}")
            options.append(value)
        elif isinstance(value, dict):
            options.append(list(axes(value, here)))
        else:
            options.append([value])
    for combination in itertools.product(*options):
        yield dict(zip(section, combination, strict=True))
