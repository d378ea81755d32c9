"""The gallery for every kind of input, and the score shown by example where tasks are mixed (synthetic records)."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from harness.core.record import MetricInfo, read_run
from harness.core.samples import draw_ids
from results.leaderboard.table import build_leaderboard
from results.page import gallery as gallery_module
from results.page import page as page_module
from results.page.gallery import Gallery, Input, build_gallery, outputs_elsewhere
from results.page.plots.all import Drawings
from results.report import write_report
from tests.support.pages import Page
from tests.support.runs import METHODS, fake_plan, write_examples, write_run

COUNT = 8
Parts = list[tuple[str, str, str]]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of a report's time, and not looked at here."""
    kinds = ("contexts", "parameters", "curves", "input", "sweeps", "options", "pareto")
    monkeypatch.setattr(page_module, "all_plots", lambda *_: dict.fromkeys(kinds, Drawings()))


def run_with(folder: Path, inputs: list[Parts], metrics: tuple[MetricInfo, ...] = (), **columns: Any) -> Path:
    """A run of two methods with eight test examples; ``columns`` have their values."""
    methods = METHODS[-2:]
    changes: dict[str, Any] = {"metrics": metrics, "primary_metric": metrics[0].name} if metrics else {}
    plan = fake_plan(seeds=(0,), methods=methods, **changes)
    write_run(folder, plan)
    written = [json.dumps(parts) for parts in inputs]
    for trial in plan.trials:
        texts = [f"{trial.method} says {number}" for number in range(COUNT)]
        values = {name: [None, *own] for name, own in {"inputs": written, **columns}.items()}
        write_examples(folder, trial.trial_id, texts, folder, **values)
    return folder


def gallery_of(folder: Path) -> Gallery:
    return build_gallery(build_leaderboard(read_run(folder)))


def only_input(folder: Path, path: Path, context: str = "input") -> Input:
    found = gallery_of(run_with(folder, [[(context, "file", str(path))]] * COUNT)).samples[0].inputs
    assert len(found) == 1
    assert found[0].context == context
    return found[0]


def test_texts_are_shown_in_order_with_their_contexts_and_escaped(tmp_path: Path) -> None:
    turns: Parts = [("system", "text", "Be <b>brief</b>."), ("user", "text", "1 + 1?"), ("user", "text", "& now?")]
    run_with(tmp_path, [turns] * COUNT)
    sample = gallery_of(tmp_path).samples[0]
    assert [(part.context, part.text) for part in sample.texts] == [(context, text) for context, _, text in turns]
    assert sample.files == []
    text = write_report([tmp_path]).html.read_text()
    assert Page(text).open == []
    assert "<dt>system</dt><dd>Be &lt;b&gt;brief&lt;/b&gt;.</dd>" in text
    assert text.index("<dt>system</dt>") < text.index("<dd>1 + 1?</dd>") < text.index("<dd>&amp; now?</dd>")


def test_a_long_text_is_folded_and_whole(tmp_path: Path) -> None:
    long = "word " * 400 + "</details>end"
    run_with(tmp_path, [[("question", "text", long)]] * COUNT)
    part = gallery_of(tmp_path).samples[0].texts[0]
    assert part.text == long
    assert len(part.start) < 300
    page = write_report([tmp_path]).html.read_text()
    assert page.count(f"<summary>{part.start}</summary>{long.replace('<', '&lt;').replace('>', '&gt;')}</details>") == 8
    assert Page(page).open == []


def test_a_question_about_a_picture_has_both(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    parts: Parts = [("image", "file", str(tmp_path / "red.png")), ("question", "text", "Which colour?")]
    sample = gallery_of(run_with(tmp_path, [parts] * COUNT)).samples[0]
    assert [(part.context, part.kind) for part in sample.inputs] == [("image", "picture"), ("question", "text")]


@pytest.mark.parametrize(
    ("suffix", "media_type"),
    [("wav", "audio/wav"), ("flac", "audio/flac"), ("ogg", "audio/ogg"), ("MP3", "audio/mpeg")],
)
def test_a_recording_is_in_the_page_byte_for_byte(tmp_path: Path, suffix: str, media_type: str) -> None:
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, 0.5 * np.sin(np.arange(800) / 5), 8000, format=suffix.upper())
    part = only_input(tmp_path, path, "audio")
    assert part.kind == "sound"
    start, _, content = part.uri.partition(",")
    assert start == f"data:{media_type};base64"
    assert base64.b64decode(content) == path.read_bytes()
    page = Page(write_report([tmp_path]).html.read_text())
    assert page.open == []
    assert page.tags.count("audio") == COUNT
    assert part.uri in page.addresses


def test_a_recording_that_is_too_large_or_gone_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery_module, "_MOST_SOUND_BYTES", 2048)
    path = tmp_path / "long.wav"
    path.write_bytes(b"RIFF" + bytes(2045))
    part = only_input(tmp_path, path)
    assert (part.kind, part.uri) == ("note", "")
    assert part.text == "long.wav: 2 KiB, more than 2 KiB: not embedded in this page"
    path.unlink()
    assert only_input(tmp_path, path).text == "long.wav: could not be read: No such file or directory"
    assert "input: long.wav: could not be read" in write_report([tmp_path]).html.read_text()


@pytest.mark.parametrize("name", ["series.csv", "atoms.xyz", "array.npy", "no_suffix"])
def test_other_files_are_named_and_not_shown(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"1,2\n3,4\n")
    assert only_input(tmp_path, tmp_path / name).text == f"{name}: neither a picture nor a sound, not shown"
    assert f"{name}: neither a picture nor a sound" in write_report([tmp_path]).html.read_text()


def test_a_picture_that_crashes_its_decoder_costs_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("L", (10, 10)).save(tmp_path / "bomb.png")  # Pillow's DecompressionBombError is no OSError
    assert only_input(tmp_path, tmp_path / "bomb.png").text == "bomb.png: the picture could not be read"


def test_pictures_are_shown_as_the_model_sees_them(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "deep.png")
    turned = Image.new("RGB", (40, 20))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    shown = {}
    for name in ("deep.png", "turned.jpg"):
        part = only_input(tmp_path, tmp_path / name)
        (tmp_path / "shown.png").write_bytes(base64.b64decode(part.uri.partition(",")[2]))
        shown[name] = Image.open(tmp_path / "shown.png")
    assert shown["deep.png"].getpixel((1, 1)) == (128, 128, 128)
    assert shown["turned.jpg"].size == (20, 40)


MIXED = (
    MetricInfo(name="perplexity", label="Perplexity", higher_is_better=False),
    MetricInfo(name="perplexity_wrong_input", label="Perplexity, wrong input", higher_is_better=False),
    MetricInfo(name="speech/wer", label="speech: WER", higher_is_better=False),
    MetricInfo(name="coco_captions/bleu_4", label="coco_captions: BLEU-4", higher_is_better=True),
    MetricInfo(name="coco_captions/cider", label="coco_captions: CIDEr", higher_is_better=True),
)


def test_in_a_mixture_every_example_shows_a_metric_of_its_task(tmp_path: Path) -> None:
    texts: list[Parts] = [[("question", "text", "?")]] * COUNT
    even = [number % 2 == 0 for number in range(COUNT)]
    columns = {
        "cider": [None] * COUNT,
        "coco_captions/bleu_4": [0.25 if one else None for one in even],
        "coco_captions/cider": [1.5 if one else None for one in even],
        "speech/wer": [None if one else 0.75 for one in even],
    }
    gallery = gallery_of(run_with(tmp_path, texts, MIXED, **columns))
    assert len(gallery.samples) == COUNT
    for sample in gallery.samples:
        captioned = even[int(sample.example_id.removeprefix("test-"))]
        assert sample.score is not None
        assert sample.score.name == ("coco_captions/cider" if captioned else "speech/wer")
        assert {output.score for output in sample.outputs} == {1.5 if captioned else 0.75}
    text = write_report([tmp_path]).html.read_text()
    for words in ("coco_captions: CIDEr", "speech: WER (lower is better)"):
        assert words in text[text.index('id="samples"') :].partition("on this example")[0]
    assert text.count("<small>speech: WER</small>") == COUNT  # 4 examples × 2 methods


def test_without_a_metric_by_example_there_is_no_score(tmp_path: Path) -> None:
    run_with(tmp_path, [[("question", "text", "?")]] * COUNT, cider=[None] * COUNT)
    gallery = gallery_of(tmp_path)
    assert gallery.scores == []
    assert {sample.score for sample in gallery.samples} == {None}
    assert "on this example" not in write_report([tmp_path]).html.read_text()


def test_a_mixture_shows_as_many_examples_of_each_task(tmp_path: Path) -> None:
    ids = ["coco_captions/only", *(f"speech/{number}" for number in range(COUNT - 1))]
    run_with(tmp_path, [[("question", "text", "?")]] * COUNT, MIXED, example_id=ids)
    drawn = [sample.example_id for sample in gallery_of(tmp_path).samples]
    assert sorted(drawn) == sorted(ids)
    assert gallery_of(tmp_path).members == ("speech", "coco_captions")
    assert "separately for each of speech, coco_captions" in write_report([tmp_path]).html.read_text()

    even = [f"{task}/{number}" for task in ("speech", "coco_captions") for number in range(40)]
    assert Counter(one.partition("/")[0] for one in draw_ids(even, ["speech", "coco_captions"], 8)) == {
        "speech": 4,
        "coco_captions": 4,
    }
    assert len(draw_ids(["a/1", "a/2", "b/1"], ["a", "b"], 1)) == 2
    assert draw_ids(even, [], 8) != draw_ids(even, ["speech", "coco_captions"], 8)


def test_outputs_are_in_the_order_of_the_leaderboard_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(tmp_path, [[("question", "text", "?")]] * COUNT)
    board = build_leaderboard(read_run(tmp_path))
    names = [row.name for row in board.of(board.settings[0])]
    assert [output.row.name for output in build_gallery(board).samples[0].outputs] == names
    monkeypatch.setattr(gallery_module, "_MOST_ROWS", 1)
    assert [output.row.name for output in build_gallery(board).samples[0].outputs] == names[:1]
    assert "Methods are in the order of the leaderboard: the first 1 of 2." in write_report([tmp_path]).html.read_text()


def test_the_outputs_of_every_setting_are_beside_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fake_plan(seeds=(0,), methods=METHODS[-2:], settings=("small", "large"))
    write_run(tmp_path, plan)
    for trial in plan.trials:
        write_examples(tmp_path, trial.trial_id, [f"{trial.setting} {trial.method}"] * COUNT, tmp_path)
    board = build_leaderboard(read_run(tmp_path))
    gallery = build_gallery(board)
    others = outputs_elsewhere(board, gallery)
    assert gallery.setting == "large"
    assert {output.row.setting for sample in others for output in sample.outputs} == {"small"}
    assert {output.text for sample in others for output in sample.outputs} == {
        f"small {trial.method}" for trial in plan.trials
    }
    assert [sample.example_id for sample in others] == [sample.example_id for sample in gallery.samples]
    monkeypatch.setattr(gallery_module, "_MOST_READ", 1)
    assert {output.row.name for sample in outputs_elsewhere(board, gallery) for output in sample.outputs} == {
        board.of("small")[0].name
    }


def test_a_file_that_the_page_cannot_show_is_shown_by_its_preview(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1\n2\n", encoding="utf-8")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png")
    folder = tmp_path / "previews"
    folder.mkdir()
    Image.new("RGB", (30, 10), "blue").save(folder / "curve.png")
    (folder / "text.txt").write_text("3 < 4 values", encoding="utf-8")
    soundfile.write(folder / "tone.wav", np.zeros(80), 8000)
    names = ["curve.png", "text.txt", "tone.wav", "gone.png", None, "curve.png"]
    parts: Parts = [("x", "file", str(tmp_path / "a.csv"))] * 5
    parts += [("y", "file", str(tmp_path / "b.png")), ("z", "text", "how?")]
    previews = [json.dumps([*names, None])] * COUNT
    run_with(tmp_path, [parts] * COUNT, previews=previews)
    found = gallery_of(tmp_path).samples[0].inputs
    assert [one.kind for one in found] == ["picture", "text", "sound", "note", "note", "picture", "text"]
    assert [one.text for one in found[:3]] == ["a.csv", "3 < 4 values", "a.csv"]
    shown, own = (Image.open(io.BytesIO(base64.b64decode(found[n].uri.partition(",")[2]))) for n in (0, 5))
    assert (shown.size, own.size) == ((30, 10), (8, 8))  # the file itself where it can be shown
    page = write_report([tmp_path]).html.read_text()
    assert "3 &lt; 4 values" in page
    assert Page(page).open == []
