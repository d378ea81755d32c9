"""What trials share is computed once: the trials of a plan consist of the same few sections, which never change.

A section is recognised by being the same object, so a plan of 100,000 trials turns a few hundred sections into JSON.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from harness.core.registry import identity
from harness.experiment.sections import Optimizer

Spec = TypeVar("Spec", bound=BaseModel)  # a TrialSpec

_KEPT = 16_384  # sections whose JSON is kept
_RATES = {"adapter": {"learning_rate", "tried_learning_rates", "search"}}


class _Same:
    """A section, equal to itself alone; it lives as long as what was computed of it is kept."""

    def __init__(self, section: Any) -> None:
        self.section = section

    def __hash__(self) -> int:
        return id(self.section)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.section is other.section


class _Frame(NamedTuple):
    """What is hashed of trials that differ in their seed alone."""

    sections: tuple[Any, ...]
    before: Any  # SHA-256 of the text before the seed
    after: str


_frame = _Frame((), None, "")  # of the trial asked for last: in a plan, seeds vary fastest


def sha256_of(spec: BaseModel, fields: Collection[str], exclude: Mapping[str, Mapping[str, Any]]) -> str:
    """The SHA-256 of a spec as JSON with sorted keys, and plugins by their ids.

    Args:
        spec: of the trial.
        fields: to hash; the same ones for every trial.
        exclude: by field, what to leave out of it, as ``model_dump`` takes it; the same for every trial.
    """
    global _frame  # noqa: PLW0603 - replaced as a whole, so that threads see one or the other
    frame = _frame
    sections = tuple([getattr(spec, name) for name in fields if name != "seed"])
    if len(sections) != len(frame.sections) or not all(map(operator.is_, sections, frame.sections)):
        texts = {n: f'"{n}": {_json(getattr(spec, n), exclude.get(n))}' for n in sorted(fields) if n != "seed"}
        before = "".join(f"{text}, " for name, text in texts.items() if name < "seed")
        after = "".join(f", {text}" for name, text in texts.items() if name > "seed")
        frame = _frame = _Frame(sections, hashlib.sha256(f'{{{before}"seed": '.encode()), f"{after}}}")
    digest, seed = frame.before.copy(), getattr(spec, "seed")  # noqa: B009 - of any spec
    digest.update(f"{seed}{frame.after}".encode())
    return str(digest.hexdigest())


def _json(section: Any, exclude: Mapping[str, Any] | None) -> str:
    if isinstance(section, BaseModel):
        return _model_json(_Same(section), _Same(exclude))
    return json.dumps(identity(section), sort_keys=True)


@lru_cache(_KEPT)
def _model_json(section: _Same, exclude: _Same) -> str:
    return json.dumps(identity(section.section.model_dump(mode="json", exclude=exclude.section)), sort_keys=True)


def sections_of(spec: BaseModel) -> tuple[int, ...]:
    """A key that is equal for trials of one plan that differ in their seed alone."""
    return tuple([id(value) for name, value in spec if name != "seed"])


def shared_dump(spec: BaseModel) -> dict[str, Any]:
    """``spec.model_dump(mode="json")`` of sections that are shared with other trials, and so are not to be changed."""
    return {name: _dump(_Same(value)) if isinstance(value, BaseModel) else value for name, value in spec}


@lru_cache(_KEPT)
def _dump(section: _Same) -> dict[str, Any]:
    content: dict[str, Any] = section.section.model_dump(mode="json")
    return content


def with_rate(optimizer: Optimizer, rate: float | None) -> Optimizer:
    """The optimizer with a learning rate; the same object for the same two."""
    return _with_rate(_Same(optimizer), rate)


@lru_cache(_KEPT)
def _with_rate(optimizer: _Same, rate: float | None) -> Optimizer:
    made: Optimizer = optimizer.section.model_copy(update={"learning_rate": rate})
    return made


def distinct(specs: Iterable[Spec], *sections: str) -> list[Spec]:
    """The first of all trials that are alike in these sections, learning rates of adapters apart, in order.

    Args:
        specs: the trials.
        sections: names of fields of a spec.
    """
    objects: dict[tuple[int, ...], Spec] = {}
    for spec in specs:
        objects.setdefault(tuple(id(getattr(spec, name)) for name in sections), spec)
    found: dict[str, Spec] = {}
    for spec in objects.values():
        found.setdefault(alike(spec, *sections), spec)
    return list(found.values())


def alike(spec: BaseModel, *sections: str) -> str:
    """A text that is equal for trials that are alike in these sections, learning rates of adapters apart."""
    return spec.model_dump_json(include=set(sections), exclude=_RATES)
