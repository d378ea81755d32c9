"""distinct-n against worked examples, and texts without words."""

from __future__ import annotations

import pytest

from tasks.metrics.diversity import Diversity

REFERENCES = {"a": ["x"], "b": ["x"], "c": ["x"]}


def test_distinct_ngrams_are_counted_over_all_predictions_and_divided_by_words() -> None:
    found = Diversity().score({"a": "A dog, a dog.", "b": "a DOG\nruns", "c": ""}, REFERENCES)
    # a dog a dog | a dog runs: 7 words; a, dog, runs; (a dog), (dog a), (dog runs), none across captions
    assert found.corpus == pytest.approx({"distinct_1": 3 / 7, "distinct_2": 3 / 7, "length": 7 / 3, "vocabulary": 3})
    assert found.per_example == {"a": {"length": 4}, "b": {"length": 3}, "c": {"length": 0}}
    assert found.notes == ()


def test_the_order_of_the_predictions_does_not_matter() -> None:
    predictions = {"c": "one", "a": "two words", "b": "three more words"}
    found = Diversity().score(predictions, REFERENCES)
    assert found.per_example == {"a": {"length": 2}, "b": {"length": 3}, "c": {"length": 1}}
    assert set(found.corpus) >= set(Diversity.labels)


def test_no_words_at_all_have_no_distinctness() -> None:
    found = Diversity().score({"a": "...", "b": "", "c": "😀"}, REFERENCES)
    assert found.corpus == {"length": 0, "vocabulary": 0}
    assert found.notes == ("distinct-1 and distinct-2 were not computed: no prediction has a word",)


def test_misaligned_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="no prediction for 'b', 'c'"):
        Diversity().score({"a": "x"}, REFERENCES)
