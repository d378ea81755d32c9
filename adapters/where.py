"""``where`` a method acts: roles, for the whole model, or for each part of a vision- or audio-language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from adapters.placement.parts import LINEAR, PARTS
from adapters.placement.roles import ATTENTION, FEED_FORWARD
from harness.core.errors import did_you_mean

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]
Place = Literal["A", "F", "AF", "all"] | Annotated[tuple[Role, ...], Field(min_length=1)]
_OfLanguage = Literal["A", "F", "AF"] | Annotated[tuple[Role, ...], Field(min_length=1)]


class Parts(BaseModel):
    """Part of the model → roles; ``all``: every linear layer of the part. A part that is not named has no adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    language: _OfLanguage | None = None
    vision: Place | None = None
    audio: Place | None = None
    connector: Literal["all"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_parts(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            for part in given:
                if part not in PARTS:
                    raise ValueError(f"unknown part {part!r}; {did_you_mean(str(part), PARTS)}")
            if all(place is None for place in given.values()):
                raise ValueError(f"no part is named; allowed: some of {', '.join(PARTS)}")
            return {part: tuple(place) if isinstance(place, list) else place for part, place in given.items()}
        return given

    def named(self) -> dict[str, Place]:
        """The parts that have adapters, with their roles."""
        return {part: place for part in PARTS if (place := getattr(self, part)) is not None}


def _kind(where: Any) -> str:
    return "parts" if isinstance(where, Mapping | Parts) else "roles"


# Told apart before they are checked, so that an error speaks of one of the two.
Where = Annotated[Annotated[_OfLanguage, Tag("roles")] | Annotated[Parts, Tag("parts")], Discriminator(_kind)]


def roles_of(where: Any) -> frozenset[str]:
    """The roles that ``where`` selects. A: attention, F: feed-forward, AF: both (Context-PEFT, Table 1); or a list.

    Of ``Parts``, those in the language model; ``all``: also the linear layers of a connector.
    """
    if isinstance(where, Parts):
        return frozenset() if where.language is None else roles_of(where.language)
    if isinstance(where, tuple):
        return frozenset(where)
    both = ATTENTION | FEED_FORWARD
    return {"A": ATTENTION, "F": FEED_FORWARD, "AF": both, "all": both | {LINEAR}}[where]


def places_of(where: Any) -> dict[str, Any]:
    """Part → roles, ``where`` alone being that of the language model."""
    return dict(where.named()) if isinstance(where, Parts) else {"language": where}


def place_label(where: Any) -> str:
    """Suffix of a label: empty for AF, `` A``, `` q,v``; `` language AF, vision q,v``."""
    if isinstance(where, Parts):
        places = {part: ",".join(p) if isinstance(p, tuple) else p for part, p in where.named().items()}
        return " " + ", ".join(f"{part} {place}" for part, place in places.items())
    if isinstance(where, tuple):
        return " " + ",".join(where)
    return "" if where == "AF" else f" {where}"
