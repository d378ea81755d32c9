"""What generated texts show apart from their scores: how many differ, and what one answer to everything would score.

A baseline looks at no input. It is computed where answers are short and repeat, by the metrics that say so
(``Metric.of_answers``), from the training answers: of a trial with other training examples it may be another answer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from harness.core.record import Answers
from harness.core.registry import Plugin
from harness.model.budget import by_member
from tasks.base import Example, Metric
from tasks.registry import METRICS

_log = logging.getLogger(__name__)

_SHOWN_CHARACTERS = 200  # of the most frequent text
_LEAST_SHARE = 0.05  # of the most frequent answer, where more than half of the answers differ
_MOST_CLASSES = 20  # up to this many different answers, chance is their mean score
_MOST_SCORED = 50_000  # answers scored for it: with more, chance is left out, because it would take seconds
Metrics = Mapping[str, Mapping[str, Plugin]]


def answers_of(
    metrics: Metrics, train: Sequence[Example], test: Sequence[Example], predictions: Mapping[str, str]
) -> dict[str, Answers]:
    """Count the texts of each task, and score the baselines that apply to it.

    Args:
        metrics: as for ``score_members``.
        train: training examples, for their answers.
        test: test examples.
        predictions: generated texts by example id.
    """
    trained = by_member(train)
    found = {}
    for member, indices in by_member(test).items():
        examples = [test[i] for i in indices]
        texts = Counter(_collapsed(predictions[example.id]) for example in examples)
        commonest, count = texts.most_common(1)[0]
        counted = Answers(
            texts=len(examples),
            distinct=len(texts),
            commonest=commonest[:_SHOWN_CHARACTERS],
            commonest_count=count,
            distinct_references=len({_collapsed(example.references[0]) for example in examples}),
        )
        training = _training_answers([train[i] for i in trained.get(member, ())])
        of_answers = [metric for plugin in metrics[member].values() if (metric := _of_answers(plugin)) is not None]
        found[member] = _with_baselines(counted, training, of_answers, examples) if training else counted
    return found


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _of_answers(plugin: Plugin) -> Metric | None:
    metric_class: type[Metric] = METRICS.load(plugin.target)
    return metric_class() if metric_class.of_answers else None


def _training_answers(examples: Sequence[Example]) -> list[str]:
    """The different answers of the training examples, the most frequent one first; empty if they hardly repeat.

    An example's answer is its most frequent reference. Answers that differ in case or white space alone are the same.
    """
    answers = [Counter(map(_key, example.references)).most_common(1)[0][0] for example in examples]
    counts = Counter(answers)
    if not counts:
        return []
    most = counts.most_common(1)[0][1]
    if most < 2 or (2 * len(counts) > len(answers) and most < _LEAST_SHARE * len(answers)):
        return []
    spelling: dict[str, str] = {}
    for example in examples:
        for text in example.references:
            spelling.setdefault(_key(text), _collapsed(text))
    # Of equally frequent ones the first in the alphabet, whatever the order of the examples.
    return [spelling[key] for key, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _key(text: str) -> str:
    return _collapsed(text).casefold()


def _with_baselines(
    counted: Answers, training: Sequence[str], metrics: Sequence[Metric], examples: Sequence[Example]
) -> Answers:
    majority: dict[str, float] = {}
    chance: dict[str, float] = {}
    by_chance = len(training) <= _MOST_CLASSES and len(training) * len(examples) <= _MOST_SCORED
    for metric in metrics:
        try:
            of_each = [_constant(metric, answer, examples) for answer in (training if by_chance else training[:1])]
        except Exception as error:  # a plugin's metric: the trial has its result, only the baseline is missing
            _log.warning("no baseline of %s: %s: %s", type(metric).__name__, type(error).__name__, error)
            continue
        majority |= of_each[0]
        if by_chance:
            names = [name for name in of_each[0] if all(name in scores for scores in of_each)]
            chance |= {name: sum(scores[name] for scores in of_each) / len(of_each) for name in names}
    return counted.model_copy(
        update={
            "majority": training[0],
            "training_answers": len(training),
            "majority_scores": majority,
            "chance_scores": chance,
        }
    )


def _constant(metric: Metric, answer: str, examples: Sequence[Example]) -> dict[str, float]:
    """The scores of one answer to every example."""
    references = {example.id: example.references for example in examples}
    return metric.score(dict.fromkeys(references, answer), references).corpus
