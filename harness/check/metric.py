"""What every metric promises: checks on the references of a task's sample, as in ``harness.check.task``."""

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

# For a metric that no registered task names.
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
        # The commonest, where several people answered.
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
        """Scores of predictions without a word."""
        return self.metric.score(dict.fromkeys(self.references, ""), self.references)


def perfect_is_scored(subject: MetricSubject) -> Iterator[str]:
    """It scores predictions that equal a reference."""
    if not subject.perfect.corpus:
        yield "the corpus has no score"


def labels_name_scores(subject: MetricSubject) -> Iterator[str]:
    """Its labels name scores of the corpus, or a note says why one is missing."""
    if not subject.plugin.labels:
        yield "labels are empty; the leaderboard would show nothing of it"
    corpus = subject.perfect.corpus
    missing = [name for name in subject.plugin.labels if name not in corpus]
    if missing and not subject.perfect.notes:
        yield f"labels name {missing[0]!r}; the corpus has {', '.join(corpus)}, and no note says why it is missing"
    for name in subject.plugin.lower_is_better - set(corpus) - set(missing):
        yield f"lower_is_better names {name!r}; the corpus has {', '.join(corpus)}"


def right_beats_wrong(subject: MetricSubject) -> Iterator[str]:
    """Predictions that equal a reference score better than wrong ones."""
    # Also on whole sentences: where all answers are one word, there is no pair of words to be right about.
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
    """It scores every example, or none of them alone, under their ids."""
    found = subject.perfect.per_example
    if found and set(found) != set(subject.references):
        yield f"per_example has the ids {sorted(found)}; the examples are {sorted(subject.references)}"


def counts_give_the_score(subject: MetricSubject) -> Iterator[str]:
    """A score for which `corpus` names a formula is what the formula makes of the sums of its counts."""
    for name, kind in subject.plugin.corpus.items():
        if kind not in FORMULAS:
            yield f"corpus names the formula {kind!r} for {name}; {did_you_mean(kind, FORMULAS)}"
            continue
        info = MetricInfo(name=name, label=name, higher_is_better=True, corpus=kind)
        for words, scores in (("right", subject.perfect), ("wrong", subject.wrong), ("empty", subject.empty)):
            if name in scores.corpus:
                yield from _not_given(info, scores, words)
        if name not in subject.perfect.corpus and not subject.perfect.notes:
            yield f"corpus names {name!r}; the scores are {', '.join(subject.perfect.corpus)}"


def _not_given(info: MetricInfo, scores: Scores, words: str) -> Iterator[str]:
    key, width = counts_key(info), WIDTHS[info.corpus]
    rows: list[tuple[float, ...]]
    if info.corpus == "mean":
        rows = [(row[info.name], 1.0) for row in scores.per_example.values() if info.name in row]
    else:
        rows = [row[key] for row in scores.counts.values() if key in row]
    if not rows:
        where = "per_example has" if info.corpus == "mean" else "counts have"
        yield f"{info.name}: {where} no {key!r} of any example; {info.corpus} needs it"
        return
    if lengths := {len(row) for row in rows} - {width}:
        yield f"{info.name}: counts have {min(lengths)} numbers for {key!r}; {info.corpus} needs {width}"
        return
    again, value = float(score(info, np.sum(rows, axis=0, dtype=float))), scores.corpus[info.name]
    if not agree(again, value):
        yield f"{info.name} is {value:.6g} for {words} predictions; {info.corpus} makes {again:.6g} of the counts"


def scores_are_finite(subject: MetricSubject) -> Iterator[str]:
    """Every score is a finite number, those of empty predictions too."""
    for words, scores in (("right", subject.perfect), ("wrong", subject.wrong), ("empty", subject.empty)):
        columns = {"the corpus": scores.corpus, **{f"example {key!r}": row for key, row in scores.per_example.items()}}
        for where, row in columns.items():
            for name, value in row.items():
                if not math.isfinite(value):
                    yield f"{name} of {where} is {value} for {words} predictions; leave out what cannot be computed"


def empty_is_a_score(subject: MetricSubject) -> Iterator[str]:
    """Predictions without a word are scored, all of them or one."""
    if not subject.empty.corpus:
        yield "nothing but empty predictions has no score in the corpus"
    one = {**subject.right, next(iter(subject.references)): ""}
    if not subject.metric.score(one, subject.references).corpus:
        yield "one empty prediction among others leaves the corpus without a score"


def ids_must_match(subject: MetricSubject) -> Iterator[str]:
    """Ids that differ, and an example without a reference, are a ValueError."""
    first = next(iter(subject.references))
    fewer = {key: text for key, text in subject.right.items() if key != first}
    more = {**subject.right, "no-such-id": WRONG}
    cases: tuple[tuple[str, Mapping[str, str], Mapping[str, Sequence[str]]], ...] = (
        (f"no prediction for {first!r}", fewer, subject.references),
        ("a prediction for an unknown id", more, subject.references),
        (f"no reference of {first!r}", subject.right, {**subject.references, first: ()}),
    )
    for words, predictions, references in cases:
        try:
            subject.metric.score(predictions, references)
        except ValueError:
            continue
        except Exception as error:  # a plugin's code is anybody's
            yield f"{words}: raised {type(error).__name__}: {error}; a ValueError is needed"
        else:
            yield f"{words}: scored without a word; a ValueError is needed"


def order_does_not_matter(subject: MetricSubject) -> Iterator[str]:
    """The order of the examples changes nothing."""
    keys = list(subject.references)[::-1]
    turned = subject.metric.score(subject.right, {key: subject.references[key] for key in keys})
    for name, value in subject.perfect.corpus.items():
        if not math.isclose(value, turned.corpus.get(name, math.nan), rel_tol=1e-6, abs_tol=1e-9):
            yield f"{name} is {value} and {turned.corpus.get(name)} with the examples in another order"
    for key, row in subject.perfect.per_example.items():
        for name, value in row.items():
            if not math.isclose(value, turned.per_example[key].get(name, math.nan), rel_tol=1e-6, abs_tol=1e-9):
                yield f"{name} of example {key!r} is another one with the examples in another order"


FIRST: tuple[Callable[[MetricSubject], Iterator[str]], ...] = (perfect_is_scored,)
THEN: tuple[Callable[[MetricSubject], Iterator[str]], ...] = (
    labels_name_scores, right_beats_wrong, examples_have_scores, counts_give_the_score, scores_are_finite,
    empty_is_a_score, ids_must_match, order_does_not_matter,
)  # fmt: skip
