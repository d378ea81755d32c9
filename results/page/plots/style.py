"""Shared by all plots: style, colours, frames, axes, and the conversion to inline SVG.

Frames are laid out explicitly, in inches, because matplotlib's constrained layout draws everything twice.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from harness.core.record import MetricInfo
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard
from results.statistics.intervals import Estimate

# Placeholders for colours that the style sheet of the page defines.
INK, RULE, CARD = "#010203", "#040506", "#070809"
_THEMED = {INK: "currentColor", RULE: "var(--rule)", CARD: "var(--card)"}
# Okabe and Ito's palette, distinguishable with any colour vision, without its yellow and black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
FAR_APART = 5.0  # ratio of largest to smallest mean from which a scale is logarithmic
_INCH = 72  # points; also the dots per inch, so that pixels are points
LETTER = 0.56  # average letter width in the fonts of the page, relative to the text size
_LONGEST_NAME = 50  # characters beside an axis
MOST_PANELS = 9  # of one plot: each takes time to draw, and more cannot be compared
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keep text as text: smaller, selectable, in the font of the page
    "svg.hashsalt": "report",  # reproducible ids
    "text.parse_math": False,  # labels are data
    "figure.dpi": _INCH,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), RULE),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
}


@dataclass(frozen=True)
class Plot:
    """One plot; ``title`` is also its text for screen readers."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Drawings:
    """The plots of one kind that are drawn, and the number of those left out."""

    plots: tuple[Plot, ...] = ()
    left_out: int = 0

    def __iter__(self) -> Iterator[Plot]:
        return iter(self.plots)

    def __len__(self) -> int:
        return len(self.plots)


def svg(figure: Figure, name: str) -> Markup:
    """The figure as inline SVG; ``name`` makes its ids unique in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for stand_in, themed in _THEMED.items():
        drawn = drawn.replace(stand_in, themed)
    for reference in ('id="', "url(#", 'href="#'):  # matplotlib's ids are unique only within a figure
        drawn = drawn.replace(reference, f"{reference}{name}-")
    return Markup(drawn)  # noqa: S704 -- matplotlib escapes the text it draws


@dataclass(frozen=True)
class Look:
    """Colour and marker of a label in all plots."""

    colour: str
    marker: str


def looks_of(board: Leaderboard) -> dict[str, Look]:
    """A colour and a marker for each label, in the order of the plan; the reference has the text colour."""
    labels = dict.fromkeys(trial.label for trial in board.run.plan.trials)
    references = {row.label for row in board.rows if row.is_reference}
    looks = {label: Look(INK, "*") for label in references}
    for index, label in enumerate(label for label in labels if label not in references):
        looks[label] = Look(_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])
    return looks


def frame(
    width: float, height: float, left: float = 0.75, bottom: float = 0.55, top: float = 0.1
) -> tuple[Figure, Axes]:
    """A figure with one axes; margins and sizes in inches."""
    figure = Figure(figsize=(width, height))
    return figure, figure.add_axes(
        (left / width, bottom / height, 1 - (left + 0.15) / width, 1 - (bottom + top) / height)
    )


def panels(count: int, bottom: float = 0.55, left: float = 0.5) -> tuple[Figure, list[Axes]]:
    """A figure with up to three axes per line and shared scales; margins in inches."""
    columns = min(3, count)
    lines = -(-count // columns)
    width, height = 6.4, 0.3 + bottom + (2.6, 2.0, 1.6)[columns - 1] * lines
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left / width, bottom / height, 1 - 0.2 / width, 1 - 0.25 / height, wspace=0.18, hspace=0.35)
    found = cast(list[Axes], figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist())
    for axes in found[count:]:
        axes.set_visible(False)
    for axes in found[count - columns : count]:  # the lowest of their columns
        axes.tick_params(labelbottom=True)
    return figure, found[:count]


def panel_title(axes: Axes, text: str) -> None:
    """Title of a panel, at a fixed height, because otherwise matplotlib measures every tick to find one."""
    axes.set_title(text, y=1.0)


def beneath(figure: Figure, text: str) -> None:
    """Text below all panels: the horizontal axis, and a legend of the lines."""
    figure.text(0.5, 0.06 / figure.get_figheight(), text, ha="center", va="bottom", linespacing=1.35)


def beside(figure: Figure, text: str) -> None:
    """What is on the vertical axis of all panels."""
    figure.text(0.06 / figure.get_figwidth(), 0.5, text, ha="left", va="center", rotation=90)


def better(info: MetricInfo) -> str:
    """``higher is better``."""
    return "higher is better" if info.higher_is_better else "lower is better"


def score_label(info: MetricInfo) -> str:
    """What stands at an axis of test scores."""
    return f"test {info.label} ({better(info)})"


Mark = tuple[float, float, Look, bool]  # x, y, look, filled


def marks(axes: Axes, found: Sequence[Mark]) -> None:
    """A marker for each point: hollow is agnostic, filled is all else. All of one shape are drawn at once."""
    for marker in dict.fromkeys(look.marker for _, _, look, _ in found):
        own = [one for one in found if one[2].marker == marker]
        axes.scatter(
            [x for x, *_ in own],
            [y for _, y, *_ in own],
            s=(10 if marker == "*" else 6.5) ** 2,
            marker=marker,
            c=[look.colour if filled else CARD for _, _, look, filled in own],
            edgecolors=[look.colour for _, _, look, _ in own],
            linewidths=1.5,
            zorder=3,
        )


def curve(axes: Axes, xs: Sequence[float], rows: Sequence[Row], metric: str, look: Look, faint: bool = False) -> None:
    """Means as a line and 95 % intervals as a band; dashed is agnostic; ``faint`` for what others are held against."""
    estimates = [row.metrics[metric] for row in rows]
    line = "--" if rows[0].grouping == "agnostic" else "-"
    strength = 0.45 if faint else 1.0
    axes.plot(xs, [one.mean for one in estimates], line, color=look.colour, lw=1.2 if faint else 1.8, alpha=strength)
    bounds = [(x, one.low, one.high) for x, one in zip(xs, estimates, strict=True) if one.low is not None]
    if bounds:
        at, lows, highs = zip(*bounds, strict=True)
        axes.fill_between(at, lows, highs, color=look.colour, alpha=0.1 if faint else 0.16, lw=0)


def within(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Limits that show all means, and as much of the intervals as keeps the means distinguishable.

    A t interval of two seeds may be ten times as wide as the range of the means.
    """
    means = [estimate.mean for estimate in estimates]
    low, high = min(means), max(means)
    room = (high - low) or abs(high) * 0.1 or 1.0
    lows = [estimate.low for estimate in estimates if estimate.low is not None]
    highs = [estimate.high for estimate in estimates if estimate.high is not None]
    return (
        max(min(lows, default=low), low - room) - 0.08 * room,
        min(max(highs, default=high), high + room) + 0.08 * room,
    )


def log_if_far_apart(axes: Axes, which: Literal["x", "y"], means: Sequence[float]) -> None:
    """A logarithmic scale if the means differ by a large factor."""
    low, high = min(means), max(means)
    if low <= 0 or high / low < FAR_APART:
        return
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * 1.25)
    else:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.25)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(log_ticks(low / 1.25, high * 1.25)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Round tick values for a logarithmic axis, at least three if possible."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    found: list[float] = []
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [step * power for power in powers for step in steps if low <= step * power <= high]
        if len(found) >= 3:
            break
    return found if len(found) > 1 else [float(tick) for tick in MaxNLocator(4).tick_values(low, high)]


def ticks_at(axis: Axis, values: Sequence[float], most: int) -> None:
    """A tick at each value, with at most ``most`` labels, always including the last one."""
    step = -(-len(values) // most)
    shown = list(values)[::-1][::step][::-1]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}" if value < 10_000 else f"{value / 1000:,.4g}k")
    axis.set_minor_locator(FixedLocator(list(values)))
    axis.set_minor_formatter(NullFormatter())


def log_room(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis with 4 % of room on either side."""
    low, high = np.log(min(values)), np.log(max(values))
    room = 0.04 * ((high - low) or 1.0)
    return float(np.exp(low - room)), float(np.exp(high + room))


def _shortened(name: str) -> str:
    """At most so long that the axes beside it have room."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def names_on_y(axes: Axes, names: Sequence[str]) -> None:
    """A line for each name, the first at the top."""
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def room_for(names: Sequence[str], size: float = 10) -> float:
    """Inches that the longest name needs next to an axis."""
    return 0.15 + max(len(_shortened(name)) for name in names) * size * LETTER / _INCH
