"""What a record says of generated texts: counted by hand, and baselines by definition."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pytest

from harness.core.record import Answers
from harness.core.registry import Plugin
from harness.trial.answers import answers_of
from tasks.base import Example, Metric, Scores
from tasks.metrics.exact_match import ExactMatch

EXACT = Plugin(name="exact_match", distribution="t", result_version=1, target="tasks.metrics.exact_match:ExactMatch")
VQA = Plugin(name="vqa_accuracy", distribution="t", result_version=1, target="tasks.metrics.vqa_accuracy:VQAAccuracy")
ROUGE = Plugin(name="rouge", distribution="t", result_version=1, target="tasks.metrics.rouge:Rouge")
BROKEN = Plugin(name="broken", distribution="t", result_version=1, target=f"{__name__}:Broken")


class Broken(Metric):
    of_answers = True
    labels = {"broken": "Broken"}  # noqa: RUF012

    def score(self, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
        raise ZeroDivisionError("no luck")


def examples(texts: Sequence[str | tuple[str, ...]], member: str = "", start: int = 0) -> list[Example]:
    return [
        Example(f"{member}/{start + n}", (), (text,) if isinstance(text, str) else text, member=member)
        for n, text in enumerate(texts)
    ]


def found(train: list[Example], test: list[Example], said: Sequence[str], *metrics: Plugin) -> dict[str, Answers]:
    plugins = {member: {plugin.name: plugin for plugin in metrics} for member in {one.member for one in test}}
    return answers_of(plugins, train, test, dict(zip((one.id for one in test), said, strict=True)))


def test_texts_are_counted_whatever_their_white_space() -> None:
    test = examples(["a cat", "a dog", "a  dog", "a bird"])
    (one,) = found([], test, ["a cat", " a  cat\n", "a dog", "x" * 500], EXACT).values()
    assert (one.texts, one.distinct, one.commonest, one.commonest_count) == (4, 3, "a cat", 2)
    assert one.distinct_references == 3
    assert (one.majority, one.training_answers, one.majority_scores, one.chance_scores) == ("", None, {}, {})
    (long,) = found([], test[:1], ["x" * 500]).values()
    assert len(long.commonest) == 200


def test_the_majority_answer_and_chance_are_scored_by_the_metric() -> None:
    train = examples(["Yes", "yes", "no", "no", "yes ", "2"])
    test = examples(["yes", "no", "no", "no", "maybe"], start=10)
    (one,) = found(train, test, ["no"] * 5, EXACT, ROUGE).values()
    assert (one.majority, one.training_answers) == ("Yes", 3)
    assert one.majority_scores == {"exact_match": pytest.approx(1 / 5)}  # rouge is not of answers
    assert one.chance_scores == {"exact_match": pytest.approx((1 / 5 + 3 / 5 + 0) / 3)}


def test_equally_frequent_answers_do_not_depend_on_the_order() -> None:
    train = examples(["red", "blue", "blue", "red"])
    for order in (train, train[::-1]):
        assert found(order, examples(["red"]), ["red"], EXACT)[""].majority == "blue"


@pytest.mark.parametrize(
    "train",
    [
        [],
        ["a b", "b c", "c d"],  # transcripts: none repeats
        [*map(str, range(60)), "0", "0"],  # 61 of 62 differ, and the most frequent one is below 5 %
    ],
)
def test_without_answers_that_repeat_there_is_no_baseline(train: list[str]) -> None:
    (one,) = found(examples(train), examples(["0", "1"]), ["0", "1"], EXACT).values()
    assert (one.majority, one.training_answers, one.majority_scores) == ("", None, {})


def test_many_classes_have_no_chance_and_half_of_the_answers_may_be_rare() -> None:
    train = examples([*map(str, range(60)), *["7"] * 5])
    (one,) = found(train, examples(["7", "8"]), ["7", "7"], EXACT).values()
    assert (one.majority, one.training_answers, one.majority_scores) == ("7", 60, {"exact_match": 0.5})
    assert one.chance_scores == {}


def test_an_example_of_several_references_has_its_most_frequent_one() -> None:
    train = examples([("yes", "yes", "no"), ("no", "yes", "yes"), ("no", "no", "yes")])
    test = examples([tuple(["yes"] * 10), tuple(["no"] * 10)])
    (one,) = found(train, test, ["yes", "no"], VQA, EXACT).values()
    assert one.majority == "yes"
    assert one.majority_scores == {"vqa_accuracy": 0.5, "exact_match": 0.5}


def test_tasks_of_a_mixture_are_counted_apart() -> None:
    train = [*examples(["yes", "yes", "no"], "vqa"), *examples(["one two", "three"], "text")]
    test = [*examples(["yes", "no"], "vqa", 9), *examples(["four", "five"], "text", 9)]
    both = found(train, test, ["yes", "yes", "a", "b"], EXACT)
    assert {member: (one.distinct, one.majority) for member, one in both.items()} == {
        "vqa": (1, "yes"),
        "text": (2, ""),
    }


def test_a_metric_that_fails_on_the_baseline_costs_only_the_baseline() -> None:
    (one,) = found(examples(["a", "a"]), examples(["a", "b"]), ["a", "b"], BROKEN, EXACT).values()
    assert one.majority_scores == {"exact_match": 0.5}


def test_the_baselines_of_many_examples_take_no_time() -> None:
    answers = [str(number % 20) for number in range(2500)]
    test = examples(answers)
    started = time.process_time()
    (one,) = found(test, test, answers, EXACT).values()
    assert time.process_time() - started < 2
    assert one.chance_scores == {"exact_match": pytest.approx(0.05)}
    (more,) = found(test, [*test, *examples(["1"], start=9000)], [*answers, "1"], EXACT).values()
    assert (more.chance_scores, set(more.majority_scores)) == ({}, {"exact_match"})


def test_which_metrics_have_baselines() -> None:
    assert ExactMatch.of_answers
    assert not Metric.of_answers
