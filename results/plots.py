"""The plots, drawn by matplotlib as inline SVG. Text, grid and background follow the page's light or dark theme."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

from results.stats import Estimate
from results.table import RIGHT, WRONG, Leaderboard, Row

# Stand-ins in the drawing for what only the page's style sheet knows.
_INK, _RULE, _CARD = "#010203", "#040506", "#070809"
_THEMED = {_INK: "currentColor", _RULE: "var(--rule)", _CARD: "var(--card)"}
# Okabe and Ito's palette, told apart with any colour vision, without its yellow and black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_FAR_APART = 5.0  # largest mean over smallest, from which on a scale is logarithmic
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, selectable, in the page's font
    "svg.hashsalt": "report",  # the same ids for the same drawing
    "text.parse_math": False,  # labels are data
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INK),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _RULE),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
}


@dataclass(frozen=True)
class Plot:
    """One drawing: ``title`` is also its text for screen readers."""

    title: str
    svg: Markup


def all_plots(board: Leaderboard) -> dict[str, list[Plot]]:
    """The plots of every setting, by section of the page: contexts, parameters, curves, input."""
    sections: dict[str, list[Plot]] = {"contexts": [], "parameters": [], "curves": [], "input": []}
    with mpl.rc_context(_STYLE):
        for number, setting in enumerate(board.settings):
            rows = [row for row in board.of(setting) if row.finished]
            looks = _looks(board.of(setting), board)
            drawings = {
                "contexts": _contexts(board, setting, looks),
                "parameters": _parameters(board, rows, looks),
                "curves": _curves(rows, looks),
                "input": _input_test(rows, looks),
            }
            for section, figure in drawings.items():
                if figure is not None:
                    name = _TITLES[section].format(metric=board.primary.label)
                    title = f"{name} ({setting})" if setting else name
                    sections[section].append(Plot(title, _svg(figure, f"{section}-{number}")))
    return sections


_TITLES = {
    "contexts": "One adapter for all tokens against one per context: test {metric}",
    "parameters": "Test {metric} against trainable parameters",
    "curves": "Validation perplexity by epoch",
    "input": "Test perplexity with the right and the wrong input",
}


def _svg(figure: Figure, name: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, themed in _THEMED.items():
        svg = svg.replace(stand_in, themed)
    for reference in ('id="', "url(#", 'href="#'):  # ids are unique in a drawing, not in a page of drawings
        svg = svg.replace(reference, f"{reference}{name}-")
    return Markup(svg)  # noqa: S704 -- matplotlib escapes the text it draws


@dataclass(frozen=True)
class _Look:
    colour: str
    marker: str


def _looks(rows: Sequence[Row], board: Leaderboard) -> dict[str, _Look]:
    """A colour and a marker for each label, in the order of the plan; the reference is in ink."""
    labels = dict.fromkeys(trial.label for trial in board.run.plan.trials)
    references = {row.label for row in rows if row.is_reference}
    looks = {label: _Look(_INK, "*") for label in references}
    for index, label in enumerate(label for label in labels if label not in references):
        looks[label] = _Look(_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])
    return looks


def _point(axes: Axes, x: float, y: float, look: _Look, filled: bool, **options: Any) -> None:
    face = look.colour if filled else _CARD
    size = 10 if look.marker == "*" else 6.5
    axes.plot(x, y, look.marker, ms=size, mfc=face, mec=look.colour, mew=1.5, **options)


def _within(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Limits that show every mean, and of the intervals as much as leaves the means apart.

    A t interval of two seeds may be ten times as wide as all means together.
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


def _log_if_far_apart(axes: Axes, which: Literal["x", "y"], means: Sequence[float]) -> None:
    """A logarithmic scale where one mean is many times another: on a linear one the rest would lie on a heap."""
    low, high = min(means), max(means)
    if low <= 0 or high / low < _FAR_APART:
        return
    if which == "x":
        axes.set_xscale("log")
        axes.set_xlim(low / 1.25, high * 1.25)
    else:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.25)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())


def _contexts(board: Leaderboard, setting: str, looks: dict[str, _Look]) -> Figure | None:
    metric = board.primary.name
    deltas = [
        delta
        for delta in board.deltas
        if delta.setting == setting and metric in delta.agnostic.metrics and metric in delta.specific.metrics
    ]
    if not deltas:
        return None
    figure = Figure(figsize=(6, 1.1 + 0.42 * len(deltas)), layout="constrained")
    axes = figure.subplots()
    for position, delta in enumerate(deltas):
        look = looks[delta.label]
        ends = [row.metrics[metric].mean for row in (delta.agnostic, delta.specific)]
        axes.annotate(
            "",
            (ends[1], position),
            (ends[0], position),
            arrowprops={"arrowstyle": "-", "color": look.colour, "lw": 2, "shrinkA": 0, "shrinkB": 0},
        )
        for row, filled in ((delta.agnostic, False), (delta.specific, True)):
            values = list(row.values(metric).values())
            axes.plot(values, [position] * len(values), "|", color=look.colour, ms=9, alpha=0.6)
            _point(axes, row.metrics[metric].mean, position, look, filled)
    _names_on_y(axes, [delta.label for delta in deltas])
    axes.set_xlabel(f"test {board.primary.label}   (hollow: agnostic, filled: specific, bars: seeds)")
    return figure


def _names_on_y(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _parameters(board: Leaderboard, rows: Sequence[Row], looks: dict[str, _Look]) -> Figure | None:
    metric = board.primary.name
    shown = [row for row in rows if row.parameters and row.parameters.trainable and metric in row.metrics]
    if not shown:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in shown:
        look, estimate = looks[row.label], row.metrics[metric]
        trainable = row.parameters.trainable if row.parameters else 0
        if estimate.low is not None and estimate.high is not None:
            axes.plot([trainable] * 2, [estimate.low, estimate.high], color=look.colour, lw=1.4, alpha=0.55)
        _point(axes, trainable, estimate.mean, look, row.grouping != "agnostic", label=row.name, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_locator(NullLocator())
    estimates = [row.metrics[metric] for row in shown]
    axes.set_ylim(*_within(estimates))
    _log_if_far_apart(axes, "y", [estimate.mean for estimate in estimates])
    axes.set_xlabel("trainable parameters (log scale)")
    axes.set_ylabel(f"test {board.primary.label}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, handletextpad=0.2)
    return figure


def _curves(rows: Sequence[Row], looks: dict[str, _Look]) -> Figure | None:
    """A panel for each label, seeds faint and their mean strong, with the reference's mean behind in every panel."""
    shown = [row for row in rows if any(record.history for record in row.finished)]
    labels = list(dict.fromkeys(row.label for row in shown))
    if not labels:
        return None
    columns = min(3, len(labels))
    lines = -(-len(labels) // columns)
    width, height = 0.6 + 1.8 * columns, 0.6 + 1.6 * lines
    # Margins in inches by hand: constrained layout measures every panel and takes most of a large report's time.
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.5 / width, 0.55 / height, 1 - 0.05 / width, 1 - 0.25 / height, wspace=0.12, hspace=0.35)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    reference = next((row for row in shown if row.is_reference), None)
    for axes, label in zip(panels, labels, strict=False):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(label)
        if reference is not None and reference.label != label:
            axes.plot(*_mean_curve(reference), color=_INK, lw=1.2, alpha=0.35)
        for row in (row for row in shown if row.label == label):
            dashes = "--" if row.grouping == "agnostic" else "-"
            for record in row.finished:
                xs = [epoch.epoch for epoch in record.history]
                ys = [epoch.validation_perplexity for epoch in record.history]
                axes.plot(xs, ys, dashes, color=looks[label].colour, lw=0.8, alpha=0.4)
            axes.plot(*_mean_curve(row), dashes, color=looks[label].colour, lw=1.8)
    for axes in panels[len(labels) :]:
        axes.set_visible(False)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter(ScalarFormatter())
    figure.supxlabel("epoch   (dashed: agnostic, solid: others, pale: the reference)", fontsize=10)
    return figure


def _mean_curve(row: Row) -> tuple[list[int], list[float]]:
    by_epoch: dict[int, list[float]] = {}
    for record in row.finished:
        for epoch in record.history:
            by_epoch.setdefault(epoch.epoch, []).append(epoch.validation_perplexity)
    epochs = sorted(by_epoch)
    return epochs, [statistics.fmean(by_epoch[epoch]) for epoch in epochs]


def _input_test(rows: Sequence[Row], looks: dict[str, _Look]) -> Figure | None:
    shown = [row for row in rows if row.input_use is not None]
    if not shown:
        return None
    figure = Figure(figsize=(6, 1.1 + 0.36 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for position, row in enumerate(shown):
        look = looks[row.label]
        right, wrong = row.metrics[RIGHT].mean, row.metrics[WRONG].mean
        axes.plot([right, wrong], [position] * 2, color=look.colour, lw=2)
        axes.plot(right, position, "o", ms=7, mfc=look.colour, mec=look.colour, mew=1.5)
        axes.plot(wrong, position, "o", ms=7, mfc=_CARD, mec=look.colour, mew=1.5)
    _names_on_y(axes, [row.name for row in shown])
    _log_if_far_apart(axes, "x", [row.metrics[metric].mean for row in shown for metric in (RIGHT, WRONG)])
    axes.set_xlabel("test perplexity   (filled: right input, hollow: wrong input)")
    return figure
