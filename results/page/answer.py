"""The first card of the page: what to use, at what price, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from results.leaderboard import summary
from results.leaderboard.rows import Row
from results.leaderboard.table import Leaderboard

_SURE_IN_WORDS = 4  # further lines stand under Rules and caveats


@dataclass(frozen=True)
class Price:
    """One price of the recommended row."""

    label: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """One recommendation: its sentence, and its prices as figures."""

    title: str
    sentence: str
    prices: tuple[Price, ...] = ()


@dataclass(frozen=True)
class FirstCard:
    """What stands above everything else."""

    question: str
    answers: tuple[Answer, ...]
    sure: tuple[str, ...]


def first_card(board: Leaderboard) -> FirstCard:
    """The question, the answers, and how sure they are."""
    sentences = summary.headline(board)
    sure = (*sentences[1:], *summary.few_seeds(board))[:_SURE_IN_WORDS]
    return FirstCard(question_of(board), (Answer("The answer", sentences[0]),), sure)


def question_of(board: Leaderboard) -> str:
    """``Which of 8 ways to fine-tune tiny-llama for scenes: test Perplexity (lower is better), at what price? …``."""
    rows = [row for row in board.rows if row.finished]
    names = len({row.name for row in rows})
    direction = "higher" if board.primary.higher_is_better else "lower"
    settings = f" in {len(board.settings)} settings" if len(board.settings) > 1 else ""
    specs = [record.spec for row in rows for record in row.finished]
    model, task = _only(specs, "backbone", "language_model"), _only(specs, "task", "name")
    what = f"{names} way{'s' if names != 1 else ''} to fine-tune {PurePath(model or 'a model').name}"
    start = f"Which of {what}{f' for {task}' if task else ''}{settings}"
    measure = f"by test {board.primary.label} ({direction} is better)"
    return f"{start} is worth its price, {measure}? {_evidence(rows, board)}".rstrip()


def _only(specs: Sequence[Mapping[str, Any]], section: str, key: str) -> str | None:
    """The value that all specs share; None if they differ or do not have it."""
    found = {str(spec[section][key]) for spec in specs if key in spec.get(section, {})}
    return next(iter(found)) if len(found) == 1 else None


def _evidence(rows: list[Row], board: Leaderboard) -> str:
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
