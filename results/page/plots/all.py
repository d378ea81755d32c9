"""All plots as inline SVG, drawn by matplotlib. Text, grid and background follow the theme of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import matplotlib as mpl
from matplotlib.figure import Figure

from results.leaderboard.efficiency import EXAMPLES, MEMORY, PARAMETERS, TIME, Efficiency, Front
from results.leaderboard.sweeps import Sweep
from results.leaderboard.table import RIGHT, WRONG, Leaderboard
from results.page.plots.pareto import pareto_figure
from results.page.plots.rows import contexts_figure, curves_figure, input_figure
from results.page.plots.style import MOST_PANELS, STYLE, Drawings, Look, Plot, looks_of, svg
from results.page.plots.sweeps import option_figure, option_sweeps, sweep_figure

__all__ = ["EXAMPLES_DRAWN", "MOST_DRAWN", "Drawings", "Plot", "all_plots"]

MOST_DRAWN = 4  # plots of each kind
EXAMPLES_DRAWN = 2  # of each kind with more: the first in the order of the plan; drawing takes long
Drawing = tuple[str, Callable[[], Figure]]  # title and drawing function


def all_plots(board: Leaderboard, sweeps: Sequence[Sweep], efficiency: Efficiency) -> dict[str, Drawings]:
    """The plots by section of the page: contexts, parameters, curves, input, sweeps, options, pareto."""
    looks = looks_of(board)
    fronts = [front for setting in efficiency.settings for front in setting.fronts] + list(efficiency.examples)
    costs = {cost: [front for front in fronts if front.cost == cost] for cost in (PARAMETERS, MEMORY, TIME, EXAMPLES)}
    with mpl.rc_context(STYLE):
        return {
            "contexts": _drawn("contexts", _contexts(board, looks)),
            "parameters": _drawn("parameters", _fronts(costs.pop(PARAMETERS), board, looks)),
            "curves": _drawn("curves", _curves(board, looks)),
            "input": _drawn("input", _input(board, looks)),
            "sweeps": _drawn("sweeps", _sweeps(sweeps, board, looks)),
            "options": _drawn("options", _options(board, looks)),
            "pareto": _joined([_drawn(cost.name, _fronts(own, board, looks)) for cost, own in costs.items()]),
        }


def _drawn(name: str, drawings: Iterable[Drawing]) -> Drawings:
    """Draw up to ``MOST_DRAWN`` of a kind, or ``EXAMPLES_DRAWN`` if there are more, and count the rest."""
    known = list(drawings)
    chosen = known if len(known) <= MOST_DRAWN else known[:EXAMPLES_DRAWN]
    plots = tuple(Plot(title, svg(draw(), f"{name}-{number}")) for number, (title, draw) in enumerate(chosen))
    return Drawings(plots, len(known) - len(plots))


def _joined(kinds: Sequence[Drawings]) -> Drawings:
    return Drawings(tuple(plot for kind in kinds for plot in kind), sum(kind.left_out for kind in kinds))


def _titled(title: str, setting: str, labels: int = 0) -> str:
    cut = f"; the first {MOST_PANELS} of {labels} methods" if labels > MOST_PANELS else ""
    return f"{title} ({setting}){cut}" if setting else f"{title}{cut}"


def _contexts(board: Leaderboard, looks: dict[str, Look]) -> Iterator[Drawing]:
    metric = board.primary
    for setting in board.settings:
        deltas = [
            delta
            for delta in board.deltas
            if delta.setting == setting
            and metric.name in delta.agnostic.metrics
            and metric.name in delta.specific.metrics
        ]
        if deltas:
            title = f"One adapter for all tokens against one per context: test {metric.label}"
            yield _titled(title, setting), partial(contexts_figure, deltas, metric, looks)


def _curves(board: Leaderboard, looks: dict[str, Look]) -> Iterator[Drawing]:
    for setting in board.settings:
        rows = [row for row in board.of(setting) if any(record.history for record in row.finished)]
        if rows:
            labels = len({row.label for row in rows})
            yield _titled("Validation perplexity by epoch", setting, labels), partial(curves_figure, rows, looks)


def _input(board: Leaderboard, looks: dict[str, Look]) -> Iterator[Drawing]:
    for setting in board.settings:
        rows = [row for row in board.of(setting) if row.metrics.keys() >= {RIGHT, WRONG}]
        if rows:
            title = "Test perplexity with the right and the wrong input"
            yield _titled(title, setting), partial(input_figure, rows, looks)


def _fronts(fronts: Sequence[Front], board: Leaderboard, looks: dict[str, Look]) -> Iterator[Drawing]:
    for front in fronts:
        title = f"Test {board.primary.label} against {front.cost.label}"
        yield _titled(title, front.setting), partial(pareto_figure, front, board.primary, looks)


def _sweeps(sweeps: Sequence[Sweep], board: Leaderboard, looks: dict[str, Look]) -> Iterator[Drawing]:
    for sweep in sweeps:
        if sweep.curves:
            title = f"Test {board.primary.label} against the {sweep.what}"
            labels = len({curve.rows[0].label for curve in sweep.curves if curve.name != sweep.reference})
            yield _titled(title, sweep.setting, labels), partial(sweep_figure, sweep, board.primary, looks)


def _options(board: Leaderboard, looks: dict[str, Look]) -> Iterator[Drawing]:
    for sweep in option_sweeps(board):
        title = f"Test {board.primary.label} against {sweep.method}'s {sweep.option}"
        yield _titled(title, sweep.setting), partial(option_figure, sweep, board, looks)
