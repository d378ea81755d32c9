"""The table of vision- and audio-language classes in ``docs/families.md``, from a small model of each."""

from __future__ import annotations

from typing import Any

import harness
from adapters.placement.parts import TOWERS, medium_of
from tests.support.vlm_adapters import linear_layers
from tests.support.vlms import MEDIA, VLMS, small

_HEAD = """
## Vision-language and audio-language models

What [`harness.adapt`](adapters.md#vision-language-and-audio-language-models) does with each class, from a small model
of it. In the inner language model every one has the roles q k v o and gate up down. `placeholder` is the config's
name for the token id that `contexts_from` maps to the medium's context. A tower's roles are those of its blocks.
`paligemma` is a PaliGemma 2, on Gemma 2. Of classes that are not here the part `language` alone is known.

| model type | placeholder | tower | its roles | layers of the connector | `mmca` | `moka` | `soft_prompt` |
|---|---|---|---|---|---|---|---|
"""
_JOINT = ("mmca", "moka", "soft_prompt")


def section() -> str:
    """The section, with a line for each class."""
    return _HEAD + "".join(f"| {name} | {' | '.join(_cells(name))} |\n" for name in VLMS)


def _cells(name: str) -> list[str]:
    model = small(name)
    medium = medium_of(model)
    assert medium is not None
    table = TOWERS[type(model.get_submodule(medium.tower)).__name__].values()
    has = {role if isinstance(role, str) else role.name: None for role in table}
    connector = sorted(linear_layers(model, *medium.connector))
    return [
        f"`{medium.token}`",
        f"{medium.part}: `{medium.tower}`",
        " ".join(role for role in has if role not in ("mlp", "norm")),
        str(len(connector)) if connector else "none: a matrix that belongs to no layer",
        *(_joint(name, method) for method in _JOINT),
    ]


def _joint(name: str, method: str) -> str:
    """Whether a method works on a class: yes, or the reason for which it is refused."""
    medium = VLMS[name].context
    grouping: Any = "agnostic" if method == "mmca" else "specific"
    try:
        harness.adapt(small(name), {"method": method}, (medium, "text"), grouping, contexts_from={MEDIA: medium})
    except harness.UserError as error:
        return "refused: " + str(error).partition(f"{name} model")[2].lstrip(":, ").removeprefix("which ")
    return "yes"
