"""Recorded attention as the page gets it: packed numbers against the written ones, limits, and files that are wrong."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.core.record import read_run
from results.leaderboard.table import build_leaderboard
from results.page import attention as module
from results.page.attention import Attention, build_attention, read_attention
from tests.support.attention import (
    LAYERS,
    SIDE,
    TOKENS,
    attended_run,
    best_first,
    example_of,
    weights_of,
    write_attention,
)
from tests.support.runs import METHODS, draw_pictures, fake_plan, write_run


def unpacked(found: Attention, method: int, example_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Patches and shares as the script computes them from the page's numbers."""
    one = found.data["methods"][method]["maps"][example_id]
    shape = one["layers"], one["heads"], len(one["tokens"])
    steps = np.frombuffer(base64.b64decode(one["patches"]), np.uint8).reshape(*shape, -1)
    scales, shares = (np.frombuffer(base64.b64decode(one[key]), "<f4").reshape(shape) for key in ("scales", "shares"))
    return steps / 255 * scales[..., None], shares


def test_packed_numbers_are_the_recorded_ones(tmp_path: Path) -> None:
    found = build_attention(attended_run(tmp_path))
    assert found.detail == "heads"
    assert (found.left_out, found.unreadable, found.several_softmaxes) == ((), (), ())
    assert found.methods == ("Full fine-tuning, seed 0", "LoRA r=4 specific, seed 0")
    assert [sample.example_id for sample in found.samples] == ["test-0", "test-1", "test-2"]
    for method in range(2):
        for index in range(3):
            patches, shares = unpacked(found, method, f"test-{index}")
            expected = weights_of(10 * method + index).astype(float)
            error = np.abs(patches - expected) / expected.max(axis=-1, keepdims=True)
            assert error.max() <= 0.5 / 255 + 1e-6
            np.testing.assert_allclose(shares, expected.sum(axis=-1), rtol=1e-6)


def test_what_is_seen_without_a_script_is_the_whole_caption_of_the_first_method(tmp_path: Path) -> None:
    sample = build_attention(attended_run(tmp_path)).samples[0]
    assert sample.first is not None
    mean = weights_of(0).astype(float).mean(axis=(0, 1, 2))
    with Image.open(io.BytesIO(base64.b64decode(sample.first.uri.partition(",")[2]))) as drawn:
        assert (drawn.size, drawn.mode) == ((SIDE, SIDE), "RGBA")
        brightness = np.asarray(drawn)[..., :3].astype(float).sum(axis=-1).ravel()
    assert (np.diff(brightness[np.argsort(mean)]) >= 0).all()
    row, column = divmod(int(mean.argmax()), SIDE)
    assert sample.first.caption == "".join(TOKENS) == "a red circle ."
    assert sample.first.sentence == (
        f"{100 * mean.sum():.3g} % of the attention goes to the image; the brightest patch "
        f"(row {row + 1}, column {column + 1} of 4 × 4) has {100 * mean.max():.3g} %."
    )
    assert sample.on_picture
    assert sample.first.style == "left:0%;top:0%;width:100%;height:100%"


def test_the_colours_get_lighter_and_more_opaque() -> None:
    colours = module._COLOURS.astype(float)
    luminance = colours[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -0.5).all()
    assert luminance[-1] - luminance[0] > 200
    assert (np.diff(colours[:, 3]) >= 0).all()


def test_class_tokens_count_for_the_share_and_are_not_drawn(tmp_path: Path) -> None:
    board = attended_run(tmp_path, methods=0)
    record = best_first(board)[0].finished[0]
    weights = weights_of(5, patches=1 + 6)
    example = example_of("test-0", tmp_path / "pictures" / "0.png", leading=1, rows=2, columns=3,
                         box=(0.25, 0.0, 0.75, 1.0), softmaxes=2)  # fmt: skip
    write_attention(tmp_path, record, [example], [weights])
    found = build_attention(board)
    patches, shares = unpacked(found, 0, "test-0")
    np.testing.assert_allclose(patches, weights[..., 1:].astype(float), atol=2e-3)
    np.testing.assert_allclose(shares, weights.astype(float).sum(axis=-1), rtol=1e-6)
    assert found.samples[0].first is not None
    assert found.samples[0].first.style == "left:25%;top:0%;width:50%;height:100%"
    assert found.several_softmaxes == found.methods


def test_a_row_of_tokens_stands_below_its_input(tmp_path: Path) -> None:
    board = attended_run(tmp_path, methods=0, count=1)
    record = best_first(board)[0].finished[0]
    examples = [
        example_of("a", tmp_path / "a.npy", rows=1, columns=16, context="series"),
        example_of("b", tmp_path / "pictures" / "0.png", rows=1, columns=16),
    ]
    write_attention(tmp_path, record, examples, [weights_of(0), weights_of(1)])
    found = build_attention(board).samples
    assert [(sample.on_picture, sample.aspect) for sample in found] == [(False, "8 / 1")] * 2
    assert [sample.file.kind for sample in found] == ["note", "picture"]
    assert found[0].first is not None
    assert "of the attention goes to the series; the brightest patch (position" in found[0].first.sentence


def test_an_empty_caption_is_said_to_be_empty(tmp_path: Path) -> None:
    board = attended_run(tmp_path, methods=0, count=1)
    example = example_of("test-0", tmp_path / "pictures" / "0.png", tokens=())
    write_attention(tmp_path, best_first(board)[0].finished[0], [example], [weights_of(0, tokens=0)])
    (sample,) = build_attention(board).samples
    assert sample.first is not None
    assert (sample.first.sentence, sample.first.uri) == ("The caption is empty.", "")


@pytest.mark.parametrize(("most_bytes", "detail"), [(4608, "heads"), (4607, "layers"), (1560, "layers"), (1559, "sum")])
def test_numbers_are_as_fine_as_the_page_has_room_for(
    most_bytes: int, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3 examples and 2 methods, with 24 maps: 4 ⌈24 · 16 / 3⌉ + 2 · 4 ⌈24 · 4 / 3⌉ characters each."""
    monkeypatch.setattr(module, "MOST_BYTES", most_bytes)
    found = build_attention(attended_run(tmp_path))
    assert found.detail == detail
    assert len(found.samples) == 3
    patches, shares = unpacked(found, 1, "test-2")
    expected = weights_of(12).astype(float)
    if detail != "heads":
        expected = expected.mean(axis=(1,) if detail == "layers" else (0, 1), keepdims=True)
    assert patches.shape == expected.shape
    np.testing.assert_allclose(patches, expected, atol=2e-3)
    np.testing.assert_allclose(shares, expected.sum(axis=-1), rtol=1e-5)
    written = sum(
        len(one[key])
        for m in found.data["methods"]
        for one in m["maps"].values()
        for key in ("patches", "scales", "shares")
    )
    assert written <= module.MOST_BYTES


def test_examples_that_do_not_fit_at_all_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 600)
    found = build_attention(attended_run(tmp_path))
    assert (found.detail, len(found.samples)) == ("sum", 2)
    assert found.left_out == ("1 examples: their maps would exceed the size limit of this page",)


def test_more_methods_and_examples_than_are_shown_are_named(tmp_path: Path) -> None:
    write_run(tmp_path, fake_plan(seeds=(0,), methods=METHODS[-5:]))
    pictures = draw_pictures(tmp_path / "pictures", 1)
    board = build_leaderboard(read_run(tmp_path))
    examples = [example_of(f"test-{index}", pictures / "0.png") for index in range(9)]
    for row in board.rows:
        write_attention(tmp_path, row.finished[0], examples, [weights_of(index) for index in range(9)])
    found = build_attention(board)
    assert (len(found.methods), len(found.samples)) == (4, 8)
    assert found.left_out == (f"{board.rows[-1].name}, seed 0: 4 methods are shown", "1 examples: 8 are shown")


def test_without_files_there_is_nothing(tmp_path: Path) -> None:
    found = build_attention(attended_run(tmp_path, methods=0))
    assert (found.methods, found.samples, found.unreadable, found.left_out) == ((), (), (), ())


def test_files_that_are_wrong_are_named_and_the_others_shown(tmp_path: Path) -> None:
    board = attended_run(tmp_path, methods=4)
    first, second, third, fourth = (row.finished[0] for row in best_first(board))
    example = example_of("test-0", tmp_path / "pictures" / "0.png")
    broken = write_attention(tmp_path, first, [example], [weights_of(0)])
    broken.write_bytes(b"no safetensors")
    stale = write_attention(
        tmp_path, second.model_copy(update={"started_at": "2020-01-01"}), [example], [weights_of(0)]
    )
    shape = write_attention(tmp_path, third, [example], [weights_of(0, patches=15)])
    found = build_attention(board)
    assert found.methods == (f"{best_first(board)[3].name}, seed 0",)
    assert fourth.trial_id in {trial.trial_id for trial in board.run.plan.trials}
    assert [line.split(": ")[0] for line in found.unreadable] == [str(broken), str(stale), str(shape)]
    assert found.unreadable[1].endswith("from another run of the trial; record it again with harness attention")
    assert "(2, 3, 4, 15)" in found.unreadable[2]


def test_an_example_that_the_first_method_lacks_is_another_methods(tmp_path: Path) -> None:
    board = attended_run(tmp_path, methods=2, count=1)
    example = example_of("other", tmp_path / "pictures" / "0.png")
    write_attention(tmp_path, best_first(board)[1].finished[0], [example], [weights_of(3)])
    found = build_attention(board)
    assert [(sample.example_id, sample.first is None) for sample in found.samples] == [
        ("test-0", False),
        ("other", True),
    ]
    assert list(found.data["methods"][0]["maps"]) == ["test-0"]


def test_a_file_reads_as_it_was_written(tmp_path: Path) -> None:
    board = attended_run(tmp_path, methods=1, count=1)
    header, weights = read_attention(next(tmp_path.glob("trials/*/attention.safetensors")))
    assert header.trial_id == best_first(board)[0].finished[0].trial_id
    assert weights["test-0"].shape[0] == LAYERS
    assert np.array_equal(weights["test-0"], weights_of(0).astype(np.float32))
