"""Checks of what tasks and metrics return, made in every run: what is wrong would show later, far from its cause."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from numbers import Real
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from tasks.base import Example, Metric, Scores, Split

_NUMBER = "allowed: a finite number; one that cannot be computed is left out, and a note says why"


def check_examples(splits: Mapping[Split, Any], task: str) -> None:
    """Check the examples of a task.

    Args:
        splits: what the task returned for each.
        task: its name, for messages.

    Raises:
        UserError: a split is no list of examples, an id is no text or used twice, or an example has inputs or
            references of another kind.
    """
    seen: set[str] = set()
    for split, examples in splits.items():
        where = f"task {task}: examples({split!r})"
        if not isinstance(examples, Sequence) or isinstance(examples, str | bytes):
            raise UserError(f"{where}: found {_kind(examples)}; allowed: a list of harness.Example")
        for place, example in enumerate(examples):
            if not isinstance(example, Example):
                raise UserError(f"{where}: found {_kind(example)} at position {place}; allowed: harness.Example")
            problem = _problem(example)
            if problem is None and example.id in seen:
                problem = "another example has this id; ids are unique over the task"
            if problem is not None:
                raise UserError(f"{where}: example {example.id!r} at position {place}: {problem}")
            seen.add(example.id)


def check_same(first: Sequence[Example], second: Sequence[Example], task: str, split: Split) -> None:
    """Check that two reads of a split gave the same; only the first difference is reported.

    Raises:
        UserError: content or order differ.
    """
    if isinstance(first, Sequence) and first is not second and list(first) != list(second):  # else: check_examples
        pairs = enumerate(zip_longest(first, second))
        place, (one, other) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        found = " and then ".join("no example" if e is None else f"example {e.id!r}" for e in (one, other))
        raise UserError(
            f"task {task}: {split} changes between two reads: at position {place} there was {found}; "
            "the content and the order of a split must be fixed"
        )


def check_files(splits: Mapping[Split, Sequence[Example]], task: str) -> None:
    """Check that the files of all examples are there, without reading them.

    Raises:
        UserError: one is not.
    """
    for split, examples in splits.items():
        for example in examples:
            for _, path in example.files:
                if not path.is_file():
                    raise UserError(f"task {task}: examples({split!r}): example {example.id!r}: {path}: no such file")


def _problem(example: Example) -> str | None:
    """What is wrong with an example, whose types a plugin need not have kept."""
    name: Any = example.id
    references: Any = example.references
    if not isinstance(name, str):
        return f"id: found {_kind(name)}; allowed: text"
    if not isinstance(references, tuple | list) or not references:
        return f"references: found {references!r}; allowed: a tuple of one text or more"
    for key, texts in (("references", references), ("inputs", [part.value for part in example.inputs])):
        for text in texts:
            if isinstance(text, str):
                if not text.isascii() and (wrong := [c for c in text if "\ud800" <= c <= "\udfff"]):
                    return f"{key}: found the lone surrogate {wrong[0]!r}, which is no character"
            elif key == "references" or not isinstance(text, Path):
                return f"{key}: found {_kind(text)}; allowed: text{' or a Path' if key == 'inputs' else ''}"
    return None


def checked_scores(found: Any, metric: type[Metric], ids: Collection[str]) -> Scores:
    """What a metric returned, with a note on each of its labels that has neither score nor note.

    Args:
        found: what it returned.
        metric: its class.
        ids: of the scored examples.

    Raises:
        ValueError: it is no ``Scores``, has scores of other examples, or scores that are no finite numbers.
    """
    if not isinstance(found, Scores):
        raise ValueError(f"the metric returned {_kind(found)}; allowed: harness.Scores")
    _check_numbers("the corpus", found.corpus.items())
    for of_examples, what in ((found.per_example, "scores"), (found.counts, "counts")):
        if others := [key for key in of_examples if key not in ids]:
            raise ValueError(f"the metric returned {what} of {others[0]!r}, which is no id of an example it scored")
    for key, scores in found.per_example.items():
        _check_numbers(f"example {key!r}", scores.items())
    for key, counts in found.counts.items():
        for name, values in counts.items():
            _check_numbers(f"example {key!r}", ((f"counts of {name}", value) for value in values))
    missing = [] if found.notes else [name for name in metric.labels if name not in found.corpus]
    return replace(found, notes=(*found.notes, *(f"{name} was not computed; no note says why" for name in missing)))


def _check_numbers(where: str, scores: Iterable[tuple[str, Any]]) -> None:
    for name, value in scores:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"the metric returned {value!r} as {name} of {where}; {_NUMBER}")


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
