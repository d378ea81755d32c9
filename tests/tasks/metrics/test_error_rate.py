"""Error rates against our own edit distance, against jiwer called directly, and in edge cases."""

from __future__ import annotations

import random

import jiwer
import pytest

from tasks.metrics.error_rate import ErrorRate, normalise

pytestmark = pytest.mark.quick


def edit_distance(reference: list[str] | str, hypothesis: list[str] | str) -> int:
    """Levenshtein's distance by its recurrence, row by row (Wagner and Fischer 1974)."""
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        above, row = row, [i]
        for j, found in enumerate(hypothesis, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (expected != found)))
    return row[-1]


def random_texts(rng: random.Random, count: int, shortest: int) -> list[str]:
    words = ["a", "b", "ab", "ba", "café", "7", "日本"]
    return [" ".join(rng.choices(words, k=rng.randint(shortest, 9))) for _ in range(count)]


def score_one(prediction: str, *references: str) -> dict[str, float]:
    return ErrorRate().score({"x": prediction}, {"x": references}).corpus


def test_random_texts_equal_an_independent_edit_distance() -> None:
    rng = random.Random(0)
    references, predictions = random_texts(rng, 300, 1), random_texts(rng, 300, 0)
    keys = [str(number) for number in range(300)]
    scores = ErrorRate().score(
        dict(zip(keys, predictions, strict=True)), {key: [text] for key, text in zip(keys, references, strict=True)}
    )
    words = [edit_distance(r.split(), p.split()) for r, p in zip(references, predictions, strict=True)]
    characters = [edit_distance(r, p) for r, p in zip(references, predictions, strict=True)]
    assert scores.corpus["wer"] == sum(words) / sum(len(text.split()) for text in references)
    assert scores.corpus["cer"] == sum(characters) / sum(len(text) for text in references)
    assert list(scores.per_example) == keys
    for key, text, word_edits, character_edits in zip(keys, references, words, characters, strict=True):
        assert scores.per_example[key] == {"wer": word_edits / len(text.split()), "cer": character_edits / len(text)}


def test_one_reference_each_equals_jiwer_by_hand() -> None:
    rng = random.Random(1)
    references, predictions = random_texts(rng, 50, 1), random_texts(rng, 50, 0)
    scores = ErrorRate().score(
        {str(n): text.upper() + "!" for n, text in enumerate(predictions)},
        {str(n): [f"  {text}. "] for n, text in enumerate(references)},
    )
    assert scores.corpus == {"wer": jiwer.wer(references, predictions), "cer": jiwer.cer(references, predictions)}


def test_the_corpus_counts_words_not_examples() -> None:
    scores = ErrorRate().score({"a": "wrong", "b": "one two three"}, {"a": ["right"], "b": ["one two three"]})
    assert scores.corpus["wer"] == 1 / 4
    assert {key: each["wer"] for key, each in scores.per_example.items()} == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("GO, do YOU hear?", "go do you hear"),
        ("don’t – “well-known”…", "dont wellknown"),
        (" a\t\tb\nc\u00a0d ", "a b c d"),
        ("Cafe\u0301", "caf\u00e9"),
        ("7 + $5 = 12%", "7 + $5 = 12"),  # % is punctuation to Unicode, + $ = are symbols
        ("ÀÉ ΣΊΣΥΦΟΣ", "àé σίσυφος"),
        ("?!", ""),
    ],
)
def test_normalisation(text: str, normalised: str) -> None:
    assert normalise(text) == normalised
    assert normalise(normalised) == normalised


def test_case_and_punctuation_are_no_errors_but_a_digit_for_a_word_is() -> None:
    assert score_one("Seven.", "SEVEN") == {"wer": 0.0, "cer": 0.0}
    assert score_one("7", "seven")["wer"] == 1.0


@pytest.mark.parametrize("prediction", ["", "  ", "...", "\n"])
def test_an_empty_prediction_is_all_deletions(prediction: str) -> None:
    assert score_one(prediction, "one two") == {"wer": 1.0, "cer": 1.0}


def test_insertions_lift_the_rate_above_one() -> None:
    assert score_one("one one one", "one")["wer"] == 2.0


@pytest.mark.parametrize("turned", [False, True])
def test_of_several_references_the_best_counts(turned: bool) -> None:
    short, long = "a b", "a b c d e"  # one edit of two words, two edits of five: the lower rate is the better
    order = (long, short) if turned else (short, long)
    scores = ErrorRate().score({"a": "a b c", "b": "q"}, {"a": order, "b": ["one"]})
    assert scores.per_example["a"]["wer"] == 2 / 5
    assert scores.corpus["wer"] == (2 + 1) / (5 + 1)  # the edits and the length of the best one


@pytest.mark.parametrize("turned", [False, True])
def test_of_equally_good_references_the_order_does_not_matter(turned: bool) -> None:
    order = ("a b c", "a") if turned else ("a", "a b c")
    scores = ErrorRate().score({"a": "", "b": "one"}, {"a": order, "b": ["one"]})
    assert scores.corpus["wer"] == 1 / 2


def test_words_and_characters_choose_their_best_reference_separately() -> None:
    by_words, by_characters = "cat zzzzzzzzzz", "cats dogs"
    scores = score_one("cat dog", by_words, by_characters)
    assert scores == {"wer": 1 / 2, "cer": 2 / 9}


def test_a_reference_without_words_is_left_out_and_none_left_is_an_error() -> None:
    assert score_one("", "?!", "one")["wer"] == 1.0
    with pytest.raises(ValueError, match="no word in any reference of 'silence'"):
        ErrorRate().score({"silence": "", "b": "b"}, {"silence": ["?!", " "], "b": ["b"]})


def test_ten_thousand_characters() -> None:
    words = ["word"] * 2000
    assert score_one(" ".join(words), " ".join(["wort", *words[1:]])) == {"wer": 1 / 2000, "cer": 1 / 9999}


def test_ids_must_match_and_references_be_sequences() -> None:
    metric = ErrorRate()
    with pytest.raises(ValueError, match="no examples to score"):
        metric.score({}, {})
    with pytest.raises(ValueError, match=r"no prediction for 'id0', 'id1', 'id2', 'id3', 'id4' and 2 more"):
        metric.score({}, {f"id{n}": ["a"] for n in range(7)})
    with pytest.raises(ValueError, match="no references for the prediction of 'b'"):
        metric.score({"a": "a", "b": "b"}, {"a": ["a"]})
    with pytest.raises(ValueError, match="no references for 'a'"):
        metric.score({"a": "a"}, {"a": []})
    with pytest.raises(ValueError, match="the references of 'a' are one string"):
        metric.score({"a": "a"}, {"a": "seven"})


def test_rates_are_ratios_of_the_sums_of_counts() -> None:
    scores = ErrorRate().score({"a": "a b c", "b": ""}, {"a": ["a b", "a b c d e"], "b": ["one two"]})
    assert scores.counts == {"a": {"wer": (2, 5), "cer": (4, 9)}, "b": {"wer": (2, 2), "cer": (7, 7)}}
    assert scores.corpus == {"wer": 4 / 7, "cer": 11 / 16}
    assert ErrorRate.corpus == {"wer": "ratio", "cer": "ratio"}


def test_it_says_that_lower_is_better() -> None:
    assert ErrorRate.lower_is_better == {"wer", "cer"} == set(ErrorRate.labels)
