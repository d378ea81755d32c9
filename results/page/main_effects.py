"""The main effects as the page shows them: in the units of the metric, with a drawing on one scale for all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from results.leaderboard import format as text
from results.leaderboard.effects import Axis, Effect, main_effects
from results.leaderboard.table import Leaderboard

_WIDTH, _HEIGHT = 160, 14  # of a drawing, in pixels
_ROOM = 6


@dataclass(frozen=True)
class MainEffects:
    """The section of the page; false without an effect."""

    axes: tuple[Axis, ...]
    higher_is_better: bool
    is_ratio: bool

    def __bool__(self) -> bool:
        return bool(self.axes)

    def show(self, value: float) -> str:
        """``1.09×`` or ``+0.031``."""
        return text.ratio(value) if self.is_ratio else text.signed(value)

    def interval(self, one: Effect) -> str:
        """``[1.02×, 1.17×]``."""
        if one.change.low is None or one.change.high is None:
            return "one seed"
        return f"[{self.show(one.change.low)}, {self.show(one.change.high)}]"

    def verdict(self, one: Effect) -> str:
        """``better`` or ``worse``: the class of the style sheet."""
        return "better" if (one.change.mean > one.null) == self.higher_is_better else "worse"

    def drawing(self, one: Effect) -> Markup:
        """Point and interval; the upright line is "equal". The numbers stand beside it."""
        at = {name: f"{self._x(value):.1f}" for name, value in (("mean", one.change.mean), ("null", one.null))}
        bar = ""
        if one.change.low is not None and one.change.high is not None:
            ends = f'x1="{self._x(one.change.low):.1f}" x2="{self._x(one.change.high):.1f}"'
            bar = f'<line {ends} y1="7" y2="7" stroke="currentColor" stroke-width="2" stroke-opacity="0.5"/>'
        return Markup(  # noqa: S704 -- numbers only
            f'<svg class="effect" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
            f'<line x1="{at["null"]}" x2="{at["null"]}" y1="0" y2="14" stroke="var(--rule)"/>{bar}'
            f'<circle cx="{at["mean"]}" cy="7" r="4" fill="currentColor"/></svg>'
        )

    def _x(self, value: float) -> float:
        share = self._scaled(value) / self._reach
        return _WIDTH / 2 + min(1.0, max(-1.0, share)) * (_WIDTH / 2 - _ROOM)

    def _scaled(self, value: float) -> float:
        return math.log(max(value, 1e-12)) if self.is_ratio else value

    @property
    def _reach(self) -> float:
        """The largest mean, and intervals up to twice as far: one wide interval must not hide all the others."""
        found = [one for axis in self.axes for one in axis.effects]
        means = max((abs(self._scaled(one.change.mean)) for one in found), default=0.0)
        ends = [end for one in found for end in (one.change.low, one.change.high) if end is not None]
        return min(max((abs(self._scaled(end)) for end in ends), default=means), 2 * means) or means or 1.0


def build_effects(board: Leaderboard) -> MainEffects:
    """The main effects of the grid."""
    axes = main_effects(board)
    is_ratio = any(one.null == 1 for axis in axes for one in axis.effects)
    return MainEffects(axes, board.primary.higher_is_better, is_ratio)
