"""The first card of the page: what to use, at what price, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from results.leaderboard import summary
from results.leaderboard.efficiency import memory_bytes
from results.leaderboard.format import ratio, share, size_text
from results.leaderboard.recommend import Price, Recommendation, recommend
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard
from results.page.columns import short_count

_SURE_IN_WORDS = 4  # further lines stand under Rules and caveats
_IN_PERCENT = ("trainable parameters", "memory")  # "41 % of the memory"; other prices are "1.06×"


@dataclass(frozen=True)
class ShownPrice:
    """One price of the recommended row, relative to the reference."""

    label: str
    text: str
    note: str  # its interval


@dataclass(frozen=True)
class FirstCard:
    """What stands above everything else; ``others``: the recommendations by setting, where there are several."""

    question: str
    title: str
    sentence: str
    prices: tuple[ShownPrice, ...]
    price_of: str  # what the prices are relative to
    sure: tuple[str, ...]
    others: tuple[Recommendation, ...]


def first_card(board: Leaderboard) -> FirstCard:
    """The question, the recommendation (over all settings, if there are several), and what is not known."""
    first, *others = recommend(board)
    title = f"Use {first.name}" if first.name else "No recommendation"
    sentence = first.sentence.removeprefix(f"{first.name}: ").removeprefix(f"{first.name} is ")
    if first.prices and "; " in sentence:  # its first part says the prices, which the card shows as figures
        sentence = sentence.partition("; ")[2]
    sure = [*(_ahead(board) if others else summary.headline(board)[:1]), *first.unknown]
    sure += [f"{one.setting}: {line}" for one in others for line in one.unknown[:1]]
    return FirstCard(
        question_of(board),
        title,
        f"{sentence[:1].upper()}{sentence[1:]}",
        tuple(map(_shown, first.prices)) or _absolute(first),
        f"Relative to {board.reference_name}:" if first.prices else "Its price:",
        tuple(sure[:_SURE_IN_WORDS]),
        tuple(others),
    )


def _absolute(found: Recommendation) -> tuple[ShownPrice, ...]:
    """The prices of a row that is recommended itself as the reference, or without one."""
    parameters = found.row.parameters if found.row else None
    memory = memory_bytes(found.row) if found.row else None
    prices = [ShownPrice("trainable parameters", short_count(parameters.trainable), "")] if parameters else []
    return (*prices, *([ShownPrice("memory of the model", size_text(memory), "")] if memory else ()))


def _ahead(board: Leaderboard) -> list[str]:
    """In how many settings the best mean is shown to be ahead of all others."""
    ranked = [[row for row in board.of(setting) if row.rank] for setting in board.settings]
    ranked = [rows for rows in ranked if len(rows) > 1]
    clear = sum(all(row.rank and row.rank[0] > 1 for row in rows[1:]) for rows in ranked)
    if not ranked:
        return []
    return [f"In {clear} of {len(ranked)} settings the row with the best mean is shown to be ahead of all others."]


def _shown(price: Price) -> ShownPrice:
    show = share if price.name in _IN_PERCENT else ratio
    bounds = "" if price.low is None or price.high is None else f"[{show(price.low)}, {show(price.high)}]"
    return ShownPrice(price.name, show(price.ratio), bounds)


def question_of(board: Leaderboard) -> str:
    """``Which of 8 ways to fine-tune tiny-llama for scenes? Test Perplexity (lower is better), 2 seeds, 192 …``."""
    rows = [row for row in board.rows if row.finished]
    names = len({row.name for row in rows})
    direction = "higher" if board.primary.higher_is_better else "lower"
    settings = f" in {len(board.settings)} settings" if len(board.settings) > 1 else ""
    specs = [record.spec for row in rows for record in row.finished]
    model, task = _only(specs, "backbone", "language_model"), _only(specs, "task", "name")
    path = PurePath(model or "a model")
    short = "/".join(path.parts[-2:]) if path.is_absolute() else path.name  # a folder is often called fp32
    what = f"{names} way{'s' if names != 1 else ''} to fine-tune {short}"
    start = f"Which of {what}{f' for {task}' if task else ''}{settings}"
    return f"{start}? Test {board.primary.label} ({direction} is better), {_evidence(rows, board)}".rstrip(", ")


def _only(specs: Sequence[Mapping[str, Any]], section: str, key: str) -> str | None:
    """The value that all specs share; None if they differ or do not have it."""
    found = {str(spec[section][key]) for spec in specs if key in spec.get(section, {})}
    return next(iter(found)) if len(found) == 1 else None


def _evidence(rows: Sequence[Row], board: Leaderboard) -> str:
    """``5 seeds, 192 test examples.``"""
    scores = [row.metrics[board.primary.name] for row in rows if board.primary.name in row.metrics]
    parts = []
    for counts, noun in (
        ({one.n for one in scores}, "seed"),
        ({one.examples for one in scores if one.examples}, "test example"),
    ):
        if counts:
            low, high = min(counts), max(counts)
            number = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            parts.append(f"{number} {noun}{'' if high == 1 else 's'}")
    return f"{', '.join(parts)}." if parts else ""
