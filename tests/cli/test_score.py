"""Scoring files in COCO's formats: the output equals the scores of the metric, and broken files are named."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.cli.score import score
from harness.core.errors import UserError
from tasks.base import Scores
from tasks.metrics.diversity import Diversity

IMAGES = [{"id": 7}, {"id": "b"}]
ANNOTATIONS = [
    {"image_id": 7, "caption": "A dog.", "id": 1},
    {"image_id": "b", "caption": "a cat"},
    {"image_id": 7, "caption": "one dog"},
]
REFERENCES = {"images": IMAGES, "annotations": ANNOTATIONS}
PREDICTIONS = [{"image_id": "b", "caption": "A dog, a dog"}, {"image_id": 7, "caption": "two dogs"}]

Files = Callable[..., tuple[Path, Path]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    def write(references: Any = REFERENCES, predictions: Any = PREDICTIONS) -> tuple[Path, Path]:
        paths = (tmp_path / "references.json", tmp_path / "predictions.json")
        for path, content in zip(paths, (references, predictions), strict=True):
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return paths

    return write


def run(metric: str, paths: tuple[Path, Path], output: Path | None = None) -> str:
    console = Console(file=io.StringIO(), width=100)
    score(metric, *paths, output, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_json_is_what_the_metric_gives_in_the_order_of_the_references(files: Files, tmp_path: Path) -> None:
    printed = run("diversity", files(), tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    expected = Diversity().score({"7": "two dogs", "b": "A dog, a dog"}, {"7": ["x"], "b": ["x"]})
    assert found == {"corpus": expected.corpus, "per_example": {"7": {"length": 2.0}, "b": {"length": 4.0}}}
    assert list(found["per_example"]) == ["7", "b"]
    for words in ("diversity, 2 examples", "distinct-2", "distinct_2", f"{expected.corpus['distinct_2']:.4f}"):
        assert words in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "predictions.json", "references.json"]


def test_captions_are_scored_against_all_references_and_notes_go_to_stderr(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    class Noted(Diversity):
        lower_is_better = frozenset({"length"})

        def score(self, predictions: Any, references: Any) -> Scores:
            seen.extend([predictions, references])
            return Scores({"length": 1.0}, {}, ("SPICE was not computed: [no models]",))

    monkeypatch.setattr("harness.core.registry.Registry.load", lambda self, target: Noted)
    printed = run("captions", files(), tmp_path / "out.json")
    assert seen == [{"b": "A dog, a dog", "7": "two dogs"}, {"7": ["A dog.", "one dog"], "b": ["a cat"]}]
    assert capsys.readouterr().err == "SPICE was not computed: [no models]\n"
    assert "length (lower is better)" in printed
    assert json.loads((tmp_path / "out.json").read_text())["notes"] == ["SPICE was not computed: [no models]"]


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ('{"annotations": [\n  {"image_id": 7,}]}', r"references.json: line 2, column 18: broken JSON"),
        ([], r'references.json: must be an object with the lists "images" and "annotations"'),
        ({"annotations": []}, "annotations: is empty"),
        ({"images": {}, "annotations": []}, "images: must be a list"),
        ({"annotations": [{"image_id": 1.5, "caption": "x"}]}, r"annotations\[0\]: must have an image_id"),
        ({"annotations": [{"image_id": True, "caption": "x"}, 4]}, r"annotations\[0\]: .*\(1 more like this\)"),
        ({"annotations": [{"image_id": 1, "caption": ["x"]}]}, r"annotations\[0\]: must have a caption"),
        ({"images": [{"id": 1}], "annotations": []}, "image 1: has no caption in the annotations"),
        ({"images": [{}], "annotations": ANNOTATIONS}, r"images\[0\]: must have an id"),
        (
            {"images": IMAGES[:1], "annotations": ANNOTATIONS},
            r"annotations\[1\]: image_id b: belongs to an image that is not",
        ),
    ],
)
def test_broken_references_are_named(files: Files, references: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("diversity", files(references=references))


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"b": "x"}, r"predictions.json: must be a list of"),
        ([*PREDICTIONS, PREDICTIONS[0]], r"\[2\]: image_id b: already has a prediction"),
        (PREDICTIONS[:1], r"predictions.json: no prediction for image_id 7 of .*references.json"),
        ([], r"no prediction for 2 image_ids, the first 7, of"),
        ([*PREDICTIONS, {"image_id": 8, "caption": ""}], r"predictions for image_id 8 that .*references.json does not"),
        ([{"image_id": 8, "caption": ""}], r"2 problems:\n.*no prediction for 2 [^\n]*\n.*predictions for image_id 8"),
        ([{"caption": "x"}], r"\[0\]: must have an image_id"),
    ],
)
def test_broken_predictions_are_named(files: Files, predictions: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("diversity", files(predictions=predictions))


def test_errors_are_raised_before_scoring(files: Files, tmp_path: Path) -> None:
    paths = files()
    with pytest.raises(UserError, match=r"unknown metric 'diverse'.*did you mean 'diversity'"):
        run("diverse", paths)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        run("diversity", paths, tmp_path / "nowhere" / "out.json")
    with pytest.raises(UserError, match="is a folder"):
        run("diversity", paths, tmp_path)
    with pytest.raises(UserError, match=r"missing.json: cannot be read: No such file"):
        run("diversity", (tmp_path / "missing.json", paths[1]))
    paths[1].write_bytes(b'[{"caption": "\xff"}]')
    with pytest.raises(UserError, match=r"predictions.json: line 1: not UTF-8"):
        run("diversity", paths)


def test_errors_of_a_metric_name_the_files(files: Files) -> None:
    wordless = {"annotations": [{"image_id": key, "caption": "..."} for key in (7, "b")]}
    with pytest.raises(UserError, match=r"references.json, .*predictions.json: no word in any reference of '7', 'b'"):
        run("captions", files(references=wordless))
