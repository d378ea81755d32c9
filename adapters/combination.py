"""Several methods at once: ``lora+bitfit``. Each acts on what the one before it left, in the order of the names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from pydantic import create_model
from torch import nn

from adapters import base
from harness.errors import UserError


class Combination(base.AdapterMethod):
    """A method made of others; ``combine`` makes the class."""

    classes: tuple[type[base.AdapterMethod], ...] = ()

    def label(self) -> str:
        """``LoRA r=4 + BitFit``."""
        return " + ".join(part.label() for part in self.parts)

    @property
    def parts(self) -> tuple[base.AdapterMethod, ...]:
        """One method per name, each with the options that are its own."""
        options = self.config.model_dump()
        return tuple(
            cls(cls.Config(**{name: value for name, value in options.items() if name in cls.Config.model_fields}))
            for cls in self.classes
        )

    def roles(self) -> frozenset[str]:
        """Of all parts."""
        return frozenset().union(*(part.roles() for part in self.parts))

    def trained(self, language_model: nn.Module) -> Iterable[nn.Parameter]:
        """Of all parts."""
        return [p for part in self.parts for p in part.trained(language_model)]

    def stages(self, epochs: int) -> tuple[base.Stage, ...]:
        """Of the one part that has several, if any."""
        found = [part.stages(epochs) for part in self.parts]
        return next((stages for stages in found if len(stages) > 1), found[0])


@cache
def combine(classes: tuple[type[base.AdapterMethod], ...]) -> type[Combination]:
    """The combination of some methods. An option that several have (``where``) is one option, given to all of them.

    Raises:
        UserError: a method is named twice, or one option means different things.
    """
    if len(set(classes)) < len(classes):
        raise UserError(f"a combination names each method once; found {_names(classes)}")
    fields: dict[str, Any] = {}
    for cls in classes:
        for name, field in cls.Config.model_fields.items():
            other = fields.setdefault(name, (field.annotation, field))[1]
            if (other.annotation, other.default) != (field.annotation, field.default):
                raise UserError(f"{_names(classes)} cannot be combined: their option {name!r} differs")
    return type(
        "Combination",
        (Combination,),
        {
            "classes": classes,
            "summary": " and ".join(cls.summary for cls in classes),
            "grouped": any(cls.grouped for cls in classes),
            "joins_groups": any(cls.joins_groups for cls in classes),
            "identity_at_start": all(cls.identity_at_start for cls in classes),
            "Config": create_model("CombinationConfig", __base__=base.Config, **fields),
            "__doc__": f"{_names(classes)}, each acting on what the one before it left.",
        },
    )


def _names(classes: Sequence[type]) -> str:
    return "+".join(cls.__name__ for cls in classes)
