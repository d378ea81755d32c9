"""Plots of single settings: agnostic against specific, validation curves, and the wrong-input test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from harness.core.record import MetricInfo
from results.leaderboard.rows import Row
from results.leaderboard.table import RIGHT, WRONG, Delta
from results.page.plots.style import (
    CARD,
    INK,
    MOST_PANELS,
    Look,
    beneath,
    beside,
    frame,
    log_if_far_apart,
    log_ticks,
    marks,
    names_on_y,
    panel_title,
    panels,
    room_for,
    score_label,
)


def contexts_figure(deltas: Sequence[Delta], primary: MetricInfo, looks: dict[str, Look]) -> Figure:
    """A line for each label from its agnostic to its specific mean."""
    metric, names = primary.name, [delta.label for delta in deltas]
    figure, axes = frame(6, 0.8 + 0.36 * len(deltas), left=room_for(names), bottom=0.7)
    starts = [delta.agnostic.metrics[metric].mean for delta in deltas]
    ends = [delta.specific.metrics[metric].mean for delta in deltas]
    axes.hlines(range(len(deltas)), starts, ends, colors=[looks[name].colour for name in names], lw=2)
    seeds = [
        (value, position, looks[delta.label].colour)
        for position, delta in enumerate(deltas)
        for row in (delta.agnostic, delta.specific)
        for value in row.values(metric).values()
    ]
    xs, ys, colours = zip(*seeds, strict=True)
    axes.scatter(xs, ys, s=81, marker="|", c=colours, linewidths=1, alpha=0.6)
    for means, filled in ((starts, False), (ends, True)):
        marks(axes, [(x, y, looks[names[y]], filled) for y, x in enumerate(means)])
    names_on_y(axes, names)
    beneath(figure, f"{score_label(primary)}\nhollow: agnostic, filled: specific, bars: seeds")
    return figure


def curves_figure(rows: Sequence[Row], looks: dict[str, Look]) -> Figure:
    """A panel for each label: seeds faint, their mean bold, and the mean of the reference in the background."""
    labels = list(dict.fromkeys(row.label for row in rows))[:MOST_PANELS]
    figure, found = panels(len(labels), bottom=0.75, left=0.65)
    reference = next((row for row in rows if row.is_reference), None)
    for axes, label in zip(found, labels, strict=True):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        panel_title(axes, label)
        if reference is not None and reference.label != label:
            axes.plot(*_mean_curve(reference), color=INK, lw=1.2, alpha=0.35)
        for row in (row for row in rows if row.label == label):
            dashes = "--" if row.grouping == "agnostic" else "-"
            xs, ys = _seeds_in_one(row)
            axes.plot(xs, ys, dashes, color=looks[label].colour, lw=0.8, alpha=0.4)
            axes.plot(*_mean_curve(row), dashes, color=looks[label].colour, lw=1.8)
    found[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    found[0].yaxis.set_major_locator(FixedLocator(log_ticks(*found[0].get_ylim())))
    found[0].yaxis.set_major_formatter(ScalarFormatter())
    beside(figure, "perplexity (lower is better)")
    beneath(figure, "epoch\ndashed: agnostic, solid: others, pale: the reference")
    return figure


def _seeds_in_one(row: Row) -> tuple[list[float], list[float]]:
    """All seeds as one line with gaps, which draws faster than separate lines."""
    xs: list[float] = []
    ys: list[float] = []
    for record in row.finished:
        xs += [*(epoch.epoch for epoch in record.history), math.nan]
        ys += [*(epoch.validation_perplexity for epoch in record.history), math.nan]
    return xs, ys


def _mean_curve(row: Row) -> tuple[list[int], list[float]]:
    by_epoch: dict[int, list[float]] = {}
    for record in row.finished:
        for epoch in record.history:
            by_epoch.setdefault(epoch.epoch, []).append(epoch.validation_perplexity)
    epochs = sorted(by_epoch)
    return epochs, [statistics.fmean(by_epoch[epoch]) for epoch in epochs]


def input_figure(rows: Sequence[Row], looks: dict[str, Look]) -> Figure:
    """A line for each row from its perplexity with the right input to that with the wrong one."""
    names = [row.name for row in rows]
    figure, axes = frame(6, 0.8 + 0.3 * len(rows), left=room_for(names), bottom=0.7)
    positions, colours = range(len(rows)), [looks[row.label].colour for row in rows]
    right, wrong = ([row.metrics[metric].mean for row in rows] for metric in (RIGHT, WRONG))
    axes.hlines(positions, right, wrong, colors=colours, lw=2)
    axes.scatter(right, positions, s=49, c=colours, edgecolors=colours, linewidths=1.5, zorder=3)
    axes.scatter(wrong, positions, s=49, c=CARD, edgecolors=colours, linewidths=1.5, zorder=3)
    names_on_y(axes, names)
    log_if_far_apart(axes, "x", [*right, *wrong])
    beneath(figure, "test perplexity (lower is better)\nfilled: right input, hollow: wrong input")
    return figure
