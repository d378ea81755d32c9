"""The grammar of the captions of the task ``scenes``.

Captions of one scene differ in word order, voice, direction and in what they mention, so that a model which ignores
order or relations gets them wrong:

    a pair of large red stars are to the left of a small blue circle.
    on a striped background, a blue circle is to the right of two red stars.
    from right to left, a small blue circle and two large red stars.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tasks.drawing.scene import Group, Scene


@dataclass(frozen=True)
class _Direction:
    """A reading direction along an axis. ``forms`` describe where the first group is, relative to the next one."""

    forms: tuple[str, ...]
    inverse_forms: tuple[str, ...]
    first_side: str
    last_side: str
    beside: str  # "has A to the left"
    reading: str


_HORIZONTAL = _Direction(
    ("to the left of", "left of"),
    ("to the right of", "right of"),
    "on the left",
    "on the right",
    "to the left",
    "from left to right",
)
_VERTICAL = _Direction(("above",), ("below", "under"), "at the top", "at the bottom", "above", "from top to bottom")
_HORIZONTAL_BACK = _Direction(
    _HORIZONTAL.inverse_forms,
    _HORIZONTAL.forms,
    _HORIZONTAL.last_side,
    _HORIZONTAL.first_side,
    "to the right",
    "from right to left",
)
_VERTICAL_BACK = _Direction(
    _VERTICAL.inverse_forms,
    _VERTICAL.forms,
    _VERTICAL.last_side,
    _VERTICAL.first_side,
    "below",
    "from bottom to top",
)


# a, b, c: the groups in reading order; near: the relation of one to the next; far: the inverse.
_SINGLE = (
    "{a}",
    "there {a_is} {a}",
    "{a} and nothing else",
    "a picture of {a}",
    "{a} {a_is} shown",
    "one can see {a}",
)
_PAIR = (
    "{a} {near} {b}",
    "{a} {a_is} {near} {b}",
    "{a} {a_sits} {near} {b}",
    "{near} {b} there {a_is} {a}",
    "{a} {first} and {b} {last}",
    "{b} {b_has} {a} {beside}",
    "{reading}, {a} and {b}",
    "{reading}, {a} {a_is} followed by {b}",
    "{reading}, {b} {b_follows} {a}",
)
_TRIPLE = (
    "{reading}, {a}, {b} and {c}",
    "{b} between {a} {first} and {c} {last}",
    "{a} {a_is} {near} {b}, which {b_is} {near} {c}",
    "{b} {b_is} {far} {a} and {near} {c}",
    "{a} {first}, {b} in the middle and {c} {last}",
    "{reading}, {a} {a_is} followed by {b}, which {b_is} followed by {c}",
)
_BACKGROUND = (
    "{clause}.",
    "{clause}.",
    "{clause}, on a {background} background.",
    "{clause}, against a {background} background.",
    "on a {background} background, {clause}.",
)
# Words listed several times are chosen more often; "" omits the size.
_SIZE_WORDS = {"small": ("small", "small", "small", "little", ""), "large": ("large", "large", "large", "big", "")}
_NUMBER_WORDS = {2: ("two", "two", "two", "a pair of"), 3: ("three",)}


def captions(scene: Scene, rng: random.Random, count: int = 5) -> tuple[str, ...]:
    """Write ``count`` captions of a scene, all different and all true."""
    written: dict[str, None] = {}  # a dictionary keeps the order
    while len(written) < count:
        clause = _single(scene, rng) if scene.axis == "none" else _related(scene, rng)
        written[rng.choice(_BACKGROUND).format(clause=clause, background=scene.background)] = None
    return tuple(written)


def _single(scene: Scene, rng: random.Random) -> str:
    return rng.choice(_SINGLE).format(**_words("a", scene.groups[0], rng))


def _related(scene: Scene, rng: random.Random) -> str:
    directions = (_HORIZONTAL, _HORIZONTAL_BACK) if scene.axis == "horizontal" else (_VERTICAL, _VERTICAL_BACK)
    direction = rng.choice(directions)
    groups = scene.groups if direction is directions[0] else scene.groups[::-1]
    words = {
        "near": rng.choice(direction.forms),
        "far": rng.choice(direction.inverse_forms),
        "first": direction.first_side,
        "last": direction.last_side,
        "beside": direction.beside,
        "reading": direction.reading,
    }
    for name, group in zip("abc", groups, strict=False):  # two groups or three
        words |= _words(name, group, rng)
    return rng.choice(_PAIR if len(groups) == 2 else _TRIPLE).format(**words)


def _words(name: str, group: Group, rng: random.Random) -> dict[str, str]:
    """The noun phrase of a group, and the verbs that agree with it."""
    many = group.count > 1
    noun = group.shape + ("es" if group.shape.endswith("s") else "s") * many
    described = " ".join(word for word in (rng.choice(_SIZE_WORDS[group.size]), group.colour, noun) if word)
    number = rng.choice(_NUMBER_WORDS[group.count]) if many else "an" if described[0] in "aeiou" else "a"
    return {
        name: f"{number} {described}",
        f"{name}_is": "are" if many else "is",
        f"{name}_sits": "sit" if many else "sits",
        f"{name}_has": "have" if many else "has",
        f"{name}_follows": "follow" if many else "follows",
    }
