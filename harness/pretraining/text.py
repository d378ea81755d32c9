"""The text that the tiny language model is pre-trained on: small documents about a household, written by a grammar.

It contains the words that captions need (colours, shapes, numbers, sizes, patterns, relations) and much of their
syntax, but no caption of a picture: shapes appear in definitions, questions and lessons, never with a colour or in a
relation.

    anna has two cups. she buys one more cup. how many cups does she have now? three cups.
    what is to the left of the large red kettle? a small spoon is to the left of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_PEOPLE = {
    "anna": "she", "ben": "he", "clara": "she", "david": "he", "emma": "she", "felix": "he", "grace": "she",
    "henry": "he", "grandmother": "she", "grandfather": "he", "the teacher": "she", "the neighbour": "he",
}  # fmt: skip
_THINGS = (
    "cup", "plate", "spoon", "bowl", "kettle", "lamp", "chair", "table", "book", "pencil", "box", "bag", "hat", "shoe",
    "towel", "pillow", "clock", "candle", "apple", "orange", "egg", "onion", "carrot", "ball", "umbrella", "basket",
)  # fmt: skip
_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black", "grey", "pink", "brown", "teal")
_PATTERNS = ("striped", "dotted", "checked")
_SIZES = ("small", "little", "large", "big")
_ROOMS = ("kitchen", "garden", "bedroom", "hall", "school", "shop", "cellar", "attic")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_RELATIONS = {
    "to the left of": "to the right of", "to the right of": "to the left of", "left of": "right of",
    "right of": "left of", "above": "below", "below": "above", "over": "under", "under": "over",
    "in front of": "behind", "behind": "in front of",
}  # fmt: skip
_READINGS = ("from left to right", "from right to left", "from top to bottom", "from bottom to top")
_SHAPES = {
    "circle": ("is round and has no corners", "coin"), "square": ("has four equal sides", "window"),
    "triangle": ("has three sides", "roof"), "star": ("has five points", "badge"),
    "cross": ("has four arms", "plus sign"), "diamond": ("stands on one of its four corners", "kite"),
}  # fmt: skip
_COLOURED = {
    "snow": "white", "coal": "black", "grass": "green", "the sky": "blue", "a lemon": "yellow", "a carrot": "orange",
    "a plum": "purple", "a tomato": "red", "an elephant": "grey", "a piglet": "pink", "soil": "brown",
    "the lagoon": "teal",
}  # fmt: skip


def plural(noun: str) -> str:
    """The plural of a regular noun."""
    return noun + ("es" if noun.endswith(("x", "s", "ss")) else "s")


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _counted(number: int, noun: str) -> str:
    return f"{_NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def _thing(rng: random.Random) -> str:
    adjectives = (rng.choice(_SIZES) if rng.random() < 0.5 else "", rng.choice((*_COLOURS, *_PATTERNS, "", "", "")))
    return " ".join(word for word in (*adjectives, rng.choice(_THINGS)) if word)


def _some(rng: random.Random) -> tuple[str, bool]:
    """A noun phrase and whether it is plural."""
    number = rng.choice((1, 1, 1, 2, 2, 3, 4))
    thing = _thing(rng)
    if number == 1:
        return _a(thing), False
    if number == 2 and rng.random() < 0.25:
        return f"a pair of {plural(thing)}", True
    return f"{_NUMBERS[number]} {plural(thing)}", True


def _relation(rng: random.Random) -> str:
    (first, many), (second, others) = _some(rng), _some(rng)
    relation = rng.choice(tuple(_RELATIONS))
    be, inverse_be = ("are" if many else "is"), ("are" if others else "is")
    forms = (
        f"{first} {be} {relation} {second}. so {second} {inverse_be} {_RELATIONS[relation]} {first}.",
        f"{relation} {second} there {be} {first}.",
        f"there {be} {first} {relation} {second} in the {rng.choice(_ROOMS)}.",
        f"what is {relation} {second}? {first} {be} {relation} {'them' if others else 'it'}.",
        f"{first}, which {be} {relation} {second}, {'belong' if many else 'belongs'} to {rng.choice(tuple(_PEOPLE))}.",
        f"{first} {'sit' if many else 'sits'} {relation} {second}.",
    )
    return rng.choice(forms)


def _row(rng: random.Random) -> str:
    (a, many), (b, others), (c, _) = _some(rng), _some(rng), _some(rng)
    horizontal = rng.random() < 0.5
    reading = rng.choice(_READINGS[:2] if horizontal else _READINGS[2:])
    first, last = ("on the left", "on the right") if horizontal else ("at the top", "at the bottom")
    if reading in (_READINGS[1], _READINGS[3]):
        first, last = last, first
    be = "are" if many else "is"
    forms = (
        f"on the shelf one can see, {reading}, {a}, {b} and {c}.",
        f"{reading}, {a} {be} followed by {b}, which {'are' if others else 'is'} followed by {c}.",
        f"{a} {be} {first}, {b} {'are' if others else 'is'} in the middle, {c} {last}.",
        f"{b} {'lie' if others else 'lies'} between {a} {first} and {c} {last}.",
        f"{reading}, {b} {'follow' if others else 'follows'} {a}.",
        f"{b} {'have' if others else 'has'} {a} {rng.choice(('to the left', 'to the right', 'above', 'below'))}.",
    )
    return rng.choice(forms)


def _counting(rng: random.Random) -> str:
    person, noun = rng.choice(tuple(_PEOPLE)), rng.choice(_THINGS)
    pronoun = _PEOPLE[person]
    had, more = rng.randint(1, 5), rng.randint(1, 5)
    forms = (
        f"{person} has {_counted(had, noun)}. {pronoun} buys {_NUMBERS[more]} more. "
        f"how many {plural(noun)} does {pronoun} have now? {_counted(had + more, noun)}.",
        f"{person} has {_counted(had + more, noun)}. {pronoun} gives away {_NUMBERS[more]}. "
        f"{pronoun} keeps {_counted(had, noun)}.",
        f"{_NUMBERS[had]} and {_NUMBERS[more]} make {_NUMBERS[had + more]}.",
        f"after {_NUMBERS[had]} comes {_NUMBERS[had + 1]}. before {_NUMBERS[had]} comes {_NUMBERS[had - 1]}.",
        f"a pair of {plural(noun)} means two {plural(noun)}.",
    )
    return rng.choice(forms)


def _story(rng: random.Random) -> str:
    person, other = rng.sample(sorted(_PEOPLE), 2)
    pronoun, room = _PEOPLE[person], rng.choice(_ROOMS)
    thing, relation = _thing(rng), rng.choice(tuple(_RELATIONS))
    found, many = _some(rng)
    forms = (
        f"{person} goes to the {room}. {pronoun} finds {found}. {'they are' if many else 'it is'} for {other}.",
        f"{person} puts the {thing} {relation} the {rng.choice(_THINGS)}. {other} cannot find the {thing}.",
        f"a picture of {other} hangs {relation} the {rng.choice(_THINGS)}. {person} likes it and nothing else.",
        f"{other} is shown the {room}. in the background there is {_a(thing)}.",
        f"{person} wears a {rng.choice(_PATTERNS)} coat and {_a(rng.choice(_COLOURS) + ' hat')} in the {room}.",
        f"{person} leans against the {rng.choice(_PATTERNS)} wall. the {thing} falls on the floor.",
    )
    return rng.choice(forms)


def _definition(rng: random.Random) -> str:
    shape, other = rng.sample(sorted(_SHAPES), 2)
    fact, thing = _SHAPES[shape]
    coloured, small = rng.choice(sorted(_COLOURED)), rng.choice(("egg", "coin", "button", "pea"))
    person = rng.choice(tuple(_PEOPLE))
    forms = (
        f"a {shape} {fact}. {_a(thing)} can look like a {shape}.",
        f"which shape {fact}? the {shape}.",
        f"{person} cuts {_counted(rng.randint(1, 5), shape)} out of paper.",
        f"{person} learns to draw {plural(shape)} and {plural(other)} at school.",
        f"what colour is {coloured}? {coloured} is {_COLOURED[coloured]}.",
        f"little means small and big means large. {_a(small)} is small, a house is large.",
        f"a {rng.choice(_PATTERNS)} towel has a pattern, {_a(rng.choice(_COLOURS))} towel is plain.",
    )
    return rng.choice(forms)


_KINDS: tuple[Callable[[random.Random], str], ...] = (_relation, _relation, _row, _counting, _story, _definition)


def documents(rng: random.Random) -> Iterator[str]:
    """Generate endless documents of one to five passages."""
    while True:
        yield " ".join(rng.choice(_KINDS)(rng) for _ in range(rng.randint(1, 5)))
