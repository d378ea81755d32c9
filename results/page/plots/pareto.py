"""Pareto plots: quality against a cost, the front as a step line, and labels where there is room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from harness.core.durations import duration
from harness.core.record import MetricInfo
from results.leaderboard.efficiency import Cost, Front, Point
from results.leaderboard.format import size_text
from results.page.plots.style import (
    FAR_APART,
    INK,
    LETTER,
    MOST_PANELS,
    Look,
    frame,
    log_if_far_apart,
    log_ticks,
    marks,
    score_label,
    within,
)

_SIZE = 9  # of a label, in points
_CLEAR = 4.5  # half of a marker, in points
_COLUMNS = 4  # of the legend
_TICKS = 7
_NEAR_ZERO = 0.5  # fraction of the smallest positive cost below which a logarithmic axis is linear


def pareto_figure(front: Front, primary: MetricInfo, looks: dict[str, Look]) -> Figure:
    """All points of the setting of a front, cheapest on the left."""
    labels = [label for label in looks if any(one.row.label == label for one in front.points)]
    lines = -(-len(labels) // _COLUMNS) if len(labels) <= MOST_PANELS else 0
    figure, axes = frame(6.4, 4.2 + 0.2 * lines, left=0.85, bottom=0.65 + 0.2 * lines)
    if lines:
        shown = [Line2D([], [], color=looks[name].colour, marker=looks[name].marker, ls="") for name in labels]
        figure.legend(shown, labels, loc="lower center", ncols=_COLUMNS, fontsize=_SIZE, handletextpad=0.1)
    estimates = [one.quality for one in front.points]
    axes.set_ylim(*within(estimates))
    if not primary.higher_is_better:  # perplexities may differ by large factors, accuracies do not
        log_if_far_apart(axes, "y", [estimate.mean for estimate in estimates])
    _cost_axis(axes, front)
    best = [one for one in front.points if one.on_front]
    right = axes.get_xlim()[1]
    axes.plot(
        [*(one.cost for one in best), right],
        [*(one.quality.mean for one in best), best[-1].quality.mean],
        drawstyle="steps-post",
        color=INK,
        lw=1.2,
        alpha=0.5,
    )
    bars = [
        (one.cost, one.quality.low, one.quality.high, looks[one.row.label].colour)
        for one in front.points
        if one.quality.low is not None and one.quality.high is not None
    ]
    if bars:
        costs, lows, highs, colours = zip(*bars, strict=True)
        axes.vlines(costs, lows, highs, colors=colours, lw=1.4, alpha=0.4)
    marks(
        axes,
        [(one.cost, one.quality.mean, looks[one.row.label], one.row.grouping != "agnostic") for one in front.points],
    )
    _name_points(axes, front.points, primary.higher_is_better)
    axes.set_ylabel(score_label(primary))
    return figure


def _cost_axis(axes: Axes, front: Front) -> None:
    """Logarithmic if costs differ by a large factor; includes 0, the cost of rows that train nothing."""
    costs = [one.cost for one in front.points]
    above = [cost for cost in costs if cost > 0]
    low, high = min(above, default=1.0), max(above, default=1.0)
    ticks = cost_ticks(low, high, front.cost, zero=len(above) < len(costs))
    if high / low < FAR_APART:
        room = 0.1 * ((high - min(costs)) or high)
        axes.set_xlim(min(costs) - room, high + room)
    elif min(costs) > 0:
        axes.set_xscale("log")
        room = (high / low) ** 0.1
        axes.set_xlim(low / room, high * room)
    else:
        axes.set_xscale("symlog", linthresh=low * _NEAR_ZERO, linscale=0.3)
        axes.set_xlim(-0.2 * low, high * (high / low) ** 0.1)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value, front.cost)))
    scale = "; log scale" if axes.get_xscale() != "linear" else ""
    axes.set_xlabel(f"{front.cost.label} (lower is better{scale})")


def cost_ticks(low: float, high: float, cost: Cost, zero: bool = False) -> list[float]:
    """Ticks between two costs, round in the unit of the largest, and 0 if the axis includes it."""
    units = {"memory": [1024.0**power for power in range(5)], "time": [1.0, 60.0, 3600.0]}.get(cost.name, [1.0])
    if high / low < FAR_APART:
        unit = max((unit for unit in units if unit <= high), default=1.0)
        return [float(tick) * unit for tick in MaxNLocator(6).tick_values(0 if zero else low / unit, high / unit)]
    steps = {"memory": (1, 4, 16, 64, 256), "time": (1, 2, 5, 10, 20, 30)}.get(cost.name, ())
    found = [unit * step for unit in units for step in steps if low <= unit * step <= high]
    if len(found) < 2:
        found = log_ticks(low, high)
    return [0.0] * zero + found[:: -(-len(found) // _TICKS)]


def tick_text(value: float, cost: Cost) -> str:
    """``20k``, ``64 MiB``, ``5 min``."""
    if cost.name == "memory":
        return size_text(value)
    if cost.name == "time":
        return f"{value:g} s" if value < 60 else duration(value).removesuffix(" 00 s").removesuffix(" 00 min")
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


@dataclass(frozen=True)
class Box:
    """A rectangle in points, from the lower left of the figure."""

    left: float
    low: float
    right: float
    high: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        return self.left < other.right and other.left < self.right and self.low < other.high and other.low < self.high

    def distance(self, x: float, y: float) -> float:
        """From a point outside to the nearest edge."""
        return math.hypot(max(self.left - x, 0, x - self.right), max(self.low - y, 0, y - self.high))

    def holds(self, other: Box) -> bool:
        """Whether the other lies in this one."""
        return (
            self.left <= other.left and other.right <= self.right and self.low <= other.low and other.high <= self.high
        )


@dataclass(frozen=True)
class Name:
    """A label to place beside a point, and the preferred side: -1 is left and below."""

    text: str
    across: int
    up: int


def place(inside: Box, centres: Sequence[tuple[float, float]], names: Sequence[Name]) -> list[Box | None]:
    """Place the labels in order, each closest to its own point and covering no point or other label.

    Args:
        inside: the area for labels.
        centres: all data points, in typographic points.
        names: labels of the first data points. Their width is estimated, because only the page knows its font.

    Returns:
        A box for each label; None if there is no room.
    """
    taken = [Box(x - _CLEAR, y - _CLEAR, x + _CLEAR, y + _CLEAR) for x, y in centres]
    found: list[Box | None] = []
    for (x, y), name in zip(centres, names, strict=False):
        width, half, gap = len(name.text) * _SIZE * LETTER, 0.6 * _SIZE, _CLEAR + 1.5
        middle = x - width / 2
        near, far = (x + gap, x - gap - width)[:: name.across]
        rise = name.up * (0.5 * gap + half)  # of a corner; straight above or below needs more
        candidates = [(near, y + rise), (middle, y + name.up * (gap + half)), (near, y), (near, y - rise)]
        candidates += [(far, y + rise), (far, y), (middle, y - name.up * (gap + half)), (far, y - rise)]
        boxes = [Box(left, centre - half, left + width, centre + half) for left, centre in candidates]
        others = [centre for centre in centres if centre != (x, y)]
        box = next((box for box in boxes if inside.holds(box) and _clear(box, (x, y), others, taken)), None)
        taken += [box] if box else []
        found.append(box)
    return found


def _clear(box: Box, own: tuple[float, float], others: Sequence[tuple[float, float]], taken: Sequence[Box]) -> bool:
    """Whether a label there covers nothing and is clearly closer to its own point than to others."""
    near = box.distance(*own)
    return not any(box.meets(one) for one in taken) and all(box.distance(*other) > 1.6 * near for other in others)


def _name_points(axes: Axes, points: Sequence[Point], higher_is_better: bool) -> None:
    """Label the points of the front on its empty side, and a reference behind the front on the other side."""
    better = 1 if higher_is_better else -1
    # The most expensive first, because cheap ones are crowded.
    named = [one for one in points[::-1] if one.on_front or one.row.is_reference]
    ordered = [*named, *(one for one in points if one not in named)]
    centres = axes.transData.transform([(one.cost, one.quality.mean) for one in ordered])
    middles = [(float(x), float(y)) for x, y in centres]
    corners = axes.transAxes.transform([(0, 0), (1, 1)])
    inside = Box(*corners[0], *corners[1])
    to_axes = axes.transAxes.inverted()
    names = [Name(one.name, -1, better) if one.on_front else Name(one.name, 1, -better) for one in named]
    for one, box in zip(named, place(inside, middles, names), strict=True):
        if box is not None:
            x, y = to_axes.transform((box.left, (box.low + box.high) / 2))
            axes.text(x, y, one.name, transform=axes.transAxes, size=_SIZE, va="center_baseline")
