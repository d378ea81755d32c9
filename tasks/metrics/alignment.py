"""The check that every metric does first: predictions and references have the same ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def check_aligned(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Check that predictions and references have the same ids, and that every id has one or more references.

    Raises:
        ValueError: there are no examples, the ids differ, an example has no reference, or its references are one
            string (whose letters would be scored as references).
    """
    if not references and not predictions:
        raise ValueError("no examples to score")
    if unanswered := references.keys() - predictions.keys():
        raise ValueError(f"no prediction for {name_ids(unanswered)}")
    if unknown := predictions.keys() - references.keys():
        raise ValueError(f"no references for the prediction of {name_ids(unknown)}")
    if bare := [key for key, texts in references.items() if not texts]:
        raise ValueError(f"no references for {name_ids(bare)}")
    if single := [key for key, texts in references.items() if isinstance(texts, str)]:
        raise ValueError(f"the references of {name_ids(single)} are one string; a sequence of strings is needed")


def name_ids(ids: Iterable[str]) -> str:
    """Name the first five ids in order and count the rest."""
    ordered = sorted(ids)
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(repr(key) for key in ordered[:5]) + rest
