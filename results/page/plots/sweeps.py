"""Curves over a budget with the crossover marked, and over an integer option such as LoRA's rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.core.naming import method_options
from harness.core.record import MetricInfo
from results.leaderboard.rows import Row
from results.leaderboard.sweeps import Curve, Sweep
from results.leaderboard.table import Leaderboard
from results.page.plots.style import (
    INK,
    MOST_PANELS,
    Look,
    beneath,
    beside,
    better,
    curve,
    log_if_far_apart,
    log_room,
    panel_title,
    panels,
    ticks_at,
    within,
)

_TICKS = 4  # labels that fit below a panel


def sweep_figure(sweep: Sweep, primary: MetricInfo, looks: dict[str, Look]) -> Figure:
    """A panel for each label, with the reference in the background; triangles mark the crossovers."""
    metric = primary.name
    others = [one for one in sweep.curves if one.name != sweep.reference] or list(sweep.curves)
    labels = list(dict.fromkeys(one.rows[0].label for one in others))[:MOST_PANELS]
    figure, found = panels(len(labels), bottom=0.95, left=0.95)
    reference = next((one for one in sweep.curves if one.name == sweep.reference), None)
    found[0].set_xscale("log")
    found[0].set_xlim(*log_room(sweep.budgets))
    estimates = [row.metrics[metric] for one in sweep.curves for row in one.rows]
    found[0].set_ylim(*within(estimates))
    log_if_far_apart(found[0], "y", [one.mean for one in estimates])
    ticks_at(found[0].xaxis, sweep.budgets, _TICKS)
    for axes, label in zip(found, labels, strict=True):
        panel_title(axes, label)
        if reference is not None:
            curve(axes, reference.budgets, reference.rows, metric, Look(INK, "*"), faint=True)
        for one in (one for one in others if one.rows[0].label == label):
            curve(axes, one.budgets, one.rows, metric, looks[label])
            _mark(axes, one, sweep, looks[label])
    behind = f", grey: {sweep.reference}" if reference is not None else ""
    crossing = "\ntriangle and bar: crossover, with its interval" if any(one.crossover for one in others) else ""
    what = "training examples" if sweep.kind == "examples" else "epochs"
    beside(figure, _two_lines(primary))
    beneath(figure, f"{what} (log scale)\ndashed: agnostic, solid: others{behind}{crossing}")
    return figure


def _mark(axes: Axes, one: Curve, sweep: Sweep, look: Look) -> None:
    """A triangle at the crossover, hollow for agnostic, and a bar for the visible part of its interval."""
    found = one.crossover
    if found is None or not math.isfinite(found.at):
        return
    agnostic = one.rows[0].grouping == "agnostic"
    height = 0.1 if agnostic else 0.04  # of the panel, so that two crossovers do not cover each other
    across = axes.get_xaxis_transform()
    if found.low is not None and found.high is not None:
        ends = max(found.low, sweep.budgets[0]), min(found.high, sweep.budgets[-1])
        axes.plot(ends, [height] * 2, color=look.colour, lw=2.5, alpha=0.5, transform=across)
    face = "none" if agnostic else look.colour
    axes.plot([found.at], [height], "^", ms=7, mfc=face, mec=look.colour, mew=1.3, transform=across, clip_on=False)


@dataclass(frozen=True)
class OptionSweep:
    """Rows of one setting and method that differ in one integer option, by grouping and other differing options."""

    setting: str
    method: str
    option: str
    lines: dict[tuple[str, str], list[tuple[int, Row]]]  # (grouping, other options) → by value, smallest first

    @property
    def values(self) -> list[int]:
        """Every value of the option."""
        return sorted({value for line in self.lines.values() for value, _ in line})


def option_sweeps(board: Leaderboard) -> Iterator[OptionSweep]:
    """Every integer option that varies within a method while all other options are equal."""
    metric = board.primary.name
    for setting in board.settings:
        families: dict[tuple[str, str], dict[tuple[str, str], list[tuple[int, Row]]]] = {}
        for row in board.of(setting):
            adapter = row.finished[0].spec.get("adapter", {}) if metric in row.metrics else {}
            config = method_options(adapter)
            for option, value in config.items():
                if isinstance(value, int) and not isinstance(value, bool):
                    others = {key: other for key, other in config.items() if key != option}
                    rest = json.dumps([others, adapter.get("init_from")], sort_keys=True)
                    lines = families.setdefault((row.method, option), {})
                    lines.setdefault((row.grouping, rest), []).append((value, row))
        for (method, option), found in families.items():
            lines = {
                key: sorted(line, key=lambda pair: pair[0])
                for key, line in found.items()
                if len({value for value, _ in line}) > 1
            }
            if lines:
                yield OptionSweep(setting, method, option, lines)


def option_figure(sweep: OptionSweep, board: Leaderboard, looks: dict[str, Look]) -> Figure:
    """Quality by the value of the option, with the reference as a horizontal band."""
    metric = board.primary.name
    reference = next((row for row in board.of(sweep.setting) if row.is_reference and metric in row.metrics), None)
    rests = list(dict.fromkeys(rest for _, rest in sweep.lines))[:MOST_PANELS]
    figure, found = panels(len(rests), bottom=0.75, left=0.95)
    rows = [row for line in sweep.lines.values() for _, row in line] + ([reference] if reference else [])
    found[0].set_ylim(*within([row.metrics[metric] for row in rows]))
    log_if_far_apart(found[0], "y", [row.metrics[metric].mean for row in rows])
    if sweep.values[0] > 0:
        found[0].set_xscale("log", base=2)
        found[0].set_xlim(*log_room(sweep.values))
    ticks_at(found[0].xaxis, sweep.values, 2 * _TICKS if len(rests) == 1 else _TICKS)
    for axes, rest in zip(found, rests, strict=True):
        panel_title(axes, _differing(rest, rests))
        if reference is not None:
            _level(axes, reference, metric)
        for (_, own), line in sweep.lines.items():
            if own == rest:
                curve(axes, [value for value, _ in line], [row for _, row in line], metric, looks[line[0][1].label])
    scale = " (log scale)" if sweep.values[0] > 0 else ""
    behind = f", grey: {reference.name}" if reference else ""
    beside(figure, _two_lines(board.primary))
    beneath(figure, f"{sweep.option}{scale}\ndashed: agnostic, solid: others{behind}")
    return figure


def _two_lines(primary: MetricInfo) -> str:
    """Axis label on two lines, which is all that fits next to one row of panels."""
    return f"test {primary.label}\n({better(primary)})"


def _level(axes: Axes, row: Row, metric: str) -> None:
    estimate = row.metrics[metric]
    axes.axhline(estimate.mean, color=INK, lw=1.2, alpha=0.45)
    if estimate.low is not None and estimate.high is not None:
        axes.axhspan(estimate.low, estimate.high, color=INK, alpha=0.1, lw=0)


def _differing(rest: str, rests: Sequence[str]) -> str:
    """The options in which the rows of this panel differ from the others; empty with one panel."""
    if len(rests) == 1:
        return ""
    options, sources = json.loads(rest)
    known = [json.loads(other)[0] for other in rests]
    words = [f"{key}={value}" for key, value in options.items() if any(other.get(key) != value for other in known)]
    return ", ".join(words) or ("other initial weights" if sources else "")
