"""What is in a picture of the task ``scenes``, and how it is drawn.

A scene is one to three groups of equal objects, side by side or one above the other, on a background:

    Scene(background="striped", axis="horizontal",
          groups=(Group("star", "red", "large", 2), Group("circle", "blue", "small", 1)))

Which split a scene belongs to is decided by a hash of its content alone, so no scene is ever in two splits, whatever
the seed. Objects are placed in a grid of 3 × 3 cells of 16 pixels and never overlap.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

from tasks.base import Split

Axis = Literal["horizontal", "vertical", "none"]  # "none": a single group has no neighbour
Point = tuple[float, float]
Colour = tuple[int, int, int]

IMAGE_SIZE = 48
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS: dict[str, Colour] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 81, 214),
    "yellow": (240, 220, 50),
    "orange": (255, 137, 14),
    "purple": (137, 60, 190),
    "white": (243, 243, 243),
    "black": (20, 20, 20),
}
DIAMETERS = {"small": 8.5, "large": 14.5}  # pixels
COUNTS = (1, 2, 3)
PLAIN: dict[str, Colour] = {
    "grey": (128, 128, 128),
    "pink": (245, 175, 200),
    "brown": (115, 75, 45),
    "teal": (20, 128, 128),
}
TEXTURES: dict[str, tuple[Colour, Colour]] = {
    "striped": ((196, 188, 170), (150, 142, 124)),
    "dotted": ((176, 196, 176), (118, 140, 118)),
    "checked": ((190, 190, 210), (146, 146, 168)),
}
BACKGROUNDS = (*PLAIN, *TEXTURES)

_CELL = IMAGE_SIZE // 3
_SUPERSAMPLING = 4
_COLOUR_JITTER = 12


@dataclass(frozen=True)
class Group:
    """Equal objects placed together."""

    shape: str
    colour: str
    size: str
    count: int


@dataclass(frozen=True)
class Scene:
    """The content of a picture; ``groups`` go from left to right or from top to bottom along ``axis``."""

    background: str
    axis: Axis
    groups: tuple[Group, ...]

    def split(self) -> Split:
        """The split this content belongs to: 80 % train, 10 % validation, 10 % test."""
        digest = hashlib.sha256(repr(self).encode()).digest()
        bucket = int.from_bytes(digest[:8], "big") % 10
        return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


@dataclass(frozen=True)
class PlacedObject:
    """One object of a picture; centre in pixels from the top left corner."""

    group: Group
    centre: Point


def generator(*key: object) -> random.Random:
    """A generator that depends on the key only: not on the order of calls, the process or the machine."""
    return random.Random("/".join(map(str, key)))  # noqa: S311 - pictures, not secrets


def draw_scene(rng: random.Random, split: Split) -> Scene:
    """Draw random content until it is of the split asked for."""
    while True:
        groups: list[Group] = []
        wanted = rng.choices((1, 2, 3), weights=(5, 9, 6))[0]
        while len(groups) < wanted:
            group = Group(
                rng.choice(SHAPES), rng.choice(tuple(COLOURS)), rng.choice(tuple(DIAMETERS)), rng.choice(COUNTS)
            )
            # Two groups of the same colour and shape could not be distinguished in a caption without sizes.
            if all((group.shape, group.colour) != (other.shape, other.colour) for other in groups):
                groups.append(group)
        axis: Axis = "none" if wanted == 1 else rng.choice(("horizontal", "vertical"))
        scene = Scene(rng.choice(BACKGROUNDS), axis, tuple(groups))
        if scene.split() == split:
            return scene


def place(scene: Scene, rng: random.Random) -> tuple[PlacedObject, ...]:
    """Choose the position of every object: one cell each, a few pixels off its centre."""
    if scene.axis == "none":
        group = scene.groups[0]
        cells = rng.sample([(x, y) for x in range(3) for y in range(3)], group.count)
        return tuple(PlacedObject(group, (_along(x, 3, group, rng), _along(y, 3, group, rng))) for x, y in cells)
    objects = []
    for position, group in enumerate(scene.groups):
        for cell in rng.sample(range(3), group.count):
            along = _along(position, len(scene.groups), group, rng)
            across = _along(cell, 3, group, rng)
            objects.append(PlacedObject(group, (along, across) if scene.axis == "horizontal" else (across, along)))
    return tuple(objects)


def _along(position: int, strips: int, group: Group, rng: random.Random) -> float:
    width = IMAGE_SIZE / strips
    # At most 3 pixels: then no two objects of a picture have their centres in the same one of 4 × 4 cells.
    jitter = min(3.0, (width - DIAMETERS[group.size]) / 2)
    return (position + 0.5) * width + rng.uniform(-jitter, jitter)


def paint(scene: Scene, objects: tuple[PlacedObject, ...], rng: random.Random) -> Image.Image:
    """Draw the picture: RGB, 48 × 48 pixels, edges smoothed by drawing it four times as large."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    picture = Image.new("RGB", (side, side))
    canvas = ImageDraw.Draw(picture)
    _paint_background(canvas, scene.background, side, rng)
    colours = {group: _jittered(COLOURS[group.colour], rng) for group in scene.groups}
    for placed in objects:
        x, y = (coordinate * _SUPERSAMPLING for coordinate in placed.centre)
        radius = DIAMETERS[placed.group.size] * _SUPERSAMPLING / 2
        _PAINTERS[placed.group.shape](canvas, x, y, radius, colours[placed.group])
    return picture.reduce(_SUPERSAMPLING)


def _jittered(colour: Colour, rng: random.Random) -> Colour:
    red, green, blue = (min(255, max(0, channel + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for channel in colour)
    return red, green, blue


def _paint_background(canvas: ImageDraw.ImageDraw, background: str, side: int, rng: random.Random) -> None:
    if background in PLAIN:
        canvas.rectangle((0, 0, side, side), fill=_jittered(PLAIN[background], rng))
        return
    base, mark = (_jittered(colour, rng) for colour in TEXTURES[background])
    canvas.rectangle((0, 0, side, side), fill=base)
    pitch = 6 * _SUPERSAMPLING
    offset = rng.randrange(pitch)
    steps = range(-pitch - offset, side, pitch)
    if background == "striped":
        for x in steps:
            canvas.rectangle((x, 0, x + pitch / 2, side), fill=mark)
        return
    for row, y in enumerate(steps):
        for column, x in enumerate(steps):
            if background == "dotted":
                canvas.ellipse((x, y, x + pitch / 2, y + pitch / 2), fill=mark)
            elif (row + column) % 2:
                canvas.rectangle((x, y, x + pitch, y + pitch), fill=mark)


_Painter = Callable[[ImageDraw.ImageDraw, float, float, float, Colour], None]


def _circle(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Colour) -> None:
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _square(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Colour) -> None:
    half = 0.88 * radius
    canvas.rectangle((x - half, y - half, x + half, y + half), fill=fill)


def _triangle(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Colour) -> None:
    canvas.polygon([(x, y - radius), (x + radius, y + 0.8 * radius), (x - radius, y + 0.8 * radius)], fill=fill)


def _star(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Colour) -> None:
    points = []
    for corner in range(10):
        length = radius if corner % 2 == 0 else 0.42 * radius
        angle = math.pi * corner / 5
        points.append((x + length * math.sin(angle), y - length * math.cos(angle)))
    canvas.polygon(points, fill=fill)


def _cross(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Colour) -> None:
    arm = 0.32 * radius
    canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)


def _diamond(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Colour) -> None:
    half = 0.68 * radius
    canvas.polygon([(x, y - radius), (x + half, y), (x, y + radius), (x - half, y)], fill=fill)


_PAINTERS: dict[str, _Painter] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
}
