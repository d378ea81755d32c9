"""The contract of metrics: checks on the references of a task's sample, in the form of ``harness.check.task``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import get_args

import numpy as np

from harness.core.errors import did_you_mean
from harness.core.formulas import WIDTHS, agree, counts_key, score
from harness.core.record import Formula, MetricInfo
from tasks.base import Metric, Scores

# For a metric that no registered task uses.
REFERENCES: Mapping[str, Sequence[str]] = {
    "1": ("a man rides a brown horse on the beach", "someone on a horse by the sea"),
    "2": ("two dogs play with a red ball on the grass",),
    "3": ("a large pizza lies on a wooden table", "there is a pizza on the table"),
    "4": ("a cat sleeps on the bed next to a pillow",),
}
WRONG = "nothing of the kind"
FORMULAS = get_args(Formula)


class MetricSubject:
    """A metric class, and its scores of perfect, wrong and empty predictions, computed once each.

    Args:
        metric_class: the metric.
        references: by example id.
    """

    def __init__(self, metric_class: type[Metric], references: Mapping[str, Sequence[str]]) -> None:
        self.plugin, self.references = metric_class, references
        # The most frequent one, where several people answered.
        self.right = {key: Counter(texts).most_common(1)[0][0] for key, texts in references.items()}

    @cached_property
    def metric(self) -> Metric:
        """The metric."""
        return self.plugin()

    @cached_property
    def perfect(self) -> Scores:
        """Scores of predictions that equal a reference."""
        return self.metric.score(self.right, self.references)

    @cached_property
    def wrong(self) -> Scores:
        """Scores of predictions that have nothing to do with the references."""
        return self.metric.score(dict.fromkeys(self.references, WRONG), self.references)

    @cached_property
    def empty(self) -> Scores:
        """Scores of empty predictions."""
        return self.metric.score(dict.fromkeys(self.references, ""), self.references)


def perfect_is_scored(subject: MetricSubject) -> Iterator[str]:
    """Predictions that equal a reference have a score."""
    if not subject.perfect.corpus:
        yield "the corpus has no scores"


def labels_name_scores(subject: MetricSubject) -> Iterator[str]:
    """Every label belongs to a score of the corpus, or a note says why that score is missing."""
    if not subject.plugin.labels:
        yield "labels are empty, so the leaderboard would show none of its scores"
    corpus = subject.perfect.corpus
    missing = [name for name in subject.plugin.labels if name not in corpus]
    if missing and not subject.perfect.notes:
        yield f"labels contain {missing[0]!r}; the corpus has {', '.join(corpus)}, and no note says why it is missing"
    for name in subject.plugin.lower_is_better - set(corpus) - set(missing):
        yield f"lower_is_better contains {name!r}; the corpus has {', '.join(corpus)}"


def right_beats_wrong(subject: MetricSubject) -> Iterator[str]:
    """Predictions that equal a reference score better than wrong ones."""
    # Also on whole sentences: metrics of word pairs cannot score answers of one word.
    sentences = MetricSubject(subject.plugin, REFERENCES)
    for name in subject.plugin.labels:
        if name not in subject.perfect.corpus or name not in subject.wrong.corpus:
            continue
        lower = name in subject.plugin.lower_is_better
        if not _beats(name, subject, lower) and not _beats(name, sentences, lower):
            right, wrong = subject.perfect.corpus[name], subject.wrong.corpus[name]
            better = "lower" if lower else "higher"
            yield f"{name} is {right:.4g} for right and {wrong:.4g} for wrong predictions; {better} is better"


def _beats(name: str, subject: MetricSubject, lower: bool) -> bool:
    if name not in subject.perfect.corpus or name not in subject.wrong.corpus:
        return False
    gain = subject.perfect.corpus[name] - subject.wrong.corpus[name]
    return gain < 0 if lower else gain > 0


def examples_have_scores(subject: MetricSubject) -> Iterator[str]:
    """`per_example` has the scores of every example, or is empty."""
    found = subject.perfect.per_example
    if found and set(found) != set(subject.references):
        yield f"per_example has the ids {sorted(found)}; the examples are {sorted(subject.references)}"


def counts_give_the_score(subject: MetricSubject) -> Iterator[str]:
    """A score with a formula in `corpus` equals this formula of the summed counts."""
    for name, kind in subject.plugin.corpus.items():
        if kind not in FORMULAS:
            yield f"corpus: unknown formula {kind!r} for {name}; {did_you_mean(kind, FORMULAS)}"
            continue
        info = MetricInfo(name=name, label=name, higher_is_better=True, corpus=kind)
        for what, scores in (("right", subject.perfect), ("wrong", subject.wrong), ("empty", subject.empty)):
            if name in scores.corpus:
                yield from _mismatch(info, scores, what)
        if name not in subject.perfect.corpus and not subject.perfect.notes:
            yield f"corpus contains {name!r}; the scores are {', '.join(subject.perfect.corpus)}"


def _mismatch(info: MetricInfo, scores: Scores, what: str) -> Iterator[str]:
    key, width = counts_key(info), WIDTHS[info.corpus]
    rows: list[tuple[float, ...]]
    if info.corpus == "mean":
        rows = [(row[info.name], 1.0) for row in scores.per_example.values() if info.name in row]
    else:
        rows = [row[key] for row in scores.counts.values() if key in row]
    if not rows:
        where = "per_example has" if info.corpus == "mean" else "counts have"
        yield f"{info.name}: {where} no {key!r} for any example; {info.corpus} needs it"
        return
    if lengths := {len(row) for row in rows} - {width}:
        yield f"{info.name}: counts have {min(lengths)} numbers for {key!r}; {info.corpus} needs {width}"
        return
    again, value = float(score(info, np.sum(rows, axis=0, dtype=float))), scores.corpus[info.name]
    if not agree(again, value):
        yield f"{info.name} is {value:.6g} for {what} predictions; {info.corpus} of the counts is {again:.6g}"


def scores_are_finite(subject: MetricSubject) -> Iterator[str]:
    """Every score is finite, also for empty predictions."""
    for what, scores in (("right", subject.perfect), ("wrong", subject.wrong), ("empty", subject.empty)):
        columns = {"the corpus": scores.corpus, **{f"example {key!r}": row for key, row in scores.per_example.items()}}
        for where, row in columns.items():
            for name, value in row.items():
                if not math.isfinite(value):
                    yield f"{name} of {where} is {value} for {what} predictions; omit scores that cannot be computed"


def empty_is_a_score(subject: MetricSubject) -> Iterator[str]:
    """Empty predictions are scored, whether all are empty or one."""
    if not subject.empty.corpus:
        yield "if all predictions are empty, the corpus has no score"
    one = {**subject.right, next(iter(subject.references)): ""}
    if not subject.metric.score(one, subject.references).corpus:
        yield "if one prediction is empty, the corpus has no score"


def ids_must_match(subject: MetricSubject) -> Iterator[str]:
    """Ids that do not match, or an example without references, raise a `ValueError`."""
    first = next(iter(subject.references))
    fewer = {key: text for key, text in subject.right.items() if key != first}
    more = {**subject.right, "no-such-id": WRONG}
    cases: tuple[tuple[str, Mapping[str, str], Mapping[str, Sequence[str]]], ...] = (
        (f"no prediction for {first!r}", fewer, subject.references),
        ("a prediction for an unknown id", more, subject.references),
        (f"no references for {first!r}", subject.right, {**subject.references, first: ()}),
    )
    for case, predictions, references in cases:
        try:
            subject.metric.score(predictions, references)
        except ValueError:
            continue
        except Exception as error:  # third-party code
            yield f"{case}: raised {type(error).__name__}: {error}; it must raise a ValueError"
        else:
            yield f"{case}: silently scored; it must raise a ValueError"


def order_does_not_matter(subject: MetricSubject) -> Iterator[str]:
    """Scores do not depend on the order of the examples."""
    keys = list(subject.references)[::-1]
    reversed_ = subject.metric.score(subject.right, {key: subject.references[key] for key in keys})
    for name, value in subject.perfect.corpus.items():
        if not math.isclose(value, reversed_.corpus.get(name, math.nan), rel_tol=1e-6, abs_tol=1e-9):
            yield f"{name} is {value}, and {reversed_.corpus.get(name)} with the examples in reverse order"
    for key, row in subject.perfect.per_example.items():
        for name, value in row.items():
            if not math.isclose(value, reversed_.per_example[key].get(name, math.nan), rel_tol=1e-6, abs_tol=1e-9):
                yield f"{name} of example {key!r} is different with the examples in reverse order"


FIRST: tuple[Callable[[MetricSubject], Iterator[str]], ...] = (perfect_is_scored,)
THEN: tuple[Callable[[MetricSubject], Iterator[str]], ...] = (
    labels_name_scores, right_beats_wrong, examples_have_scores, counts_give_the_score, scores_are_finite,
    empty_is_a_score, ids_must_match, order_does_not_matter,
)  # fmt: skip
