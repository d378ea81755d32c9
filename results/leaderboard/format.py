"""Numbers as text, the same in the page, the exported tables and the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from results.statistics.intervals import Difference, Estimate

ABSENT = "–"


def number(value: float) -> str:
    """At most four significant digits: ``0.812``, ``12.46``, ``1,234``; very small numbers in scientific notation."""
    if value < 0:
        return f"−{number(-value)}"
    if value >= 999.5:
        return f"{value:,.0f}"
    if 0 < value < 0.0005:
        return f"{value:.1e}"
    return f"{value:.3f}" if value < 9.9995 else f"{value:.2f}" if value < 99.995 else f"{value:.1f}"


def signed(value: float) -> str:
    """A number with its sign, for differences."""
    return f"+{number(value)}" if value > 0 else number(value)


def interval(estimate: Estimate, show_sign: bool = False) -> str:
    """``[0.71, 0.92]``, or empty for one seed."""
    if estimate.low is None or estimate.high is None:
        return ""
    show = signed if show_sign else number
    return f"[{show(estimate.low)}, {show(estimate.high)}]"


def ratio(value: float) -> str:
    """A ratio, with a third decimal near 1: ``1.09×``, ``1.004×``, ``17.2×``."""
    if value >= 9.995 or value < 0.095:
        return f"{number(value)}×"
    return f"{value:.3f}×" if abs(value - 1) < 0.0195 else f"{value:.2f}×"


def change(difference: Difference) -> str:
    """A difference as a ratio where its metric has the log scale, else with its sign: ``1.09×``, ``+0.031``."""
    return ratio(difference.mean) if difference.null == 1 else signed(difference.mean)


def change_interval(difference: Difference) -> str:
    """``[1.02×, 1.17×]``, ``[+0.01, +0.05]``, or empty for one seed."""
    if difference.low is None or difference.high is None:
        return ""
    show = ratio if difference.null == 1 else signed
    return f"[{show(difference.low)}, {show(difference.high)}]"


def estimate_text(estimate: Estimate | None, show_sign: bool = False) -> str:
    """Mean and interval on one line, a difference with its sign or as a ratio; a dash if nothing was measured."""
    from results.statistics.intervals import Difference  # scipy, which `harness plan` has no use for

    if estimate is None:
        return ABSENT
    if isinstance(estimate, Difference):
        return f"{change(estimate)} {change_interval(estimate)}".rstrip()
    return f"{(signed if show_sign else number)(estimate.mean)} {interval(estimate, show_sign)}".rstrip()


VERDICTS = {"better": "better", "worse": "worse", "equivalent": "tie", "unresolved": "not separated yet"}


def verdict(difference: Difference | None) -> str:
    """For new seeds: ``better``, ``worse``, ``tie`` if shown to be equivalent, else ``not separated yet``.

    Empty for one seed.
    """
    if difference is None or difference.p_adjusted is None:
        return ""
    return VERDICTS[difference.verdict]


def verdict_text(difference: Difference | None) -> str:
    """The verdict, with what would separate the two: ``not separated yet (3 more seeds might)``; empty for one seed."""
    words = verdict(difference)
    if difference is None or difference.more_seeds is None or difference.verdict != "unresolved":
        return words
    return f"{words} ({difference.more_seeds} more seed{'s' * (difference.more_seeds > 1)} might)"


def examples_text(difference: Difference | None) -> str:
    """The verdict on these trained models, on new test examples; empty where the examples cannot be resampled."""
    if difference is None or difference.verdict_examples is None:
        return ""
    return VERDICTS[difference.verdict_examples]


def rank_text(rank: tuple[int, int] | None) -> str:
    """``1``, ``2–4``, or empty if it is not ranked."""
    if rank is None:
        return ""
    first, last = rank
    return str(first) if first == last else f"{first}–{last}"


def p_text(difference: Difference) -> str:
    """``p = 0.012``, corrected; empty for one seed."""
    p = difference.p_adjusted
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def share(value: float) -> str:
    """A share of 1 in percent: ``0.7 %``, ``41 %``."""
    percent = 100 * value
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:.2g} %"


def count(value: int | None) -> str:
    """``12,976,128``."""
    return ABSENT if value is None else f"{value:,}"


def size_text(size_bytes: float | None) -> str:
    """Bytes with a binary unit: ``1.42 GiB``."""
    if size_bytes is None:
        return ABSENT
    size, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.3g} {units[0]}" if size < 999.5 else f"{size:.0f} {units[0]}"
