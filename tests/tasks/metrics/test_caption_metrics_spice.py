"""SPICE: reported as missing if it is, and its scores assigned to the right images. The jar is replaced by a fake."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.metrics.captions import CaptionMetrics
from tasks.metrics.coco import spice

# Has the arguments and the output format of the jar, last example first. Its score is the length of the texts.
STAND_IN = f"""#!{sys.executable}
import json, sys
given, options = sys.argv[5], sys.argv[6:]
assert sys.argv[4] == "edu.anu.spice.SpiceScorer", sys.argv
items = json.load(open(given))
def score(item):
    return len(item["test"]) / 100 + sum(map(len, item["refs"])) / 10000
result = [{{"image_id": i["image_id"], "scores": {{"All": {{"f": score(i), "pr": 0, "re": 0}}}}}} for i in items]
RESULT
json.dump(result[::-1], open(options[options.index("-out") + 1], "w"))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put empty files in the place of the models and a script in the place of Java."""

    def install(change: str = "") -> None:
        for jar in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
            (tmp_path / jar).touch()
        java = tmp_path / "java"
        java.write_text(STAND_IN.replace("RESULT", change), encoding="utf-8")
        java.chmod(java.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("HARNESS_SPICE_MODELS", str(tmp_path))
        monkeypatch.setenv("HARNESS_SPICE_JAVA", str(java))

    return install


def expected(prediction: str, references: list[str]) -> float:
    return len(prediction) / 100 + sum(map(len, references)) / 10000


def test_every_image_gets_its_own_score_whatever_the_order(stand_in: Callable[[], None]) -> None:
    stand_in()
    predictions = {"9": "a dog", "10": "a cat on a bed", "1": "", "é": "one"}  # in no order
    references = {key: ["x" * n, "y z"] for n, key in enumerate(predictions, 1)}
    found = CaptionMetrics(with_meteor=False).score(predictions, references)
    wanted = {key: expected(predictions[key], references[key]) for key in predictions}
    assert {key: scores["spice"] for key, scores in found.per_example.items()} == pytest.approx(wanted)
    assert found.corpus["spice"] == pytest.approx(sum(wanted.values()) / 4)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sys.exit('no memory')", "SPICE failed with exit code 1: no memory"),
        ("result.pop()", "given 2 examples and returned scores of 1"),
        ("result[0]['image_id'] = 7", "given 2 examples and returned scores of 2"),
        ("result[0]['scores']['All']['f'] = None", "did not return an F-score for every example"),
        ("result[0]['scores']['All']['f'] = float('nan')", "given 2 examples and returned scores of 2"),
        ("result[0] = {}", "did not return an F-score for every example .KeyError"),
    ],
)
def test_a_lost_score_is_an_error(stand_in: Callable[[str], None], change: str, message: str) -> None:
    stand_in(change)
    with pytest.raises(RuntimeError, match=message):
        spice.spice([["x"], ["y"]], ["x", "y"])


def test_missing_models_are_named_in_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_SPICE_MODELS", str(tmp_path))
    found = CaptionMetrics(with_meteor=False).score({"a": "dog", "b": "cat"}, {"a": ["dog"], "b": ["bird"]})
    assert "spice" not in found.corpus
    [note] = found.notes
    assert note.startswith(
        "SPICE was not computed: stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar not"
    )
    assert str(tmp_path) in note
    monkeypatch.delenv("HARNESS_SPICE_MODELS")
    assert str(spice.FOLDER / "lib") in (spice.missing() or "")


@pytest.mark.parametrize(
    ("java", "found"), [("", "it is not set"), ("/nowhere/java", "'/nowhere/java' is not a program")]
)
def test_a_missing_java_is_named_too(
    stand_in: Callable[[], None], monkeypatch: pytest.MonkeyPatch, java: str, found: str
) -> None:
    stand_in()
    monkeypatch.setenv("HARNESS_SPICE_JAVA", java)
    assert f"HARNESS_SPICE_JAVA must name a Java of version 8 to 14, {found}" in (spice.missing() or "")
