"""Combinations of methods, as in ``lora+bitfit``: each acts on the previous one's result, in the order of names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from pydantic import create_model
from torch import nn

from adapters import base
from harness.core.errors import UserError


class Combination(base.AdapterMethod):
    """A method made of other methods; ``combine`` creates the class."""

    classes: tuple[type[base.AdapterMethod], ...] = ()

    def __reduce__(self) -> Any:
        return _restored, (self.classes, self.config.model_dump())  # the class is made, and so not found by name

    def label(self) -> str:
        """``LoRA r=4 + BitFit``."""
        return " + ".join(part.label() for part in self.parts)

    @property
    def parts(self) -> tuple[base.AdapterMethod, ...]:
        """One method per name, each with its own options."""
        options = self.config.model_dump()
        return tuple(
            cls(cls.Config(**{name: value for name, value in options.items() if name in cls.Config.model_fields}))
            for cls in self.classes
        )

    def roles(self) -> frozenset[str]:
        """The roles of all parts."""
        return frozenset().union(*(part.roles() for part in self.parts))

    def reaches(self) -> frozenset[str]:
        """What any part reaches."""
        return frozenset().union(*(part.reaches() for part in self.parts))

    def trained(self, language_model: nn.Module) -> Iterable[nn.Parameter]:
        """The base's parameters that any part trains."""
        return [p for part in self.parts for p in part.trained(language_model)]

    def stages(self, epochs: int) -> tuple[base.Stage, ...]:
        """The stages of the first part that has several, if any."""
        found = [part.stages(epochs) for part in self.parts]
        return next((stages for stages in found if len(stages) > 1), found[0])


@cache
def combine(classes: tuple[type[base.AdapterMethod], ...]) -> type[Combination]:
    """The class that combines several methods. An option that several of them have (``where``) is passed to all.

    Raises:
        UserError: a method occurs twice, or two methods define the same option differently.
    """
    if len(set(classes)) < len(classes):
        raise UserError(f"a combination may contain each method once; found {_names(classes)}")
    fields: dict[str, Any] = {}
    for cls in classes:
        for name, field in cls.Config.model_fields.items():
            other = fields.setdefault(name, (field.annotation, field))[1]
            if (other.annotation, other.default) != (field.annotation, field.default):
                raise UserError(f"{_names(classes)} cannot be combined: they define the option {name!r} differently")
    config = create_model("CombinationConfig", __base__=base.Config, **fields)
    config.later = frozenset().union(*(cls.Config.later for cls in classes))
    return type(
        "Combination",
        (Combination,),
        {
            "classes": classes,
            "summary": " and ".join(cls.summary for cls in classes),
            "grouped": any(cls.grouped for cls in classes),
            "joins_groups": any(cls.joins_groups for cls in classes),
            "reads_past": any(cls.reads_past for cls in classes),
            "not_stacked": next((cls.not_stacked for cls in classes if cls.grouped and cls.not_stacked), None),
            "identity_at_start": all(cls.identity_at_start for cls in classes),
            "Config": config,
            "__doc__": f"{_names(classes)}, each acting on the previous one's result.",
        },
    )


def _restored(classes: tuple[type[base.AdapterMethod], ...], options: dict[str, Any]) -> Combination:
    combined = combine(classes)
    return combined(combined.Config(**options))


def _names(classes: Sequence[type]) -> str:
    return "+".join(cls.__name__ for cls in classes)
