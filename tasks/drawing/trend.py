"""The content of a series of the task ``trends``, how it is drawn, and how it is described.

A trend is one to three movements, one after the other, smooth or noisy:

    Trend(moves=(Move("rise", "large"), Move("level", ""), Move("wave", "small")), noisy=True)

Which split a trend belongs to is decided by a hash of its content alone, so no trend is ever in two splits, whatever
the seed.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from tasks.base import Split

KINDS = ("level", "rise", "fall", "peak", "dip", "wave", "jump", "drop")
AMPLITUDES = {"small": (1.0, 2.0), "large": (6.0, 12.0)}  # lowest and highest
LENGTHS = (24, 40)  # values of one movement, lowest and highest
LEVELS = (-20.0, 20.0)  # where a series starts
NOISE = 0.15  # standard deviation of a noisy one

_VERBS = {
    "level": "stays level",
    "rise": "goes up {how}",
    "fall": "goes down {how}",
    "peak": "shows a {size} peak",
    "dip": "shows a {size} dip",
    "wave": "makes {size} waves",
    "jump": "takes a {size} step up",
    "drop": "takes a {size} step down",
}
_NOUNS = {
    "level": "a level part",
    "rise": "a {size} rise",
    "fall": "a {size} fall",
    "peak": "a {size} peak",
    "dip": "a {size} dip",
    "wave": "a {size} wave",
    "jump": "a {size} step up",
    "drop": "a {size} step down",
}
_HOW = {"small": "a little", "large": "a lot", "": ""}
# v: verb phrases; n: the same as noun phrases; both in the order of time.
_FORMS = {
    1: ("it {v[0]}", "the series {v[0]}", "there is {n[0]}", "one can see {n[0]}", "{n[0]} and nothing else"),
    2: (
        "it {v[0]}, then it {v[1]}",
        "the series {v[0]} and then {v[1]}",
        "first there is {n[0]}, then {n[1]}",
        "{n[0]} is followed by {n[1]}",
        "{n[1]} follows {n[0]}",
        "after {n[0]} it {v[1]}",
        "it {v[1]} after {n[0]}",
    ),
    3: (
        "it {v[0]}, then it {v[1]}, and in the end it {v[2]}",
        "the series {v[0]}, {v[1]} and then {v[2]}",
        "from left to right, {n[0]}, {n[1]} and {n[2]}",
        "first there is {n[0]}, then {n[1]} and in the end {n[2]}",
        "between {n[0]} and {n[2]} there is {n[1]}",
        "after {n[0]} it {v[1]}, then it {v[2]}",
    ),
}


@dataclass(frozen=True)
class Move:
    """One movement; ``size`` is "small", "large", or "" where nothing moves."""

    kind: str
    size: str


@dataclass(frozen=True)
class Trend:
    """The content of a series, in the order of time."""

    moves: tuple[Move, ...]
    noisy: bool

    def split(self) -> Split:
        """The split this content belongs to: 80 % train, 10 % validation, 10 % test."""
        bucket = int.from_bytes(hashlib.sha256(repr(self).encode()).digest()[:8], "big") % 10
        return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def generator(*key: object) -> random.Random:
    """A generator that depends on the key only: not on the order of calls, the process or the machine."""
    return random.Random("/".join(map(str, key)))  # noqa: S311 - curves, not secrets


def draw_trend(rng: random.Random, split: Split) -> Trend:
    """Draw random content until it is of the split asked for."""
    while True:
        moves: list[Move] = []
        wanted = rng.choices((1, 2, 3), weights=(3, 9, 8))[0]
        while len(moves) < wanted:
            kind = rng.choice(KINDS)
            # Two of one kind in a row would be one longer movement.
            if not moves or moves[-1].kind != kind:
                moves.append(Move(kind, "" if kind == "level" else rng.choice(tuple(AMPLITUDES))))
        trend = Trend(tuple(moves), rng.random() < 0.5)
        if trend.split() == split:
            return trend


def curve(trend: Trend, rng: random.Random) -> list[float]:
    """Draw the values of a trend; each movement starts where the one before it ended."""
    values: list[float] = []
    level = rng.uniform(*LEVELS)
    for move in trend.moves:
        amplitude = rng.uniform(*AMPLITUDES[move.size]) if move.size else 0.0
        length = rng.randint(*LENGTHS)
        periods = rng.randint(2, 3)
        values += [level + amplitude * _shape(move.kind, (i + 1) / length, periods) for i in range(length)]
        level = values[-1]
    return [value + rng.gauss(0.0, NOISE) for value in values] if trend.noisy else values


def _shape(kind: str, t: float, periods: int) -> float:
    """A movement of amplitude 1 that starts at 0, at time t from 0 to 1."""
    match kind:
        case "rise" | "fall":
            height = t
        case "peak" | "dip":
            height = math.sin(math.pi * t) ** 2
        case "jump" | "drop":
            height = float(t > 0.5)
        case "wave":
            height = math.sin(2 * math.pi * periods * t)
        case _:
            height = 0.0
    return -height if kind in ("fall", "dip", "drop") else height


def descriptions(trend: Trend, rng: random.Random, count: int) -> list[str]:
    """``count`` different sentences that are true of a trend; some also say whether there is noise."""
    sentences: dict[str, None] = {}  # a set that keeps its order
    while len(sentences) < count:
        v = [_VERBS[move.kind].format(how=_HOW[move.size], size=move.size) for move in trend.moves]
        n = [_NOUNS[move.kind].format(size=move.size) for move in trend.moves]
        sentence = rng.choice(_FORMS[len(trend.moves)]).format(v=v, n=n)
        if rng.random() < 0.4:
            sentence += ", with noise" if trend.noisy else ", without noise"
        sentences[f"{sentence}."] = None
    return list(sentences)
