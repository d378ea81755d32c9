"""The task ``scenes``: its pictures match their captions, and no scene is in two splits."""

from __future__ import annotations

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core.errors import UserError
from tasks.base import Split
from tasks.drawing.scene import COLOURS, IMAGE_SIZE, PLAIN, Group, Scene, draw_scene, generator, paint, place
from tasks.drawing.scene_captions import captions
from tasks.modalities.image import Image
from tasks.scenes import Scenes

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scenes(train: int = 8, **options: Any) -> Scenes:
    task = Scenes(Scenes.Config(train_examples=train, validation_examples=4, test_examples=4, **options))
    task.prepare()
    return task


def content(task: Scenes, split: Split) -> list[tuple[str, bytes, tuple[str, ...]]]:
    return [(e.id, e.files[0][1].read_bytes(), e.references) for e in task.examples(split)]


def test_examples_go_through_coco_files(cache: Path) -> None:
    task = scenes()
    assert (task.folder / "annotations" / "captions_validation.json").is_file()
    assert [len(task.examples(split)) for split in SPLITS] == [8, 4, 4]
    ids = [example.id for split in SPLITS for example in task.examples(split)]
    assert len(set(ids)) == 16
    for example in task.examples("train"):
        assert len(set(example.references)) == 5
        assert Image().load(example.files[0][1]).size == (IMAGE_SIZE, IMAGE_SIZE)


def test_more_examples_extend_a_smaller_set_and_seeds_differ() -> None:
    small, large, other = scenes(4), scenes(9), scenes(4, data_seed=1)
    assert content(large, "train")[:4] == content(small, "train")
    assert content(large, "test") == content(small, "test")
    assert all(a[1:] != b[1:] for a, b in zip(content(small, "train"), content(other, "train"), strict=True))


def test_prepare_is_idempotent_and_leaves_nothing_half_written(cache: Path) -> None:
    partial = scenes().folder.with_name(f".{scenes().folder.name}.partial")
    written = scenes().folder.stat().st_mtime_ns
    scenes()
    assert scenes().folder.stat().st_mtime_ns == written
    (scenes().folder).rename(partial)  # as if killed while writing: only the unfinished folder is there
    (partial / "annotations" / "captions_test.json").unlink()
    assert len(scenes().examples("test")) == 4
    assert not partial.exists()


def test_several_at_once_prepare_one_set(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: content(scenes(), "train"), range(4)))
    assert all(one == sets[0] for one in sets)


def test_a_cache_that_is_a_file_is_named(cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(UserError, match=r"cache/scenes/\w+: cannot write the data of the task scenes"):
        scenes()


def test_splits_share_no_scene_whatever_the_seed() -> None:
    drawn = {
        split: {draw_scene(generator(seed, split, index), split) for seed in range(3) for index in range(400)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert drawn[one].isdisjoint(drawn[other])
    assert all(len(unique) > 900 for unique in drawn.values())


def _centres(scene: Scene, seed: int) -> dict[Group, np.ndarray]:
    placed = place(scene, generator(seed))
    return {group: np.array([p.centre for p in placed if p.group == group]) for group in scene.groups}


@pytest.mark.parametrize("seed", range(40))
def test_groups_lie_as_the_axis_says_and_objects_do_not_overlap(seed: int) -> None:
    scene = draw_scene(generator("layout", seed), "train")
    centres = _centres(scene, seed)
    along = {"horizontal": 0, "vertical": 1}.get(scene.axis)
    for group in scene.groups:
        assert len(centres[group]) == group.count
    if along is not None:
        for first, second in itertools.pairwise(scene.groups):
            assert centres[first][:, along].max() < centres[second][:, along].min()
    cells = [tuple((point // (IMAGE_SIZE / 4)).astype(int)) for points in centres.values() for point in points]
    assert len(set(cells)) == len(cells)  # one object at most for each token of the encoder


@pytest.mark.parametrize("background", PLAIN)
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_painted_where_the_objects_are(background: str, colour: str) -> None:
    scene = Scene(background, "none", (Group("circle", colour, "large", 2),))
    rng = generator(colour)
    objects = place(scene, rng)
    pixels = np.asarray(paint(scene, objects, rng)).astype(int)
    inside = [pixels[int(y), int(x)] for x, y in (placed.centre for placed in objects)]
    assert np.abs(np.array(inside) - COLOURS[colour]).max() <= 13
    near_background = np.abs(pixels - PLAIN[background]).max(-1) <= 13
    assert 0.7 < near_background.mean() < 0.95


def _clauses(scene: Scene, count: int) -> set[str]:
    """Captions of a red star S and blue circles C, without backgrounds, sizes and numbers."""
    written = captions(scene, generator(0), count)
    assert len(set(written)) == count
    clauses = set()
    for caption in written:
        clause = re.sub(r"^on a grey background, |(, (on|against) a grey background)?\.$", "", caption)
        clause = re.sub(r"an? (small |little )?red star", "S", clause)
        clauses.add(re.sub(r"three (large |big )?blue circles", "C", clause))
    return clauses


def test_captions_of_a_pair_are_exactly_what_is_true() -> None:
    star, circles = Group("star", "red", "small", 1), Group("circle", "blue", "large", 3)
    side_by_side = {
        *("S left of C", "S to the left of C", "C right of S", "C to the right of S"),
        *("S is left of C", "S is to the left of C", "C are right of S", "C are to the right of S"),
        *("S sits left of C", "S sits to the left of C", "C sit right of S", "C sit to the right of S"),
        *("left of C there is S", "to the left of C there is S"),
        *("right of S there are C", "to the right of S there are C"),
        *("S on the left and C on the right", "C on the right and S on the left"),
        *("C have S to the left", "S has C to the right"),
        *("from left to right, S and C", "from right to left, C and S"),
        *("from left to right, S is followed by C", "from right to left, C are followed by S"),
        *("from left to right, C follow S", "from right to left, S follows C"),
    }
    assert _clauses(Scene("grey", "horizontal", (star, circles)), 400) == side_by_side
    one_above_the_other = {
        *("S above C", "C below S", "C under S", "S is above C", "C are below S", "C are under S"),
        *("S sits above C", "C sit below S", "C sit under S"),
        *("above C there is S", "below S there are C", "under S there are C"),
        *("S at the top and C at the bottom", "C at the bottom and S at the top"),
        *("C have S above", "S has C below"),
        *("from top to bottom, S and C", "from bottom to top, C and S"),
        *("from top to bottom, S is followed by C", "from bottom to top, C are followed by S"),
        *("from top to bottom, C follow S", "from bottom to top, S follows C"),
    }
    assert _clauses(Scene("grey", "vertical", (star, circles)), 400) == one_above_the_other


def test_verbs_and_nouns_agree_with_the_count() -> None:
    scene = Scene("dotted", "vertical", (Group("cross", "orange", "large", 1), Group("triangle", "white", "small", 2)))
    text = " ".join(captions(scene, generator(1), count=300))
    assert "orange crosses" not in text
    assert not re.search(r"triangle\b", text)
    assert not re.search(r"cross (are|sit|have|follow)\b(?! by)", text)
    assert not re.search(r"triangles (is|sits|has|follows)\b", text)
    assert "an orange cross" in text
    assert not re.search(r"\ba orange", text)
    for phrase in ("two small white triangles", "a pair of", "above", "under", "a dotted background", "followed by"):
        assert phrase in text


def test_three_groups_are_told_in_order_or_in_reverse() -> None:
    groups = tuple(Group(shape, "black", "small", 1) for shape in ("star", "square", "circle"))
    for caption in captions(Scene("teal", "vertical", groups), generator(2), count=100):
        star, square, circle = (caption.index(shape) for shape in ("star", "square", "circle"))
        if "from top to bottom" in caption:
            assert star < square < circle, caption
        elif "from bottom to top" in caption:
            assert circle < square < star, caption
        elif "between" in caption:
            assert square < min(star, circle), caption
        elif "which is" in caption:
            assert (star < square < circle) if "above" in caption else (circle < square < star), caption
