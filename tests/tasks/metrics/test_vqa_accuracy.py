"""VQA accuracy: worked examples, the ten subsets of nine annotators enumerated, the oddities of the official code."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from tasks.metrics.vqa_accuracy import VQAAccuracy, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    # Where two agree, eight sets of nine have both (2/3) and two sets have one of them (1/3): (8 · 2/3 + 2 · 1/3) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)],
)
def test_ten_people(agreeing: int, accuracy: float) -> None:
    answers = ["net"] * agreeing + [f"other {number}" for number in range(10 - agreeing)]
    assert vqa_accuracy("net", answers) == pytest.approx(accuracy, abs=1e-12)


def test_it_is_the_mean_over_all_sets_that_leave_one_person_out() -> None:
    rng = random.Random(3)
    for _ in range(200):
        answers = rng.choices(["red", "blue", "green"], k=rng.randint(2, 12))
        if len(set(answers)) == 1:
            continue
        sets = list(combinations(answers, len(answers) - 1))
        mean = sum(min(1.0, chosen.count("red") / 3) for chosen in sets) / len(sets)
        assert vqa_accuracy("red", answers) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog", "dog"),
        ("a", ""),
        ("two dogs and ten cats", "2 dogs and 10 cats"),
        ("None", "0"),
        ("twenty", "twenty"),  # eleven and more are not known
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes are missing: not in the table
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("im", "im"),  # the official table has "Im", but is queried in lower case
        ("well its his", "well its his"),  # words of their own
        ("girl's", "girl's"),
        ("2:50 PM.", "2:50 pm"),
        ("2.5", "2.5"),
        ("5. .5 ...", "5 .5"),
        ("100,978", "100978"),
        ("red-brown", "red brown"),
        ("red - brown", "red brown"),
        ("red-brown -", "redbrown"),  # one dash touches a space, so that all dashes vanish
        ("red-brown 1,000", "redbrown 1000"),  # a comma between digits makes all punctuation vanish
        ("red/white, blue", "red white blue"),
        ("rouge,\twhite", "rouge white"),
        ("¿Qué?", "¿qué"),  # only the listed marks
        ("  two   spaces ", "2 spaces"),
        ("", ""),
    ],
)
def test_spelling(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_where_people_differ_both_sides_are_brought_to_one_spelling() -> None:
    answers = ["The net"] * 3 + ["net."] * 3 + ["goal"] * 4
    assert vqa_accuracy(" Net!\n", answers) == 1.0


def test_where_all_people_agree_only_the_case_is_evened_out() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 1.0
    assert vqa_accuracy("yes!", ["yes"] * 10) == 0.0
    assert vqa_accuracy("yes!", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy("the end", ["The End"] * 10) == 1.0
    assert vqa_accuracy("none", ["0"] * 10) == 0.0


def test_a_single_reference_is_matched_whatever_its_spelling() -> None:
    assert vqa_accuracy("A net.", ["net"]) == 1.0
    assert vqa_accuracy("nets", ["net"]) == 0.0


def test_fewer_than_ten_answers_go_by_the_formula_and_are_named() -> None:
    scores = VQAAccuracy().score({"a": "x", "b": "x", "c": "x"}, {"a": ["x", "x", "y"], "b": ["x"], "c": ["x"] * 10})
    # Two of three agree: leaving out x, x or y leaves 1, 1 and 2 that agree: (1/3 + 1/3 + 2/3) / 3.
    assert scores.per_example["a"]["vqa_accuracy"] == pytest.approx(4 / 9, abs=1e-12)
    assert scores.corpus["vqa_accuracy"] == pytest.approx((4 / 9 + 2) / 3, abs=1e-12)
    assert scores.notes == (
        "vqa_accuracy: 1 of 3 have 2 to 9 answers instead of 10 or 1: 'a'; with fewer than four, no answer can score 1",
    )
    assert VQAAccuracy().score({"b": "x"}, {"b": ["x"]}).notes == ()


def test_mismatching_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="no prediction for 'b'"):
        VQAAccuracy().score({"a": "x"}, {"a": ["x"], "b": ["x"]})
    with pytest.raises(ValueError, match="no references for the prediction of 'b'"):
        VQAAccuracy().score({"a": "x", "b": "x"}, {"a": ["x"]})
