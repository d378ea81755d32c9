"""ROUGE: equal to rouge-score for English, worked examples, and correct for scripts that the library drops."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from tasks.metrics.rouge import Rouge

NAMES = ("rouge1", "rouge2", "rougeL")


def test_a_case_worked_by_hand() -> None:
    scores = Rouge().score({"a": "the cat lay on the mat"}, {"a": ["The cat sat on a mat."]})
    # the, cat, on, mat are common, of six words each; "the cat" is the one common pair of five each;
    # the longest common subsequence is the cat on mat.
    assert scores.corpus == {
        "rouge1": pytest.approx(4 / 6),
        "rouge2": pytest.approx(1 / 5),
        "rougeL": pytest.approx(4 / 6),
    }
    assert scores.per_example == {"a": scores.corpus}
    assert scores.notes == ()


def test_precision_and_recall_weigh_the_same_and_words_are_not_stemmed() -> None:
    short = Rouge().score({"a": "running"}, {"a": ["running fast today"]}).corpus
    long = Rouge().score({"a": "running fast today"}, {"a": ["running"]}).corpus
    assert short == long
    assert short["rouge1"] == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))
    assert Rouge().score({"a": "run"}, {"a": ["runs"]}).corpus["rouge1"] == 0.0


def test_the_best_reference_counts_for_each_score() -> None:
    references = ["d c b a", "a b x y z"]  # all words in no order; one pair in order
    best = Rouge().score({"a": "a b c d"}, {"a": references}).corpus
    alone = [Rouge().score({"a": "a b c d"}, {"a": [text]}).corpus for text in references]
    assert best == {name: max(scores[name] for scores in alone) for name in NAMES}
    assert best["rouge1"] == alone[0]["rouge1"] > alone[1]["rouge1"]
    assert best["rouge2"] == alone[1]["rouge2"] > alone[0]["rouge2"]


def test_the_corpus_score_is_the_mean_over_examples() -> None:
    scores = Rouge().score({"a": "x", "b": "y"}, {"a": ["x"], "b": ["z"]})
    assert scores.corpus["rouge1"] == 0.5
    assert scores.corpus["rouge2"] == 0.0  # a single word has no pairs


@pytest.mark.parametrize("text", ["η γάτα κοιμάται", "кошка спит дома", "cafe\u0301 au lait", "猫が 寝て います"])
def test_words_of_every_script_count(text: str) -> None:
    assert RougeScorer(["rouge1"]).score("κοιμάται", "κοιμάται")["rouge1"].fmeasure == 0  # the library's score
    assert Rouge().score({"a": text}, {"a": [text]}).corpus["rouge2"] == 1.0
    assert Rouge().score({"a": "ξένο слово"}, {"a": [text]}).corpus["rouge1"] == 0.0


def test_an_example_without_words_is_left_out_and_named() -> None:
    scores = Rouge().score({"a": "yes", "b": "thumbs up"}, {"a": ["yes"], "b": ["👍", "!"]})
    assert list(scores.per_example) == ["a"]
    assert scores.corpus["rouge1"] == 1.0
    assert scores.notes == ("rouge: no reference of 'b' has a word; omitted: 1 of 2",)
    assert Rouge().score({"b": ""}, {"b": ["👍"]}).corpus == {}


def test_an_empty_prediction_scores_nothing() -> None:
    assert Rouge().score({"a": ""}, {"a": ["yes", "👍"]}).corpus == dict.fromkeys(NAMES, 0.0)


def test_mismatching_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="no prediction for 'b'"):
        Rouge().score({"a": "x"}, {"a": ["x"], "b": ["x"]})


@pytest.mark.real_data
def test_real_captions_score_as_the_library_has_them() -> None:
    if "COCO_CAPTIONS" not in os.environ:
        pytest.skip("COCO_CAPTIONS is not set: the file of COCO's validation captions")
    annotations = json.loads(Path(os.environ["COCO_CAPTIONS"]).read_text(encoding="utf-8"))["annotations"][:3000]
    captions: dict[str, list[str]] = {}
    for annotation in annotations:
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    several = {key: texts for key, texts in captions.items() if len(texts) > 1}
    predictions = {key: texts[0] for key, texts in several.items()}
    references = {key: texts[1:] for key, texts in several.items()}
    ours = Rouge().score(predictions, references).per_example
    library = RougeScorer(list(NAMES))
    for key, texts in references.items():
        theirs = library.score_multi(texts, predictions[key])
        assert ours[key] == {name: theirs[name].fmeasure for name in NAMES}
